"""What stands for quality: against closed forms, and errors against those of many repetitions."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import sem

from tasks.core.quality import Gaussian, paired_distance
from tasks.evolve.fitness import distance
from tasks.evolve.proxy import BLOCKS, frechet, judged, loss_of, parts, seen, values

RNG = np.random.default_rng(0)
DENSE = RNG.normal(size=(64, 3))
REFERENCES = DENSE, DENSE + [0.5, 0.0, 0.0]  # the unit is one half
BANK = Gaussian.of(np.random.default_rng(1).normal(size=(1000, 3)))


def test_paired_is_the_distance_and_its_error_that_of_a_mean():
    found = DENSE[:BLOCKS] + np.random.default_rng(2).normal(size=(BLOCKS, 3))
    references = tuple(reference[:BLOCKS] for reference in REFERENCES)
    kept = seen(found, references, None)
    told = judged(kept, "paired")
    assert told.estimate == loss_of(kept, "paired") == pytest.approx(distance(found, references))
    assert told.error == pytest.approx(sem(kept["paired"])), "blocks of one image"


def test_frechet_by_hand():
    """The anchor's images, moved and stretched, against the bank's moments moved and stretched."""
    assert frechet(DENSE, DENSE, BANK) == pytest.approx(0, abs=1e-6)
    assert frechet(DENSE + [3.0, 4.0, 0.0], DENSE, BANK) == pytest.approx(5)
    wide = BANK.sigma + np.cov(2 * DENSE, rowvar=False) - np.cov(DENSE, rowvar=False)
    square = np.sum(DENSE.mean(0) ** 2) + np.trace(wide + BANK.sigma - 2 * sqrtm(wide @ BANK.sigma).real)
    assert frechet(2 * DENSE, DENSE, BANK) == pytest.approx(square**0.5)


def test_frechet_of_other_images_of_one_distribution_is_far_below_their_paired_distance():
    """Where `paired` sees other images, `frechet` sees as good ones."""
    kept = seen(np.random.default_rng(3).normal(size=DENSE.shape), REFERENCES, BANK)
    moved = seen(DENSE + [1.0, 0.0, 0.0], REFERENCES, BANK)
    assert loss_of(kept, "paired") > 2 * loss_of(moved, "paired") and loss_of(kept, "frechet") < loss_of(moved, "frechet")
    assert loss_of(moved, "frechet") == pytest.approx(1 / 0.5) == loss_of(moved, "paired")
    assert loss_of(moved, "sum") == pytest.approx(4)


def test_few_images_and_directions_of_negative_variance_have_a_value():
    few = np.random.default_rng(4).normal(size=(4, 3))
    assert np.isfinite(seen(few, tuple(r[:4] for r in REFERENCES), BANK)["frechet"]).all()
    assert frechet(np.zeros((4, 3)), 9 * few, BANK) > 0


@pytest.mark.parametrize("proxy", ["paired", "frechet", "sum"])
def test_errors_are_what_repetitions_spread_by(proxy):
    spread, errors = [], []
    for k in range(60):
        rng = np.random.default_rng(100 + k)
        dense = rng.normal(size=(64, 3))
        found = 1.3 * dense + [0.4, 0.0, 0.0] + 0.5 * rng.normal(size=(64, 3))
        told = judged(seen(found, (dense, dense + [0.5, 0.0, 0.0]), BANK), proxy)
        spread.append(told.estimate)
        errors.append(told.error)
    assert np.mean(errors) == pytest.approx(np.std(spread), rel=0.3)


def test_of_two_on_the_same_images_the_difference_is_surer_than_either():
    a, b = (seen(1.5 * DENSE + shift, REFERENCES, BANK) for shift in ([0.3, 0, 0], [0.31, 0, 0]))
    told = judged(b, "paired", a)
    assert told.estimate == pytest.approx(loss_of(b, "paired") - loss_of(a, "paired"))
    assert told.error < judged(a, "paired").error / 10


def test_one_image_has_no_error():
    kept = seen(DENSE[:1] + 1, tuple(r[:1] for r in REFERENCES), BANK)
    assert judged(kept, "paired").error == 0 and "frechet" not in kept


def test_blocks_are_left_out_in_turn():
    left_out = parts(40)[1:]
    blocks = [np.setdiff1d(np.arange(40), part) for part in left_out]
    assert len(left_out) == BLOCKS and sorted(np.concatenate(blocks)) == [*range(40)]
    assert len(values({"paired": [1.0, 2.0, 6.0]}, "paired")) == 4
    assert values({"paired": [1.0, 2.0, 6.0]}, "paired").tolist() == [3.0, 4.0, 3.5, 1.5]
    assert paired_distance(*REFERENCES) == 0.5
