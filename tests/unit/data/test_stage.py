"""The whole stage on real digits, 8 x 8."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest

from tasks.core.artifacts import Inputs, read_json
from tasks.core.quality import Gaussian, features
from tasks.data import stage
from tasks.data.features import load_feature_net, load_reference

PARAMS = stage.Params(source="digits", path=None, side=8, channels=1, holdout=297, seed=0, epochs=6, batch=64, lr=4e-3,
                      judge="small", inception=None)


def run(params: stage.Params, out):
    out.mkdir()
    with contextlib.chdir(out.parent):  # where its checkpoints go
        return stage.run(params, Inputs({}, "key"), out).numbers


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("stage") / "data"
    return out, run(PARAMS, out)


def test_splits_and_labels_belong_together(artifact):
    out, numbers = artifact
    train, holdout = np.load(out / "train.npy"), np.load(out / "holdout.npy")
    assert train.shape == (1500, 1, 8, 8) and holdout.shape == (297, 1, 8, 8) and train.dtype == np.uint8
    assert np.load(out / "train_labels.npy").shape == (1500,) and numbers["num_classes"] == 10
    assert read_json(out / "data.json")["num_classes"] == 10


def test_both_nets_judge_digits_they_never_saw(artifact):
    _, numbers = artifact
    assert numbers["search"]["class_accuracy"] > 0.93 and numbers["report"]["class_accuracy"] > 0.93


def test_real_images_score_far_below_noise(artifact):
    out, numbers = artifact
    net, reference = load_feature_net(out, "report"), load_reference(out, "report")
    noise = np.random.default_rng(0).integers(0, 256, (200, 1, 8, 8), dtype=np.uint8)
    found = features(net, noise)
    assert numbers["report"]["fid_1k_real"] < 3 < 30 < stage.fid(found, reference)


def test_reference_statistics_are_the_holdouts(artifact):
    out, _ = artifact
    wanted = Gaussian.of(features(load_feature_net(out, "search"), np.load(out / "holdout.npy")))
    found = load_reference(out, "search")
    assert np.array_equal(found.mu, wanted.mu) and np.array_equal(found.sigma, wanted.sigma)


def test_a_folder_without_labels_learns_turns(tmp_path, artifact):
    from PIL import Image
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(np.load(artifact[0] / "train.npy")[:200, 0]):
        Image.fromarray(image).save(images / f"{i:03d}.png")
    params = replace(PARAMS, source="folder", path=str(images), holdout=50, epochs=1)
    numbers = run(params, tmp_path / "data")
    assert 0 <= numbers["report"]["turn_accuracy"] <= 1 and numbers["num_classes"] == 0
    assert not (tmp_path / "data" / "train_labels.npy").exists()
    assert "fid_150_real" in numbers["report"]


def test_images_in_both_splits_are_counted():
    images = np.arange(8, dtype=np.uint8).reshape(4, 1, 1, 2)
    assert stage.shared(images[:2], images[1:]) == 1


@pytest.mark.parametrize(("key", "value", "message"), [
    ("source", "mnist", "data.source: 'mnist' is not one of mnist5k, digits, folder"),
    ("source", "folder", "data.path: None is not a folder"),
    ("channels", 2, "data.channels: '2' is not one of 1, 3"),
    ("holdout", 1, "data.holdout: 1 is not between 10"),
    ("inception", "nowhere.pt", "data.inception: nowhere.pt is not a file"),
])
def test_a_users_mistake_names_key_value_and_bound(key, value, message):
    with pytest.raises(ValueError, match=message):
        replace(PARAMS, **{key: value})
