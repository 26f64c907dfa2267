"""Depth, modes, alpha and size of pictures, against arithmetic done by hand on the pixels they were made of."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from tasks.data import picture
from tasks.data.picture import DAMAGED, read_picture
from tests.unit.data.crafted import (
    GREY,
    PALETTE,
    RGB,
    RGB_ALPHA,
    N,
    check,
    hidden,
    image_of,
    noise,
    of_lightness,
    on_white,
    write_png,
    write_tiff,
)

# --- modes and depths

def test_eight_bit_grey_and_colour(tmp_path):
    grey, colour = noise(N, N), noise(N, N, 3)
    for suffix in ("png", "bmp", "tif", "webp"):
        how = {"lossless": True} if suffix == "webp" else {}
        image_of(colour.astype(np.uint8), "RGB").save(tmp_path / f"c.{suffix}", **how)
        check(tmp_path / f"c.{suffix}", colour)
        image_of(grey.astype(np.uint8), "L").save(tmp_path / f"g.{suffix}", **how)
        check(tmp_path / f"g.{suffix}", grey)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_png_of_any_depth_spans_black_to_white(tmp_path, bits):
    values = noise(N, N, high=2**bits)
    values[0, :2] = 0, 2**bits - 1
    check(write_png(tmp_path / "a.png", values, bits, GREY), values * 255 / (2**bits - 1),
          notes=())


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is", [1, 0])
@pytest.mark.parametrize("bits", [8, 16])
def test_grey_tiff_of_either_polarity_and_byte_order(tmp_path, order, white_is, bits):
    values = noise(N, N, high=2**bits)
    file = write_tiff(tmp_path / "a.tif", values.astype(f"{order}u{bits // 8}").tobytes(), N, N, order, t258=(bits,),
                      t262=(white_is,))
    if (order, white_is, bits) == (">", 0, 16):  # Pillow knows it not
        with pytest.raises(DAMAGED, match="that Pillow does not read"):
            read_picture(file, N, 1)
    else:
        levels = values * 255 / (2**bits - 1)
        check(file, levels if white_is else 255 - levels)


def test_twelve_bits_span_black_to_white(tmp_path):
    values = noise(N, N, high=4096)
    even, odd = values[:, ::2], values[:, 1::2]
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], -1).astype(np.uint8)
    check(write_tiff(tmp_path / "a.tif", packed.tobytes(), N, N, t258=(12,)), values * 255 / 4095)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bit_tiff_as_pillow_writes_it(tmp_path, mode, compression):
    values = noise(N, N, high=65536)
    image_of(values.astype("<u2" if mode == "I;16" else ">u2"), mode).save(tmp_path / "a.tif", compression=compression)
    check(tmp_path / "a.tif", values * 255 / 65535)


def test_sixteen_bits_of_which_few_are_used_stay_dark_and_it_is_said(tmp_path):
    values = noise(N, N, high=4096)
    check(write_png(tmp_path / "a.png", values, 16, GREY), values * 255 / 65535, notes=[picture.DARK])


def test_sixteen_bit_colour_is_at_most_a_level_darker(tmp_path):
    values = noise(N, N, 3, high=65536)
    check(write_png(tmp_path / "a.png", values, 16, RGB), values * 255 / 65535, levels=1)
    for order in "<>":
        file = write_tiff(tmp_path / "a.tif", values.astype(f"{order}u2").tobytes(), N, N, order, t258=(16, 16, 16), t262=(2,),
                          t277=(3,))
        check(file, values * 255 / 65535, levels=1)


def test_floats_from_black_0_to_white_1(tmp_path):
    values = np.random.default_rng(0).random((N, N), dtype=np.float32)
    values[0, :2] = 0, 1
    Image.fromarray(values).save(tmp_path / "a.tif")
    check(tmp_path / "a.tif", values * 255)
    check(write_tiff(tmp_path / "b.tif", values.tobytes(), N, N, t258=(32,), t339=(3,), t262=(0,)), 255 - values * 255)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-0.5, 1), (0, 1.01), (0, float("inf")), (float("nan"), 1)])
def test_floats_of_another_range_are_refused_with_it(tmp_path, low, high):
    values = np.full((N, N), 0.5, np.float32)
    values[0, :2] = low, high
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"floats from .* to .*; taken are .* floats from 0 to 1"):
        read_picture(tmp_path / "a.tif", N, 1)


@pytest.mark.parametrize(("kind", "bits", "format_", "message"), [
    ("<i2", 16, 2, "signed integers; taken are"), ("<i1", 8, 2, "signed integers"), ("<i4", 32, 2, "signed integers"),
    ("<u4", 32, 1, "integers of 32 bits; taken are unsigned integers of 1 to 16 bits"), ("<f2", 16, 3, "does not read"),
    ("<f8", 64, 3, "does not read"),
])
def test_numbers_without_a_white_are_refused(tmp_path, kind, bits, format_, message):
    values = noise(N, N, high=100).astype(kind)
    file = write_tiff(tmp_path / "a.tif", values.tobytes(), N, N, t258=(bits,), t339=(format_,))
    with pytest.raises(DAMAGED, match=message):
        read_picture(file, N, 1)


def test_integers_of_32_bits_that_pillow_writes_are_refused(tmp_path):
    image_of(noise(N, N).astype(np.int32), "I").save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="signed integers"):
        read_picture(tmp_path / "a.tif", N, 1)
    with pytest.raises(ValueError, match="integers of 32 bits, 0 to 7"):
        picture.flatten(image_of(np.arange(8, dtype=np.int32)[None], "I"), [])


def test_a_tiff_without_polarity_or_with_a_palette_of_8_bits_is_refused(tmp_path):
    pixels = noise(N, N).astype(np.uint8).tobytes()
    with pytest.raises(ValueError, match="PhotometricInterpretation"):
        read_picture(write_tiff(tmp_path / "a.tif", pixels, N, N, t262=None), N, 1)
    palette = noise(768)
    with pytest.raises(ValueError, match="palette of 8-bit values"):
        read_picture(write_tiff(tmp_path / "b.tif", pixels, N, N, t262=(3,), t320=tuple(palette.tolist())), N, 3)
    check(write_tiff(tmp_path / "c.tif", pixels, N, N, t262=(3,), t320=tuple((palette * 257).tolist())),
          palette.reshape(3, 256).T[np.frombuffer(pixels, np.uint8)].reshape(N, N, 3))


def test_cmyk_without_a_profile(tmp_path):
    ink = noise(N, N, 4).astype(np.uint8)
    wanted = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255
    image = image_of(ink, "CMYK")
    image.save(tmp_path / "a.tif")
    check(tmp_path / "a.tif", wanted, levels=1)
    block = image_of(np.broadcast_to(ink[:1, :1], (N, N, 4)), "CMYK")  # one colour: JPEG keeps it
    block.save(tmp_path / "b.jpg", quality=100)
    check(tmp_path / "b.jpg", np.broadcast_to(wanted[0, 0], (N, N, 3)), levels=3)


def test_cmyk_jpeg_of_unknown_polarity_is_refused(tmp_path):
    data = io.BytesIO()
    image_of(noise(N, N, 4).astype(np.uint8), "CMYK").save(data, "JPEG")
    at = data.getvalue().index(b"\xff\xee")
    file = tmp_path / "a.jpg"
    file.write_bytes(data.getvalue()[:at] + data.getvalue()[at + 2 + struct.unpack(">H", data.getvalue()[at + 2:at + 4])[0]:])
    with pytest.raises(ValueError, match="CMYK without Adobe's marker"):
        read_picture(file, N, 3)


def test_ycbcr_hsv_and_lab(tmp_path):
    ycc = noise(N, N, 3).astype(np.uint8)
    y, cb, cr = (ycc[..., i] - o for i, o in enumerate((0.0, 128.0, 128.0)))
    wanted = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1).clip(0, 255)  # JFIF
    image_of(ycc, "YCbCr").save(tmp_path / "a.tif")
    check(tmp_path / "a.tif", wanted, levels=1.5)
    hsv = np.zeros((1, 3, 3), np.uint8)
    hsv[0, :] = [[0, 255, 200], [0, 0, 90], [85, 255, 100]]
    assert np.asarray(picture.flatten(image_of(hsv, "HSV"), [])).tolist() == [[[200, 0, 0], [90, 90, 90], [0, 100, 0]]]
    lab = np.zeros((N, N, 3), np.uint8)
    lab[..., 0] = np.arange(64).reshape(N, N) * 4  # a = b = 0: greys
    image_of(lab, "LAB").save(tmp_path / "b.tif")
    check(tmp_path / "b.tif", of_lightness(lab[..., 0] * (100 / 255)), levels=2)


def test_subsampled_ycbcr_that_is_not_compressed_is_refused(tmp_path):
    file = write_tiff(tmp_path / "a.tif", noise(N, N, 3).astype(np.uint8).tobytes(), N, N, t258=(8, 8, 8), t262=(6,), t277=(3,),
                      t530=(2, 2))
    with pytest.raises(ValueError, match="uncompressed YCbCr"):
        read_picture(file, N, 3)


def test_modes_that_no_file_has_but_programs_make():
    colour, alpha = hidden(3)
    pixels = np.dstack([colour, alpha]).astype(np.uint8)
    multiplied = np.dstack([np.rint(colour * alpha[..., None] / 255), alpha]).astype(np.uint8)
    for mode, array, wanted in (("RGBX", pixels, colour), ("RGBa", multiplied, on_white(colour, alpha)),
                                ("La", multiplied[..., 2:], on_white(colour[..., 2:], alpha)[..., 0]),
                                ("1", np.packbits(alpha > 127, axis=1), (alpha > 127) * 255)):
        image = image_of(array, mode) if mode != "1" else Image.frombytes("1", (N, N), array.tobytes())
        assert np.abs(np.asarray(picture.flatten(image, [])) - wanted).max() <= 2


# --- alpha

@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "bmp"])
def test_rgba_lies_on_white(tmp_path, suffix):
    colour, alpha = hidden(3)
    pixels = np.dstack([colour, alpha]).astype(np.uint8)
    how = {"lossless": True, "exact": True} if suffix == "webp" else {}
    image_of(pixels, "RGBA").save(tmp_path / f"a.{suffix}", **how)
    if suffix == "bmp":  # Pillow writes 32 bits without a mask for alpha: there is none
        check(tmp_path / "a.bmp", colour)
    else:
        check(tmp_path / f"a.{suffix}", on_white(colour, alpha), levels=1)


def test_bmp_with_a_mask_for_alpha(tmp_path):
    colour, alpha = hidden(3)
    pixels = np.dstack([colour[..., ::-1], alpha]).astype(np.uint8)[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, N, N, 1, 32, 3, len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    (tmp_path / "a.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122) + header + masks + pixels)
    check(tmp_path / "a.bmp", on_white(colour, alpha), levels=1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_with_alpha_lies_on_white(tmp_path, suffix):
    colour, alpha = hidden(1)
    image_of(np.dstack([colour, alpha]).astype(np.uint8), "LA").save(tmp_path / f"a.{suffix}")
    check(tmp_path / f"a.{suffix}", on_white(colour, alpha)[..., 0], levels=1)


@pytest.mark.parametrize(("samples", "photometric"), [(1, 1), (3, 2)])
def test_premultiplied_alpha_is_not_multiplied_again(tmp_path, samples, photometric):
    colour, alpha = hidden(samples)
    multiplied = np.rint(colour * alpha[..., None] / 255)
    pixels = np.dstack([multiplied, alpha]).astype(np.uint8).tobytes()
    file = write_tiff(tmp_path / "a.tif", pixels, N, N, t258=(8,) * (samples + 1), t262=(photometric,), t277=(samples + 1,),
                      t338=(1,))
    wanted = multiplied + 255 - alpha[..., None]
    check(file, wanted if samples == 3 else wanted[..., 0], levels=2)


def test_a_fourth_sample_that_is_no_alpha_is_left_alone(tmp_path):
    colour, extra = hidden(3)
    file = write_tiff(tmp_path / "a.tif", np.dstack([colour, extra]).astype(np.uint8).tobytes(), N, N, t258=(8,) * 4, t262=(2,),
                      t277=(4,), t338=(0,))
    check(file, colour)
    grey, extra = hidden(1)
    file = write_tiff(tmp_path / "b.tif", np.dstack([grey, extra]).astype(np.uint8).tobytes(), N, N, t258=(8, 8), t277=(2,),
                      t338=(0,))
    check(file, grey[..., 0])


def test_sixteen_bit_alpha(tmp_path):
    colour, alpha = hidden(3)
    pixels = np.dstack([colour, alpha]) * 257
    check(write_png(tmp_path / "a.png", pixels, 16, RGB_ALPHA), on_white(colour, alpha), levels=1)
    check(write_png(tmp_path / "b.png", pixels[..., 2:], 16, 4), on_white(colour[..., 2:], alpha)[..., 0], levels=1)


def test_palettes_with_one_many_or_no_transparent_colours(tmp_path):
    index, palette, alphas = noise(N, N), noise(256, 3), noise(256, seed=2)
    plte = {b"PLTE": palette.astype(np.uint8).tobytes()}
    check(write_png(tmp_path / "a.png", index, 8, PALETTE, plte), palette[index])
    check(write_png(tmp_path / "b.png", index, 8, PALETTE, {**plte, b"tRNS": alphas.astype(np.uint8).tobytes()}),
          on_white(palette[index], alphas[index]), levels=1)
    opaque = np.where(np.arange(256) == index[0, 0], 0, 255)
    alone = opaque[:index[0, 0] + 1].astype(np.uint8).tobytes()
    check(write_png(tmp_path / "c.png", index, 8, PALETTE, {**plte, b"tRNS": alone}), on_white(palette[index], opaque[index]),
          levels=1)
    few = noise(N, N, high=4)
    check(write_png(tmp_path / "d.png", few, 2, PALETTE, {b"PLTE": plte[b"PLTE"][:12], b"tRNS": b"\0\x80"}),
          on_white(palette[few], np.array([0, 128, 255, 255])[few]), levels=1)


def test_a_palette_that_is_rgba_and_one_beside_alpha(tmp_path):
    index, palette, alpha = noise(N, N), noise(256, 4), noise(N, N, seed=3)
    image = image_of(index.astype(np.uint8), "P")
    image.putpalette(palette.astype(np.uint8).tobytes(), "RGBA")
    found = np.asarray(picture.flatten(image, []))
    assert np.abs(found - on_white(palette[index][..., :3], palette[index][..., 3])).max() <= 1
    image = image_of(np.dstack([index, alpha]).astype(np.uint8), "PA")
    image.putpalette(palette[:, :3].astype(np.uint8).tobytes())
    image.save(tmp_path / "a.tif")
    check(tmp_path / "a.tif", on_white(palette[index][..., :3], alpha), levels=1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_transparent_grey_of_any_depth(tmp_path, bits):
    values = noise(N, N, high=2**bits)
    clear = int(values[0, 0])
    levels = values * 255 / (2**bits - 1)
    check(write_png(tmp_path / "a.png", values, bits, GREY, {b"tRNS": struct.pack(">H", clear)}),
          np.where(values == clear, 255, levels))


def test_one_transparent_colour(tmp_path):
    values = noise(N, N, 3)
    values[:4] = values[0, 0]
    clear = struct.pack(">HHH", *values[0, 0].tolist())
    wanted = np.where((values == values[0, 0]).all(-1, keepdims=True), 255, values)
    check(write_png(tmp_path / "a.png", values, 8, RGB, {b"tRNS": clear}), wanted)
    with pytest.raises(ValueError, match="16-bit RGB with one transparent colour"):
        read_picture(write_png(tmp_path / "b.png", values * 257, 16, RGB, {b"tRNS": clear}), N, 3)


def test_hidden_colour_does_not_bleed_when_the_picture_shrinks(tmp_path):
    pixels = np.zeros((4 * N, 4 * N, 4), np.uint8)
    pixels[..., 0] = 255                            # red everywhere, but only the right half shows: white, then
    pixels[:, 2 * N:] = [255, 255, 255, 255]
    image_of(pixels, "RGBA").save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", N, 3)[0] == 255).all()


def test_a_wholly_transparent_picture_is_white_and_it_is_said(tmp_path):
    Image.new("RGBA", (N, N), (200, 0, 0, 0)).save(tmp_path / "a.png")
    check(tmp_path / "a.png", np.full((N, N), 255), notes=[picture.CLEAR])


# --- size

@pytest.mark.parametrize("mode", ["L", "I;16", "F", "RGB", "P", "1"])
def test_shrinking_averages_whatever_the_depth(tmp_path, mode):
    """A chequerboard of black and white is grey from afar; dropped pixels would leave one of both."""
    board = (np.indices((64, 64)).sum(0) % 2).astype(np.float32)
    image = {"I;16": lambda: Image.fromarray((board * 65535).astype(np.uint16)), "F": lambda: Image.fromarray(board)}.get(
        mode, lambda: Image.fromarray((board * 255).astype(np.uint8)).convert(mode))()
    file = tmp_path / ("a.tif" if mode == "F" else "a.png")
    image.save(file)
    assert np.abs(read_picture(file, N, 1)[0].astype(int) - 127).max() <= 2


def test_deep_grey_is_resized_before_it_is_rounded(tmp_path):
    values = np.full((64, 64), 1000, np.uint16)   # 3.89 levels
    values[::2] = 40000                           # 155.64 levels; the mean is 79.77, of rounded ones 79.95 or 80
    Image.fromarray(values).save(tmp_path / "a.png")
    wanted = values.mean() * 255 / 65535
    assert np.abs(read_picture(tmp_path / "a.png", N, 1)[0].mean() - wanted) < 0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (3, 2), (2000, 7)])
def test_tiny_and_long_pictures(tmp_path, shape):
    values = np.zeros(shape, np.uint8)
    margins = [max(0, (n - min(shape)) // 2 - 4) for n in shape]  # the bicubic kernel sees two pixels beyond the crop
    values[tuple(slice(m, n - m) for m, n in zip(margins, shape, strict=True))] = 200
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", N, 3)[0] == 200).all()


def test_the_centre_is_cropped_and_the_shorter_side_kept(tmp_path):
    wide = noise(N, 3 * N).astype(np.uint8)
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", N, 1)[0][0] == wide[:, N:2 * N]).all()
