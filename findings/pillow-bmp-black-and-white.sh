#!/bin/sh
# Pillow reads an 8-bit BMP whose palette is black and white alone as if it had 1 bit a pixel; its own writer makes such files.
#
# Version: Pillow 13.0.0, numpy 2.4.6.
# Expected (our guess): a picture of two colours that Pillow writes as BMP comes back as it was; PNG does, and so does a BMP
# whose two colours are red and blue, or white and black in that order.
# Seen: with black first and white second, mode "1", and the bytes of 8-bit indices are taken for the bits of pixels: a picture
# of random black and white comes back with the wrong value in about half of its pixels.
# Exit status: 0 while this holds, 1 when it changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from PIL import Image

index = np.random.default_rng(0).integers(0, 2, (64, 64)).astype(np.uint8)

def wrong(palette, name):
    image = Image.fromarray(index).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(palette)
    image.save(name)
    back = Image.open(name)
    return round(float((np.asarray(back.convert("RGB")) != np.asarray(image.convert("RGB"))).mean()), 2), back.mode

black_white = [0, 0, 0, 255, 255, 255]
seen = {"BMP, black and white": wrong(black_white, "a.bmp"), "PNG, black and white": wrong(black_white, "a.png"),
        "BMP, white and black": wrong(black_white[::-1], "b.bmp"), "BMP, red and blue": wrong([255, 0, 0, 0, 0, 255], "c.bmp")}
for line, (share, mode) in seen.items():
    print(f"{line}: mode {mode}, share of wrong values {share}")
shares = [share for share, _ in seen.values()]
raise SystemExit(not (shares[0] > 0.4 and shares[1:] == [0, 0, 0]))
PYTHON
