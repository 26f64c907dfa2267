"""Orientation, pages, damage and odd layouts of picture files, against arithmetic done by hand."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tasks.data import picture
from tasks.data.picture import DAMAGED, read_picture
from tests.unit.data.crafted import GREY, N, check, image_of, noise, on_white, write_bmp, write_png, write_tiff

# --- orientation

TURNED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
          5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
          8: lambda a: np.rot90(a)}  # EXIF 2.3: where the stored row 0 and column 0 lie


def blocks(rows: int, columns: int) -> np.ndarray:
    """Every pixel of a small picture as a block of 16 x 16, which JPEG keeps."""
    return np.kron(noise(rows, columns, high=230), np.ones((16, 16))).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "lzw.tif"])
def test_every_orientation_in_every_container(tmp_path, suffix, orientation):
    stored = blocks(3, 1)  # 48 x 16: turned or not decides which of the three blocks the crop takes
    stored[16:32, :8] = 250
    exif = Image.Exif()
    exif[274] = orientation
    how = {"jpg": {"quality": 100}, "webp": {"lossless": True}, "lzw.tif": {"compression": "tiff_lzw"}}.get(suffix, {})
    Image.fromarray(stored).convert("RGB").save(tmp_path / f"a.{suffix}", exif=exif, **how)
    wanted = TURNED[orientation](stored)
    middle = wanted[16:32] if wanted.shape[0] == 48 else wanted[:, 16:32]
    found = read_picture(tmp_path / f"a.{suffix}", 16, 1)[0][0]
    assert np.abs(found.astype(int) - middle).max() <= 3


def test_orientation_in_xmp_counts_too(tmp_path):
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    stored = noise(N, N).astype(np.uint8)
    Image.fromarray(stored).save(tmp_path / "a.png", pnginfo=info)
    check(tmp_path / "a.png", np.rot90(stored, -1))


def test_orientation_counts_beside_entries_of_an_odd_type(tmp_path):
    entries = [(271, 5, 1, 62), (274, 3, 1, 6), (282, 2, 1, 8)]  # the camera's maker as a fraction, the resolution as text
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 3) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(64)
    stored = noise(N, N).astype(np.uint8)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    check(tmp_path / "a.png", np.rot90(stored, -1))


def test_the_first_picture_of_an_mpo_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    stored = blocks(1, 1)
    stored[:8] = 250
    first = Image.fromarray(stored).convert("RGB")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[first], exif=exif, quality=100)
    assert np.abs(read_picture(tmp_path / "a.jpg", 16, 1)[0][0].astype(int) - stored[::-1]).max() <= 3


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\0\0", b"MM"])
def test_exif_that_cannot_be_read_is_upright(tmp_path, exif):
    stored = blocks(1, 1)
    Image.fromarray(stored).save(tmp_path / "a.jpg", quality=100, exif=exif)
    found, notes = read_picture(tmp_path / "a.jpg", 16, 1)
    assert np.abs(found[0].astype(int) - stored).max() <= 3 and notes in ([], [picture.BAD_EXIF])


# --- containers

@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_animations_and_pages_are_refused(tmp_path, suffix):
    frames = [Image.fromarray(noise(N, N, 3, seed=i).astype(np.uint8)) for i in range(3)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="3 frames or pages; taken is one picture a file"):
        read_picture(tmp_path / f"a.{suffix}", N, 3)


def test_the_first_picture_of_an_mpo_is_taken_and_it_is_said(tmp_path):
    first, second = (Image.new("RGB", (N, N), (shade,) * 3) for shade in (40, 200))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    check(tmp_path / "a.jpg", np.full((N, N), 40), levels=1, notes=[picture.FIRST])


def test_the_content_counts_not_the_suffix(tmp_path):
    colour = noise(N, N, 3)
    image_of(colour.astype(np.uint8), "RGB").save(tmp_path / "a.jpg", "PNG")
    check(tmp_path / "a.jpg", colour)


@pytest.mark.parametrize("kind", ["GIF", "PPM", "ICO", "TGA", "EPS"])
def test_other_content_under_a_known_suffix_is_refused(tmp_path, kind):
    Image.new("RGB", (N, N)).save(tmp_path / "a.png", kind)
    with pytest.raises(ValueError, match="its content is none of PNG, JPEG, BMP, WEBP, TIFF"):
        read_picture(tmp_path / "a.png", N, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "lzw.tif"])
def test_a_torn_file_is_refused(tmp_path, suffix):
    how = {"compression": "tiff_lzw"} if suffix == "lzw.tif" else {}
    Image.fromarray(noise(64, 64, 3).astype(np.uint8)).save(tmp_path / f"a.{suffix}", **how)
    data = (tmp_path / f"a.{suffix}").read_bytes()
    for kept in (0, 10, len(data) // 2, len(data) * 9 // 10):
        (tmp_path / f"a.{suffix}").write_bytes(data[:kept])
        with pytest.raises(DAMAGED):
            read_picture(tmp_path / f"a.{suffix}", N, 3)


def test_a_picture_that_unpacks_into_gigabytes_is_refused_by_its_header(tmp_path):
    file = write_png(tmp_path / "a.png", noise(N, N), 8, GREY)
    data = bytearray(file.read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    file.write_bytes(data)
    with pytest.raises(Image.DecompressionBombError, match="3600000000 pixels"):
        picture.open_picture(file)


def test_headers_alone_tell_what_is_refused_for_its_kind(tmp_path):
    image_of(noise(N, N).astype(np.int32), "I").save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="signed integers"):
        picture.open_picture(tmp_path / "a.tif")
    assert TiffImagePlugin.SAMPLEFORMAT == picture.SAMPLE_FORMAT


# --- layouts that Pillow takes for others

PLANES = {"RGB": (2, 3, ()), "RGBA": (2, 4, (2,)), "CMYK": (5, 4, ()), "LA": (1, 2, (2,)), "PA": (3, 2, (2,)),
          "LAB": (8, 3, ()), "L": (1, 1, ())}  # photometric, samples, extra samples


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("mode", PLANES)
def test_channels_one_after_the_other_are_right_or_refused(tmp_path, mode, bits, packed):
    """Of valid files, Pillow 13 makes noise of uncompressed 16-bit ones, and loses the alpha of compressed LA and PA."""
    photometric, samples, extra = PLANES[mode]
    values = noise(N, N, samples)
    strips = [(values[..., i] * (257 if bits == 16 else 1)).astype(f"<u{bits // 8}").tobytes() for i in range(samples)]
    more = {"t338": extra} if extra else {}
    if mode == "PA":
        more["t320"] = tuple((np.arange(768) % 256 * 257).tolist())
    file = write_tiff(tmp_path / "a.tif", [zlib.compress(s) for s in strips] if packed else strips, N, N, t284=(2,),
                      t258=(bits,) * samples, t262=(photometric,), t277=(samples,), t259=(8 if packed else 1,), **more)
    if bits == 8 and mode in ("RGB", "RGBA", "CMYK", "L"):
        wanted = {"RGB": lambda: values, "RGBA": lambda: on_white(values[..., :3], values[..., 3]), "L": lambda: values[..., 0],
                  "CMYK": lambda: (255 - values[..., :3]) * (255 - values[..., 3:]) / 255}[mode]()
        check(file, wanted, levels=1)
    else:
        with pytest.raises(ValueError, match="PlanarConfiguration 2|does not read"):
            read_picture(file, N, 3)


def test_big_endian_floats_are_right_or_refused(tmp_path):
    values = (noise(N, N, high=2)).astype(">f4")  # 0 and 1: swapped, 1 is 4.6e-41, and the picture black
    check(write_tiff(tmp_path / "a.tif", values.tobytes(), N, N, ">", t258=(32,), t339=(3,)), values * 255)
    file = write_tiff(tmp_path / "b.tif", zlib.compress(values.tobytes()), N, N, ">", t258=(32,), t339=(3,), t259=(8,))
    with pytest.raises(ValueError, match="big-endian floats"):
        read_picture(file, N, 1)


@pytest.mark.parametrize("palette", [[(0, 0, 0), (255, 255, 255)], [(255, 255, 255), (0, 0, 0)], [(255, 0, 0), (0, 0, 99)],
                                     [(i, i, i) for i in range(16)]])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bmp_with_a_short_palette_is_right_or_refused(tmp_path, bits, palette):
    """Pillow 13 reads 4 and 8 bits as 1 where the palette is black and white."""
    index = noise(N, N, high=min(len(palette), 2**bits))
    file = write_bmp(tmp_path / "a.bmp", index, bits, palette[:2**bits])
    refused = bits > 1 and palette[:2] == [(0, 0, 0), (255, 255, 255)] or bits == 4 and len(palette) == 16
    if refused:
        with pytest.raises(DAMAGED, match="palette of black and white alone|codec configuration"):
            read_picture(file, N, 3)
    else:
        check(file, np.array(palette)[index])
