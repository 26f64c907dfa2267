"""`python -m examples.emoji.make OUT`: emoji of two vendors, 64 x 64, into an image folder of 32 x 32 RGB for stage `data`.

Reads two npm packages, fetched with `npm pack` unless --packages names a folder that holds them: emoji-datasource-google
(artwork: Noto Emoji, Apache-2.0) and emoji-datasource-twitter (artwork: Twemoji, CC-BY 4.0). Both are pinned by their
hashes. Writes OUT/<class>/<vendor>-<code points>.png, and OUT/groups.csv, which keeps all drawings of one emoji on one
side of the split. OUT/NOTICE.md says whose the artwork is. Nothing is random: the same packages make the same folder.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

VERSION = "16.0.0"
NOTICE = f"""## Data: licences and attribution

The images are made of the artwork of two vendors by `python -m examples.emoji.make` (on white, 64 x 64 to 32 x 32):

- [Noto Emoji](https://github.com/googlefonts/noto-emoji), copyright Google LLC, Apache License 2.0, from the npm package
  `emoji-datasource-google` {VERSION}.
- [Twemoji](https://github.com/jdecked/twemoji), copyright 2019 Twitter, Inc and other contributors, graphics licensed under
  [CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/), from the npm package `emoji-datasource-twitter` {VERSION}; changed:
  scaled, and laid on white.

The packages themselves (Cal Henderson, emoji-data) are MIT. Emoji that differ in skin tone, gender, hair, direction or vendor
alone are one group and lie on one side of the split; equal pictures are there once.
"""
PACKAGES = {  # vendor -> SHA-512 of the npm package at VERSION
    "google": "6517b17f3b3b315a0b9e6cd998db0ee132a19c0269e43fbe566e8fa54a47fe31"
              "104257a6a7797cf028d9f83a19d9f68cf51e10c5990e3c90a84fc0e53e17d0dc",
    "twitter": "ec5fae0ae1c7fbb427adcd793f9b676ef2a483d13ab65ce2e0c9d3dae5b54653"
               "78a4b613cdae9c3ff76cb487d20ccb698c52d6b997b05a0f2305bb8bd9ec842d",
}
SIDE = 32
MOST = 400  # pictures of a class: samples have as many of each class, so the real ones should, nearly

# Unicode's categories, with what looks alike put together and the small ones merged. The five skin tones alone are left out.
CATEGORIES = {"Animals & Nature": "animals", "Flags": "flags", "Food & Drink": "food", "Activities": "activities",
              "Objects": "objects", "People & Body": "people", "Smileys & Emotion": "faces", "Symbols": "symbols",
              "Travel & Places": "travel"}
SUBCATEGORIES = {"clothing": "activities", "musical-instrument": "activities", "heart": "symbols", "emotion": "symbols",
                 "body-parts": "hands", "hands": "hands", "hand-single-finger": "hands", "hand-fingers-closed": "hands",
                 "hand-fingers-open": "hands", "hand-fingers-partial": "hands", "hand-prop": "hands"}

# What makes variants of one emoji: skin tones, genders, hair, direction, the presentation selector and the joiner.
VARIANT = re.compile("-?(1F3F[B-F]|2640|2642|1F9B[0-3]|27A1|FE0F|200D)")
PERSON = re.compile("1F46[89]|1F9D1")  # man, woman, adult


@dataclass(frozen=True)
class Drawing:
    vendor: str
    code: str    # code points, as Unicode's "unified"
    base: str    # of the emoji without a skin tone
    kind: str    # class
    pixels: bytes

    @property
    def file(self) -> str:
        return f"{self.kind}/{self.vendor}-{self.code.lower()}.png"

    @property
    def group(self) -> str:
        return PERSON.sub("1F9D1", VARIANT.sub("", self.base)).lower().strip("-") or self.base.lower()

    @property
    def draw(self) -> str:
        """A fixed random order."""
        return hashlib.sha256(self.file.encode()).hexdigest()


def fetch(vendor: str, folder: Path) -> Path:
    """The vendor's npm package, taken from `folder` or fetched into it. Raises ValueError when it is not the pinned one."""
    package = folder / f"emoji-datasource-{vendor}-{VERSION}.tgz"
    if not package.is_file():
        try:
            subprocess.run(["npm", "pack", "--silent", f"emoji-datasource-{vendor}@{VERSION}"], cwd=folder, check=True,
                           stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"{package.name}: not in {folder}, and npm cannot fetch it ({error})") from None
    found = hashlib.sha512(package.read_bytes()).hexdigest()
    if found != PACKAGES[vendor]:
        raise ValueError(f"{package}: SHA-512 is {found[:16]}..., not {PACKAGES[vendor][:16]}...")
    return package


def read_package(vendor: str, package: Path) -> Iterator[Drawing]:
    """Every emoji, and those of its variants that have one skin tone; of families and couples of several tones none."""
    with tarfile.open(package) as archive:
        for emoji in json.load(archive.extractfile("package/emoji.json")):
            kind = SUBCATEGORIES.get(emoji["subcategory"], CATEGORIES.get(emoji["category"]))
            tones = [e for tone, e in emoji.get("skin_variations", {}).items() if "-" not in tone]
            for drawn in (emoji, *tones) if kind else ():
                file = archive.extractfile(f"package/img/{vendor}/64/{drawn['image']}")
                yield Drawing(vendor, drawn["unified"], emoji["unified"], kind, render(file.read()))


def render(png: bytes) -> bytes:
    """On white, then the mean of the pixels that become one. -> RGB, SIDE x SIDE."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def distinct(drawings: Iterable[Drawing]) -> list[Drawing]:
    """The first of those that are equal pixel by pixel (flags of territories; families of any genders)."""
    first = {}
    for drawing in drawings:
        first.setdefault(drawing.pixels, drawing)
    return list(first.values())


def choose(drawings: list[Drawing], most: int = MOST) -> list[Drawing]:
    """At most `most` of each class: one tone of every emoji of every vendor, then a second one, in a fixed random order."""
    chosen = []
    for _, kind in groupby(sorted(drawings, key=lambda d: d.kind), key=lambda d: d.kind):
        ranked = []
        for _, tones in groupby(sorted(kind, key=lambda d: (d.vendor, d.base, d.draw)), key=lambda d: (d.vendor, d.base)):
            ranked += enumerate(tones)
        chosen += [drawing for _, drawing in sorted(ranked, key=lambda r: (r[0], r[1].draw))[:most]]
    return sorted(chosen, key=lambda d: d.file)


def main(out: Path, packages: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} exists; name a new folder")
    drawings = [drawing for vendor in PACKAGES for drawing in read_package(vendor, fetch(vendor, packages))]
    chosen = choose(distinct(drawings))
    for drawing in chosen:
        (out / drawing.kind).mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (SIDE, SIDE), drawing.pixels).save(out / drawing.file)
    with open(out / "groups.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("file", "group"), *((d.file, d.group) for d in chosen)])
    (out / "NOTICE.md").write_text(NOTICE)
    print(f"{out}: {len(chosen)} of {len(drawings)} drawings, {len({d.group for d in chosen})} emoji")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, help="a folder that holds both packages, or is to keep them")
    arguments = parser.parse_args()
    try:
        with TemporaryDirectory() as temporary:
            main(arguments.out, arguments.packages or Path(temporary))
    except ValueError as error:
        sys.exit(f"error: {error}")
