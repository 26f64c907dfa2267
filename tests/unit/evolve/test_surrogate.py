"""The guess at a loss: against scikit-free closed forms and areas done by hand."""

import numpy as np
import pytest
from pymoo.indicators.hv import HV

from tasks.evolve.surrogate import FEWEST, WINDOW, Surrogate, hypervolume_gains, ridge


def test_ridge_finds_what_is_linear():
    rng = np.random.default_rng(0)
    x, wanted = rng.normal(size=(200, 5)), np.array([1.0, -2.0, 0.0, 3.0, 0.5])
    weights, offset = ridge(x, x @ wanted + 4)
    assert weights == pytest.approx(wanted, abs=0.01) and offset == pytest.approx(4, abs=0.01)


def test_ridge_guesses_the_mean_where_there_is_only_noise():
    """With as many features as results least squares would go through every one of them."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 39)), rng.normal(size=40)
    weights, offset = ridge(x, y)
    fresh = rng.normal(size=(500, 39))
    assert np.std(fresh @ weights + offset) < 0.5 and np.std(fresh @ np.linalg.lstsq(x, y, rcond=None)[0]) > 1


def test_a_feature_that_never_changes_is_no_reason():
    rng = np.random.default_rng(2)
    x = np.column_stack([rng.normal(size=50), np.full(50, 7.0)])
    weights, _ = ridge(x, 2 * x[:, 0])
    assert weights == pytest.approx([2, 0], abs=0.01)


def test_there_is_no_guess_before_enough_was_told():
    surrogate, rng = Surrogate(), np.random.default_rng(3)
    for k in range(FEWEST):
        assert surrogate.fit() is False, k
        surrogate.tell(rng.normal(size=4), 1.0 + k)
    assert surrogate.fit() is True


def test_losses_are_learned_as_products():
    surrogate, rng = Surrogate(), np.random.default_rng(4)
    x = rng.normal(size=(300, 3))
    for row in x:
        surrogate.tell(row, float(np.exp(row @ [0.5, -1.0, 0.0] + 1)))
    assert surrogate.fit()
    assert surrogate.losses(x[:5]) == pytest.approx(np.exp(x[:5] @ [0.5, -1.0, 0.0] + 1), rel=0.01)


def test_memory_is_bounded():
    surrogate = Surrogate()
    for _ in range(WINDOW + 10):
        surrogate.tell(np.zeros(2), 1.0)
    assert len(surrogate.rows) == len(surrogate.targets) == WINDOW


def test_gains_by_hand():
    """Known (1, 3) and (2, 1) below the corner (4, 4)."""
    known, corner = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([4.0, 4.0])
    points = np.array([[1.0, 1.0], [0.5, 3.5], [3.0, 0.5], [3.0, 2.0], [5.0, 0.0]])
    assert hypervolume_gains(points, known, corner) == pytest.approx([2, 0.25, 0.5, 0, 0])


def test_gains_are_differences_of_hypervolumes():
    rng = np.random.default_rng(5)
    known, points, corner = rng.uniform(0, 1.2, (30, 2)), rng.uniform(0, 1.2, (50, 2)), np.ones(2)
    area = HV(ref_point=corner)
    wanted = [area(np.vstack([known, p])) - area(known) for p in points]
    assert hypervolume_gains(points, known, corner) == pytest.approx(wanted, abs=1e-12)
