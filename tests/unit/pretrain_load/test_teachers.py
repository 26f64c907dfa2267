"""The folders that ship: they load, they are small, and their cards say what card.json measured."""

import csv
import re

import numpy as np
import pytest
from PIL import Image

from tasks.core import denoiser as denoisers
from tasks.core.artifacts import read_json
from tasks.pretrain_load.ship import TEACHERS

FOLDERS = sorted(path.parent for path in TEACHERS.glob("*/model_index.json"))
SHAPES = {"mnist_dit": ((1, 28, 28), 10), "mnist_unet": ((1, 28, 28), 0), "emoji_dit": ((3, 32, 32), 10)}
BYTES = 8e6


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def test_it_loads_with_the_shape_that_the_readme_says_and_is_small(folder):
    teacher = denoisers.load(folder)
    assert (teacher.sample_shape, teacher.num_classes) == SHAPES[folder.name]
    assert sum(p.numel() for p in teacher.model.parameters()) == read_json(folder / "card.json")["parameters"]
    assert sum(path.stat().st_size for part in ("transformer", "unet")  # beside a student, if it has one
               for path in folder.glob(f"{part}/*.safetensors")) <= BYTES


def test_the_cards_numbers_are_those_that_were_measured(folder):
    measured, card = read_json(folder / "card.json"), (folder / "README.md").read_text()
    rows = dict(re.findall(r"^\| (\w[\w ]*) \| ([-+]?[\d.]+)\b", card, re.MULTILINE))
    names = {"nearest training image": "nn_train", "nearest holdout image": "nn_holdout", "memorisation": "memorised"}
    found = {names.get(key, key): float(value) for key, value in rows.items()
             if key not in ("seed", "last loss")}
    assert {"nn_train", "nn_holdout", "memorised", "fid_1k", "fid_1k_real"} <= set(found)
    assert found == {key: pytest.approx(measured[key], abs=5e-4) for key in found}
    assert f"{measured['parameters']:,} parameters" in card and f"({measured['train_images']:,} images" in card


def test_the_cards_last_loss_ends_the_curve(folder):
    with open(folder / "curve.csv", newline="") as file:
        step, loss = list(csv.reader(file))[-1]
    assert f"| last loss | {float(loss):.4f} after {int(step):,} steps" in (folder / "README.md").read_text()


def test_the_cards_picture_shows_eighty_samples(folder):
    channels, side, _ = SHAPES[folder.name][0]
    picture = np.asarray(Image.open(folder / "samples.png"))
    assert picture.shape[:2] == (4 * side * 2, 20 * side * 2) and picture.ndim == (2 if channels == 1 else 3)
