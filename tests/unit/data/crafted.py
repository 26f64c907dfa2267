"""PNG and TIFF files written byte by byte from arrays, in kinds that Pillow itself does not write."""

import struct
import zlib
from pathlib import Path

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types
TYPES = {"ascii": 2, "short": 3, "long": 4}


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


def write_tiff(path: Path, pixels: bytes, width: int, height: int, order: str = "<", **tags: tuple | None) -> Path:
    """pixels: one strip. tags: by number as t262=(1,), shorts; None leaves a usual one out."""
    usual = {"t256": (width,), "t257": (height,), "t258": (8,), "t259": (1,), "t262": (1,), "t273": (0,), "t277": (1,),
             "t278": (height,), "t279": (len(pixels),)}
    entries = {int(name[1:]): values for name, values in {**usual, **tags}.items() if values is not None}
    first, data = 8, b""
    start = first + 2 + 12 * len(entries) + 4
    sizes = {number: 2 * len(values) for number, values in entries.items()}
    pixels_at = start + sum(size for size in sizes.values() if size > 4)
    entries[273] = (pixels_at,)
    directory = struct.pack(f"{order}H", len(entries))
    for number, values in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            packed, data = struct.pack(f"{order}I", start + len(data)), data + packed
        directory += struct.pack(f"{order}HHI", number, TYPES["short"], len(values)) + packed.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(magic + struct.pack(f"{order}I", first) + directory + b"\0\0\0\0" + data + pixels)
    return path
