"""PNG, TIFF and BMP files written byte by byte from arrays, in kinds that Pillow itself does not write, and what a picture is
compared with."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.data.picture import read_picture

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types
SHORT = 3  # TIFF's type of 16 bits
N = 8  # pixels a side: read at their own size, pictures are not resized
LUMA = np.array([0.299, 0.587, 0.114])


def write_png(path: Path, rows: np.ndarray, bits: int, colour: int, chunks: dict[bytes, bytes] | None = None) -> Path:
    """rows: (H, W) or (H, W, C) values of `bits` bits each."""
    height, width = rows.shape[:2]
    if bits == 16:
        packed = rows.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        parts = np.unpackbits(rows.astype(np.uint8).reshape(height, -1, 1), axis=2)[:, :, 8 - bits:]
        packed = np.packbits(parts.reshape(height, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in packed)
    body = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), *(chunks or {}).items(),
            (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in body))
    return path


def write_tiff(path: Path, strips: bytes | list[bytes], width: int, height: int, order: str = "<",
               **tags: tuple | None) -> Path:
    """strips: one, or one a channel. tags: shorts by number, as t262=(1,); None leaves a usual one out."""
    strips = [strips] if isinstance(strips, bytes) else strips
    usual = {"t256": (width,), "t257": (height,), "t258": (8,), "t259": (1,), "t262": (1,), "t277": (1,), "t278": (height,),
             "t279": tuple(map(len, strips))}
    entries = {int(name[1:]): values for name, values in {**usual, **tags}.items() if values is not None}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    beside = sum(2 * len(values) for values in [*entries.values(), strips] if len(values) > 2)
    entries[273] = tuple(start + beside + sum(map(len, strips[:i])) for i in range(len(strips)))
    directory, data = struct.pack(f"{order}H", len(entries)), b""
    for number, values in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            packed, data = struct.pack(f"{order}I", start + len(data)), data + packed
        directory += struct.pack(f"{order}HHI", number, SHORT, len(values)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    path.write_bytes(head + directory + bytes(4) + data + b"".join(strips))
    return path


def write_bmp(path: Path, index: np.ndarray, bits: int, palette: list[tuple[int, int, int]]) -> Path:
    """index: (H, W) into the palette, whose length the header tells."""
    parts = np.unpackbits(index.astype(np.uint8)[..., None], axis=2)[:, :, 8 - bits:]
    rows = [np.packbits(row.ravel()).tobytes() for row in parts[::-1]]
    pixels = b"".join(row + bytes(-len(row) % 4) for row in rows)
    colours = b"".join(bytes([blue, green, red, 0]) for red, green, blue in palette)
    start = 54 + len(colours)
    path.write_bytes(b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + struct.pack(
        "<IiiHHIIiiII", 40, *index.shape[::-1], 1, bits, 0, len(pixels), 0, 0, len(palette), 0) + colours + pixels)
    return path


def noise(*shape: int, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape)


def image_of(array: np.ndarray, mode: str) -> Image.Image:
    return Image.frombytes(mode, array.shape[1::-1], np.ascontiguousarray(array).tobytes())


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """colour (H, W, C), alpha (H, W) in 0..255."""
    share = (alpha / 255)[..., None]
    return colour * share + 255 * (1 - share)


def check(file, wanted: np.ndarray, levels: float = 0.5, notes: tuple = ()) -> None:
    """wanted: (H, W) grey or (H, W, 3), 0..255, not rounded; read as colour and as grey."""
    colour = np.repeat(wanted[..., None], 3, -1) if wanted.ndim == 2 else wanted
    found, said = read_picture(file, N, 3)
    assert found.dtype == np.uint8 and said == list(notes)
    assert np.abs(found.transpose(1, 2, 0) - colour).max() <= levels + 1e-3
    grey = colour @ LUMA
    assert np.abs(read_picture(file, N, 1)[0][0] - grey).max() <= levels + 1 + 1e-3


def encode(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, 0..1 -> 0..255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def of_lightness(lightness: np.ndarray) -> np.ndarray:
    """CIE 1976 L of a neutral colour, 0..100 -> sRGB, 0..255."""
    return encode(np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3))


def hidden(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours and alpha; where alpha is 0 the colours are not."""
    colour, alpha = noise(N, N, channels), noise(N, N, seed=1)
    alpha[:3], alpha[3:5] = 0, 255
    return colour, alpha
