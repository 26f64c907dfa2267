"""Numbers of the table from features made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from tasks.core.quality import Gaussian
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
    features = {"dense": dense, "cache": dense + [3, 0, 0, 0], "few": dense + [0, 4, 0, 0]}
    twins = {"cache": np.zeros((5, 4)) + [2, 0, 0, 0]}
    numbers = measure.fidelities(features, twins, finer=np.zeros((5, 4)) + [0, 0, 2, 0])
    assert numbers == {"dense": {"fidelity": 0.0}, "few": {"fidelity": 2.0},
                       "cache": {"fidelity": 1.5, "fidelity_same_solver": 0.5}}


def test_fidelity_without_a_unit_is_an_error():
    with pytest.raises(ValueError, match="no unit to measure in"):
        measure.fidelities({"dense": np.zeros((6, 4))}, {}, np.zeros((5, 4)))


def test_losses_tell_equal_from_worse_with_one_correction_for_all():
    dense = RNG.standard_normal((400, 4)) + 0.3
    features = {"dense": dense, "same": dense + 1e-3, "dull_best": dense * 1.01, "compressed": dense + 0.5}
    numbers = measure.losses(features, JUDGE.reference, np.arange(400) % 10, 0.05, 200, np.random.default_rng(1))
    assert "dense" not in numbers
    same, compressed = numbers["same"], numbers["compressed"]
    assert abs(same["loss"]) < 0.01 and same["loss_upper95"] < 0.05 and same["loss_p_holm"] < 0.01
    assert compressed["loss"] > 1 and compressed["loss_p_holm"] == pytest.approx(1)
    assert compressed["loss_to_dull_best_upper95"] > compressed["loss_to_dull_best"] > 1
    assert "loss_to_dull_best" not in same


def test_memorised_samples_are_seen_in_pixels():
    train, holdout = (RNG.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8) for n in (60, 20))
    assert measure.memorised(train[:10], train, holdout, np.random.default_rng(0))["memorised"] == 1.0
    white, black = np.full((1, 1, 4, 4), 255, np.uint8), np.zeros((3, 1, 4, 4), np.uint8)
    assert measure.memorised(white, black, black, np.random.default_rng(0))["nn_holdout"] == 4.0  # 16 pixels, each 1 away
