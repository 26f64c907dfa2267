"""A teacher is judged beside as many real images: real digits pass, noise and one digit again and again do not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tasks.core.artifacts import read_json
from tasks.core.quality import Gaussian, features
from tasks.core.teacher import doubt
from tasks.data.features import NETS, FeatureNet, save_feature_net
from tasks.pretrain_load.stage import judge
from tests.contract.reading import ROOT


@pytest.fixture(scope="module")
def digits():
    """uint8 (1797, 1, 8, 8), in no order of classes."""
    return (load_digits().images * 15.9375).astype(np.uint8)[np.random.default_rng(0).permutation(1797), None]


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    """What the data stage leaves, with a feature net that learned nothing: random features tell noise from digits, too."""
    folder = tmp_path_factory.mktemp("data")
    config = NETS["report"] | {"channels": 1, "classes": 4}
    torch.manual_seed(0)
    net = FeatureNet(**config).eval()
    save_feature_net(net, folder, "report")
    (folder / "data.json").write_text(f'{{"feature_nets": {{"report": {str(config).replace(chr(39), chr(34))}}}}}')
    np.save(folder / "train.npy", digits[:800])
    np.save(folder / "holdout.npy", digits[800:1200])
    reference = Gaussian.of(features(net, digits[800:1200]))
    for part in ("mu", "sigma"):
        np.save(folder / f"reference_report_{part}.npy", getattr(reference, part))
    return folder


def bank_of(kind, digits):
    rng, own = np.random.default_rng(1), digits[1200:1500]
    if kind == "digits":
        return own
    if kind == "noise":
        return rng.integers(0, 256, own.shape, dtype=np.uint8)
    return np.clip(own[:1] + rng.normal(0, 4, own.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind, why", [
    ("digits", []), ("noise", ["its fid_300 is", "its recall is"]), ("one digit", ["its fid_300 is", "its recall is"])])
def test_what_the_stage_measures_decides(kind, why, digits, data):
    numbers = judge(bank_of(kind, digits), None, data)
    assert set(numbers) == {f"{name}{of}" for name in ("fid_300", "precision", "recall") for of in ("", "_real")}
    said = doubt(numbers)
    assert (said is not None) == bool(why) and all(part in said for part in why)
    if said:
        assert said.startswith("The teacher is not worth compressing: its fid_300 is ") and "\n" not in said


def test_few_images_have_no_recall_and_say_nothing_of_it(digits, data):
    assert set(judge(digits[1200:1203], None, data)) == {"fid_3", "fid_3_real"}


@pytest.mark.parametrize("folder", ["reports/quick", "reports/full"])
def test_the_shipped_teacher_passes_with_a_margin(folder):
    numbers = read_json(ROOT / folder / "pretrain_load.json")
    assert doubt(numbers) is None
    assert doubt(numbers | {"fid_1k": 2 * numbers["fid_1k"]}) is None


@pytest.mark.parametrize("teacher", ["mnist_dit", "mnist_unet"])
def test_the_cards_of_both_teachers_pass(teacher):
    card = read_json(Path(ROOT, "tasks/pretrain_load/teachers", teacher, "card.json"))
    assert doubt(card) is None and doubt(card | {"fid_1k": 2 * card["fid_1k"]}) is None


def test_the_teacher_of_120_steps_does_not():
    """What a user met: FID 53 where real images score 0.33."""
    assert "its fid_1k is 53, where as many real images score 0.33 and 20 times that is the most" in doubt(
        {"fid_1k": 53.0, "fid_1k_real": 0.33})


def test_each_bound_by_hand():
    real = {"fid_1k_real": 0.2, "recall_real": 0.9}
    assert doubt({"fid_1k": 4.0, "recall": 0.45, **real}) is None
    assert doubt({"fid_1k": 4.1, "recall": 0.45, **real}) is not None
    assert "its recall is 0.440, where as many real images have 0.900" in doubt({"fid_1k": 4.0, "recall": 0.44, **real})
    assert doubt({}) is None and doubt({"fid_1k": 50.0}) is None
