#!/bin/sh
# Pillow reads some valid TIFFs with PlanarConfiguration 2 (each channel in a strip of its own) as other pictures, without an error.
#
# Version: Pillow 13.0.0 (its libtiff 4.7.2), numpy 2.4.6, tifffile 2026.3.3 as the independent writer and reader.
# Expected (our guess, from the TIFF 6.0 specification, "PlanarConfiguration"): the pixels that were written, or an exception.
# Seen:
#   16-bit RGB, no compression    every pixel wrong: each 16-bit strip is unpacked as one of 8 bits ("RGB;16L"[layer] is "R")
#   16-bit RGB, deflate           right
#   8-bit grey + alpha, deflate   grey right, alpha 0 everywhere, so the picture is invisible
#   32-bit float, big-endian, deflate (in one plane): bytes swapped, 1.0 becomes 4.6e-41
# Exit status: 0 while this holds, 1 when one of the lines above changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 numpy==2.4.6 tifffile==2026.3.3
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np, tifffile
from PIL import Image

rng = np.random.default_rng(0)

def as_pillow(array, **how):
    tifffile.imwrite("a.tif", array, metadata=None, **how)
    assert (tifffile.imread("a.tif") == array).all()
    return np.asarray(Image.open("a.tif"))

colour = (rng.integers(0, 256, (3, 32, 32)) * 257).astype(np.uint16)  # both bytes of a value are the same
wanted = np.moveaxis(colour, 0, -1) >> 8
plain, packed = (as_pillow(colour, photometric="rgb", planarconfig="separate", compression=c) for c in (None, "zlib"))
grey = rng.integers(1, 256, (2, 32, 32)).astype(np.uint8)
found = as_pillow(grey, photometric="minisblack", planarconfig="separate", extrasamples=["unassalpha"], compression="zlib")
floats = as_pillow(np.ones((32, 32), ">f4"), byteorder=">", compression="zlib")

seen = {
    "16-bit RGB, no compression: share of right values": round(float((plain == wanted).mean()), 2),
    "16-bit RGB, deflate: share of right values": float((packed == wanted).mean()),
    "grey + alpha, deflate: grey right": bool((found[..., 0] == grey[0]).all()),
    "grey + alpha, deflate: largest alpha": int(found[..., 1].max()),
    "big-endian float 1.0, deflate": float(floats.max()),
}
for line, value in seen.items():
    print(f"{line}: {value}")
share, right, grey_right, alpha, one = seen.values()
raise SystemExit(not (share < 0.05 and right == 1 and grey_right and alpha == 0 and 0 < one < 1e-40))
PYTHON
