"""The folder of emoji, from packages of a few drawings of our own."""

import csv
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from examples.emoji import make


def drawing(**changed) -> make.Drawing:
    return make.Drawing(**{"vendor": "google", "code": "1F44D", "base": "1F44D", "kind": "hands", "pixels": b"", **changed})


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG")
    return file.getvalue()


def test_four_pixels_on_white_become_their_mean():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 4), np.uint8)
    alpha = pixels[..., 3:] / 255
    on_white = pixels[..., :3] * alpha + 255 * (1 - alpha)
    wanted = on_white.reshape(32, 2, 32, 2, 3).mean((1, 3))
    found = np.frombuffer(make.render(png(pixels)), np.uint8).reshape(32, 32, 3)
    assert np.abs(found - wanted).max() <= 1.5  # rounded three times


@pytest.mark.parametrize(("one", "other"), [
    ("1F9D1-200D-1F692", "1F468-200D-1F692"),           # firefighter; man firefighter
    ("1F3C3", "1F3C3-200D-2640-FE0F-200D-27A1-FE0F"),   # person running; woman running facing right
    ("1F9D1", "1F469-200D-1F9B0"),                      # person; woman with red hair
])
def test_variants_of_one_emoji_are_one_group(one, other):
    assert drawing(base=one).group == drawing(base=other).group


def test_other_emoji_are_other_groups():
    bases = ("2640-FE0F", "2642-FE0F", "27A1-FE0F", "1F1EA-1F1EC", "1F1EA-1F1EA", "1F44D", "1F44E")
    assert len({drawing(base=base).group for base in bases}) == len(bases)


def test_every_emoji_is_drawn_once_before_one_is_drawn_in_a_second_tone():
    drawings = [drawing(base=base, code=f"{base}-{tone}") for base in "abcd" for tone in range(6)]
    assert sorted(d.base for d in make.choose(drawings, 4)) == list("abcd")
    assert sorted(d.base for d in make.choose(drawings, 8)) == list("aabbccdd")
    assert len(make.choose(drawings, 100)) == 24


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Both vendors: a hand of two tones, a cat, a flag drawn twice, a couple of two tones, a bare skin tone."""
    colours = {"hand.png": 10, "hand-1.png": 20, "hand-2.png": 30, "cat.png": 40, "flag.png": 50, "same.png": 50,
               "pair.png": 60, "pair-12.png": 70, "tone.png": 80}
    tones = {f"1F3F{letter}": {"unified": f"270B-1F3F{letter}", "image": f"hand-{i}.png"} for i, letter in ((1, "B"), (2, "C"))}
    emoji = [
        {"unified": "270B", "category": "People & Body", "subcategory": "hands", "image": "hand.png", "skin_variations": tones},
        {"unified": "1F408", "category": "Animals & Nature", "subcategory": "animal-mammal", "image": "cat.png"},
        {"unified": "1F1F3-1F1F4", "category": "Flags", "subcategory": "country-flag", "image": "flag.png"},
        {"unified": "1F1E7-1F1FB", "category": "Flags", "subcategory": "country-flag", "image": "same.png"},
        {"unified": "1F46B", "category": "People & Body", "subcategory": "family", "image": "pair.png",
         "skin_variations": {"1F3FB-1F3FC": {"unified": "1F46B-X", "image": "pair-12.png"}}},
        {"unified": "1F3FB", "category": "Component", "subcategory": "skin-tone", "image": "tone.png"}]
    for i, vendor in enumerate(make.PACKAGES):
        path = tmp_path / f"emoji-datasource-{vendor}-{make.VERSION}.tgz"
        with tarfile.open(path, "w:gz") as archive:
            files = {"emoji.json": json.dumps(emoji).encode()}
            files |= {f"img/{vendor}/64/{name}": png(np.full((64, 64, 4), (value + i, 0, 0, 255), np.uint8))
                      for name, value in colours.items()}
            for name, content in files.items():
                entry = tarfile.TarInfo(f"package/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        monkeypatch.setitem(make.PACKAGES, vendor, hashlib.sha512(path.read_bytes()).hexdigest())
    return tmp_path


def test_the_folder_holds_each_drawing_once_with_its_group(packages, capsys):
    make.main(packages / "set", packages)
    rows = list(csv.reader((packages / "set" / "groups.csv").read_text().splitlines()))
    names = ["animals/{}-1f408.png", "flags/{}-1f1f3-1f1f4.png", "hands/{}-270b-1f3fb.png", "hands/{}-270b-1f3fc.png",
             "hands/{}-270b.png", "people/{}-1f46b.png"]
    assert [row[0] for row in rows[1:]] == sorted(name.format(vendor) for name in names for vendor in make.PACKAGES)
    assert len({group for _, group in rows[1:]}) == 4 and "12 of 14 drawings, 4 emoji" in capsys.readouterr().out
    image = np.asarray(Image.open(packages / "set" / "hands" / "twitter-270b-1f3fb.png"))
    assert image.shape == (32, 32, 3) and (image == (21, 0, 0)).all()
    with pytest.raises(ValueError, match="set exists; name a new folder"):
        make.main(packages / "set", packages)


def test_another_package_is_refused_by_its_hash(packages):
    path = packages / f"emoji-datasource-google-{make.VERSION}.tgz"
    path.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"google-16.0.0.tgz: SHA-512 is \S+..., not "):
        make.main(packages / "set", packages)


def test_a_package_that_npm_cannot_fetch_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="emoji-datasource-google-16.0.0.tgz: not in .*, and npm cannot fetch it"):
        make.main(tmp_path / "set", tmp_path)
