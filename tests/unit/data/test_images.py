"""Folders of images, split and the mistakes a user makes with them."""

import numpy as np
import pytest
from PIL import Image

from tasks.data.images import load_images, split


@pytest.fixture
def folder(tmp_path):
    for name, shade in (("cat", 10), ("dog", 200)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (20 + i, 12), (shade, shade, 0)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_sub_folders_are_classes_in_sorted_order(folder):
    images, labels = load_images("folder", str(folder), 8, 3)
    assert images.shape == (6, 3, 8, 8) and images.dtype == np.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (images[0, :, 4, 4] == [10, 10, 0]).all() and (images[5, :, 4, 4] == [200, 200, 0]).all()


def test_a_flat_folder_has_no_labels(folder):
    images, labels = load_images("folder", str(folder / "cat"), 8, 1)
    assert images.shape == (3, 1, 8, 8) and labels is None


def test_every_unreadable_file_is_named_at_once(folder):
    (folder / "cat" / "torn.png").write_bytes((folder / "cat" / "0.png").read_bytes()[:60])
    (folder / "dog" / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"2 of 8 files.*torn\.png.*text\.jpg"):
        load_images("folder", str(folder), 8, 3)


@pytest.mark.parametrize("path", [None, "nowhere"])
def test_a_folder_that_is_none_is_named(path):
    with pytest.raises(ValueError, match=f"data.path: {path} is not a folder"):
        load_images("folder", path, 8, 3)


def test_an_empty_folder_says_what_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"holds no image \(.bmp, .jpeg"):
        load_images("folder", str(tmp_path), 8, 3)


def test_grey_sources_are_repeated_over_channels_and_resized():
    images, labels = load_images("digits", None, 12, 3)
    assert images.shape == (1797, 3, 12, 12) and labels.max() == 9
    assert (images[:, 0] == images[:, 2]).all()


def test_split_is_stratified_complete_and_the_seeds_own():
    labels = np.repeat([0, 1], [80, 20])
    train, held = split(labels, 100, 10, seed=1)
    assert sorted([*train, *held]) == list(range(100))
    assert np.bincount(labels[held]).tolist() == [8, 2]
    assert (held == split(labels, 100, 10, seed=1)[1]).all() and (held != split(labels, 100, 10, seed=2)[1]).any()


@pytest.mark.parametrize(("labels", "holdout", "message"), [
    (None, 10, r"data.holdout: 10 is not between 1 and 9 \(10 images, 1 classes\)"),
    (np.array([0, 1] * 5), 1, r"data.holdout: 1 is not between 2 and 8"),
    (np.array([0] * 9 + [1]), 4, r"class 1 has 1 image"),
    (np.array([0] * 8 + [1] * 2), 8, r"data.holdout: 8 of 10 images leaves none of class 1, of which there are 2, to train on"),
])
def test_an_impossible_split_names_the_bound(labels, holdout, message):
    with pytest.raises(ValueError, match=message):
        split(labels, 10, holdout, seed=0)
