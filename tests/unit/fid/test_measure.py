"""Numbers of the table from features made by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tasks.core.quality import Gaussian, features, fid, paired_bootstrap
from tasks.fid import measure
from tasks.fid.measure import Judge, Seen

RNG = np.random.default_rng(0)
HOLDOUT = RNG.standard_normal((300, 4))
JUDGE = Judge(None, HOLDOUT, np.arange(300) % 3, Gaussian.of(HOLDOUT))


def test_distribution_names_the_sample_count_and_the_share_of_right_classes():
    logits = np.eye(3)[[0, 1, 2, 0] * 50]
    numbers = measure.distribution(Seen(RNG.standard_normal((200, 4)), logits), JUDGE, np.arange(200) % 4 % 3)
    assert set(numbers) == {"fid_200", "kid", "precision", "recall", "class_accuracy"}
    assert numbers["class_accuracy"] == 1.0
    assert "class_accuracy" not in measure.distribution(Seen(HOLDOUT, logits), JUDGE, None)
    unlabelled = replace(JUDGE, labels=None)
    assert "class_accuracy" not in measure.distribution(Seen(HOLDOUT, logits), unlabelled, np.arange(300) % 3)


def test_fidelity_is_in_units_of_doubled_steps():
    dense = np.zeros((6, 4))
    found = {"dense": dense, "cache": dense + [3, 0, 0, 0], "few": dense + [0, 4, 0, 0]}
    twins = {"cache": np.zeros((5, 4)) + [2, 0, 0, 0]}
    numbers = measure.fidelities(found, twins, finer=np.zeros((5, 4)) + [0, 0, 2, 0])
    assert numbers == {"dense": {"fidelity": 0.0}, "few": {"fidelity": 2.0},
                       "cache": {"fidelity": 1.5, "fidelity_same_solver": 0.5}}


def test_fidelity_without_a_unit_is_an_error():
    with pytest.raises(ValueError, match="no unit to measure in"):
        measure.fidelities({"dense": np.zeros((6, 4))}, {}, np.zeros((5, 4)))


def test_losses_tell_equal_from_worse_with_one_correction_for_all():
    dense = RNG.standard_normal((400, 4)) + 0.3
    found = {"dense": dense, "same": dense + 1e-3, "dull_best": dense * 1.01, "compressed": dense + 0.5}
    numbers = measure.losses(found, JUDGE, np.arange(400) % 10, 0.05, 200, np.random.default_rng(1))
    assert set(numbers["dense"]) == {"fid_sd"} and numbers["dense"]["fid_sd"] > 0
    same, compressed = numbers["same"], numbers["compressed"]
    assert abs(same["loss"]) < 0.01 and same["loss_upper95"] < 0.05 and same["loss_p_holm"] < 0.01
    assert compressed["loss"] > 1 and compressed["loss_p_holm"] == pytest.approx(1)
    assert compressed["loss_to_dull_best_upper95"] > compressed["loss_to_dull_best"] > 1
    assert "loss_to_dull_best" not in same


def test_loss_above_real_takes_the_floor_off_both():
    dense = RNG.standard_normal((400, 4)) + 0.3
    found = {"dense": dense, "compressed": dense + 0.1}
    numbers = measure.losses(found, JUDGE, None, 0.05, 20, np.random.default_rng(1), real=0.2)
    fids = {name: fid(x, JUDGE.reference) for name, x in found.items()}
    assert numbers["dense"]["fid_real"] == 0.2
    above = (fids["compressed"] - 0.2) / (fids["dense"] - 0.2) - 1
    assert numbers["compressed"]["loss_above_real"] == pytest.approx(above) and above > numbers["compressed"]["loss"]
    assert "loss_above_real" not in measure.losses(found, JUDGE, None, 0.05, 20, np.random.default_rng(1), 9.9)["compressed"]


def test_the_holdouts_own_noise_is_in_the_bound():
    """However many samples: a difference is no more certain than the holdout that both are compared with."""
    dense, worse = RNG.standard_normal((20_000, 4)), RNG.standard_normal((20_000, 4)) * 1.05
    found = measure.losses({"dense": dense, "worse": worse}, JUDGE, None, 0.05, 100, np.random.default_rng(1))["worse"]
    alone = paired_bootstrap(worse, dense, JUDGE.reference, 100, np.random.default_rng(1))
    assert found["loss"] == alone.estimate and found["loss_upper95"] - found["loss"] > 2 * 1.6449 * alone.error


def test_real_images_are_scored_with_as_many_of_each_class():
    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1), x.flatten(1)

    images = np.repeat(np.arange(4, dtype=np.uint8) * 60, 50)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    labels = np.repeat(np.arange(4), 50)
    seen = features(Flat(), images)
    judge = Judge(Flat(), seen, labels, Gaussian.of(seen))
    order = np.random.default_rng(0).permutation(200)
    assert measure.real_fid(images[order], labels[order], 40, judge) == pytest.approx(0, abs=0.05)
    assert measure.real_fid(images, labels, 201, judge) is None


def test_memorised_samples_are_seen_in_pixels():
    train, holdout = (RNG.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8) for n in (60, 20))
    assert measure.memorised(train[:10], train, holdout, np.random.default_rng(0))["memorised"] == 1.0
    white, black = np.full((1, 1, 4, 4), 255, np.uint8), np.zeros((3, 1, 4, 4), np.uint8)
    assert measure.memorised(white, black, black, np.random.default_rng(0))["nn_holdout"] == 4.0  # 16 pixels, each 1 away
