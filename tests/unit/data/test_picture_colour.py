"""Colour profiles written by hand, against the formulas of IEC 61966-2-1, CIE 1976 and the ICC."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from tasks.data import picture
from tests.unit.data.crafted import (
    GREY,
    N,
    check,
    encode,
    hidden,
    image_of,
    noise,
    of_lightness,
    on_white,
    write_png,
)


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(gamma: float, primaries: list[list[float]] | None = None) -> bytes:
    """Grey, or RGB with these colorants (columns XYZ, relative to D50), and one gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    if primaries is None:
        return icc_of(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": curve})
    tags = {}
    for name, column in zip(b"rgb", np.array(primaries).T, strict=True):
        tags[bytes([name]) + b"XYZ"] = b"XYZ " + bytes(4) + b"".join(s15(v) for v in column)
        tags[bytes([name]) + b"TRC"] = curve
    return icc_of(b"RGB ", b"mntr", b"XYZ ", tags)


def press(lightness: np.ndarray) -> bytes:
    """CMYK: lightness (2, 2, 2, 2), 0..255 of CIELAB's L, of each ink at 0 or 255; all colours are grey."""
    table = np.stack([lightness.ravel(), np.full(16, 128), np.full(16, 128)], -1).astype(np.uint8).tobytes()
    straight = bytes(range(256))
    identity = b"".join(s15(v) for v in np.eye(3).ravel())
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + straight * 4 + table + straight * 3
    return icc_of(b"CMYK", b"prtr", b"Lab ", {b"A2B0": lut})


def icc_of(space: bytes, device: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC v2 profile, byte by byte."""
    tags = {b"wtpt": b"XYZ " + bytes(4) + s15(0.9642) + s15(1) + s15(0.8249), **tags}
    table, data, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, body in tags.items():
        table += name + struct.pack(">II", at + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    head = struct.pack(">I4xI", 128 + len(table) + len(data), 0x02400000) + device + space + connection + bytes(12) + b"acsp"
    return (head + bytes(28) + s15(0.9642) + s15(1) + s15(0.8249)).ljust(128, b"\0") + table + data


ADOBE = [[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]]   # Adobe RGB (1998), D50
P3 = [[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]]     # Display P3, D50
SRGB = [[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]    # sRGB, D50


def as_srgb(colour: np.ndarray, gamma: float, primaries: list) -> np.ndarray:
    linear = (colour / 255) ** gamma
    return encode(linear @ np.array(primaries).T @ np.linalg.inv(np.array(SRGB)).T)


@pytest.mark.parametrize("primaries", [ADOBE, P3], ids=["adobe", "p3"])
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_wide_gamuts_become_srgb(tmp_path, suffix, primaries):
    colour = noise(N, N, 3)
    how = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    image_of(colour.astype(np.uint8), "RGB").save(tmp_path / f"a.{suffix}", icc_profile=profile(2.2, primaries), **how)
    stored = np.asarray(Image.open(tmp_path / f"a.{suffix}").convert("RGB")).astype(float)
    assert np.abs(stored - as_srgb(stored, 2.2, primaries)).max() > 10
    check(tmp_path / f"a.{suffix}", as_srgb(stored, 2.2, primaries), levels=2)


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_of_another_gamma_becomes_srgb(tmp_path, bits):
    values = noise(N, N, high=2**bits)
    icc = io.BytesIO()
    Image.new("L", (1, 1)).save(icc, "PNG", icc_profile=profile(1.0))
    start = icc.getvalue().index(b"iCCP")
    chunk = icc.getvalue()[start + 4:start + 4 + struct.unpack(">I", icc.getvalue()[start - 4:start])[0]]
    values[0, :3] = 0, (2**bits - 1) // 100, 2**bits - 1
    wanted = encode(values / (2**bits - 1))
    check(write_png(tmp_path / "a.png", values, bits, GREY, {b"iCCP": chunk}), wanted, levels=1)


def test_alpha_stays_when_colours_are_converted(tmp_path):
    colour, alpha = hidden(3)
    image_of(np.dstack([colour, alpha]).astype(np.uint8), "RGBA").save(tmp_path / "a.png", icc_profile=profile(1.8, SRGB))
    check(tmp_path / "a.png", on_white(as_srgb(colour, 1.8, SRGB), alpha), levels=2)
    index = noise(N, N, high=16)
    image = image_of(index.astype(np.uint8), "P")
    image.putpalette(colour.reshape(-1, 3)[:16].astype(np.uint8).tobytes())
    image.save(tmp_path / "b.png", icc_profile=profile(1.8, SRGB), transparency=3)
    wanted = as_srgb(colour.reshape(-1, 3)[index], 1.8, SRGB)
    wanted[index == 3] = 255
    check(tmp_path / "b.png", wanted, levels=2)


def test_an_rgb_profile_on_grey(tmp_path):
    grey = noise(N, N)
    image_of(grey.astype(np.uint8), "L").save(tmp_path / "a.jpg", quality=100, icc_profile=profile(1.8, SRGB))
    stored = np.asarray(Image.open(tmp_path / "a.jpg")).astype(float)
    check(tmp_path / "a.jpg", as_srgb(np.repeat(stored[..., None], 3, -1), 1.8, SRGB), levels=2)


def test_cmyk_with_the_profile_of_a_press(tmp_path):
    lightness = np.sort(noise(16))[::-1].reshape(2, 2, 2, 2).copy()
    lightness[0, 0, 0, 0], lightness[1, 1, 1, 1] = 255, 0  # paper and black are sRGB's: the intent has nothing to adapt
    inks = np.zeros((4, 4, 4), np.uint8)
    inks.reshape(16, 4)[:] = np.indices((2, 2, 2, 2)).reshape(4, 16).T * 255
    pixels = np.kron(inks, np.ones((2, 2, 1))).astype(np.uint8)
    image_of(pixels, "CMYK").save(tmp_path / "a.tif", icc_profile=press(lightness))
    grey = np.kron(of_lightness(lightness.reshape(4, 4) * (100 / 255)), np.ones((2, 2)))
    check(tmp_path / "a.tif", grey, levels=2)
    blocks = image_of(np.full((N, N, 4), (0, 255, 0, 0), np.uint8), "CMYK")
    blocks.save(tmp_path / "b.jpg", quality=100, icc_profile=press(lightness))
    check(tmp_path / "b.jpg", np.full((N, N), of_lightness(lightness[0, 1, 0, 0] * (100 / 255))), levels=2)


def test_srgb_itself_changes_nothing(tmp_path):
    colour = noise(N, N, 3)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image_of(colour.astype(np.uint8), "RGB").save(tmp_path / "a.png", icc_profile=icc)
    check(tmp_path / "a.png", colour)


@pytest.mark.parametrize("icc", [b"no profile at all", profile(2.2), profile(2.2, P3)[:200]], ids=["junk", "grey", "torn"])
def test_a_profile_that_cannot_be_used_is_ignored_and_it_is_said(tmp_path, icc):
    colour = noise(N, N, 3)
    image_of(colour.astype(np.uint8), "RGB").save(tmp_path / "a.png", icc_profile=icc)
    check(tmp_path / "a.png", colour, notes=[picture.BAD_PROFILE])


@pytest.mark.parametrize(("gamma", "chunks", "notes"), [
    (100000, {}, [picture.GAMMA]), (45455, {}, []), (45000, {}, []), (100000, {b"sRGB": b"\0"}, []),
])
def test_gamma_is_not_applied_and_it_is_said(tmp_path, gamma, chunks, notes):
    values = noise(N, N)
    check(write_png(tmp_path / "a.png", values, 8, GREY, {b"gAMA": struct.pack(">I", gamma), **chunks}), values, notes=notes)
