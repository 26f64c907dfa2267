"""Metrics against scipy, torchmetrics, brute force and arithmetic done by hand."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import norm
from torchmetrics.image.kid import poly_mmd

from tasks.core import quality
from tasks.core.quality import Gaussian


def normal(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) * scale + shift


def textbook_frechet(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)


def test_fid_equals_the_textbook_formula_with_scipys_matrix_root():
    x, y = normal(200, 8, 0), normal(300, 8, 1, shift=0.5)
    assert quality.fid(x, Gaussian.of(y)) == pytest.approx(textbook_frechet(x, y), rel=1e-9)


def test_fid_of_diagonal_gaussians_by_hand():
    reference = Gaussian(np.zeros(2), np.diag([1.0, 9.0]))
    # (3 - 0)^2 + (2 - 1)^2 + (1 - 3)^2
    assert quality.frechet_distance(np.array([3.0, 0.0]), np.diag([4.0, 1.0]), reference) == pytest.approx(14.0)


def test_fid_of_a_set_to_itself_is_zero_even_with_fewer_samples_than_features():
    x = normal(5, 16, 2)
    assert quality.fid(x, Gaussian.of(x)) == pytest.approx(0, abs=1e-5)


def test_an_anchored_fid_of_the_anchor_is_that_of_its_many():
    many, reference = normal(2000, 4, 0), Gaussian.of(normal(2000, 4, 1))
    found = quality.anchored_fid(many[:50], many[:50], Gaussian.of(many), reference)
    assert found == pytest.approx(quality.fid(many, reference), rel=1e-9)


def test_an_anchored_fid_of_few_is_nearer_to_that_of_many_than_their_own():
    rng, reference = np.random.default_rng(0), Gaussian.of(normal(5000, 6, 1))
    anchor = normal(5000, 6, 1)
    own = anchor * 1.1 + 0.2 + 0.05 * rng.standard_normal(anchor.shape)  # another way of sampling, of the same seeds
    few, wanted = slice(0, 100), quality.fid(own, reference)
    found = quality.anchored_fid(own[few], anchor[few], Gaussian.of(anchor), reference)
    assert abs(found - wanted) < 0.2 * abs(quality.fid(own[few], reference) - wanted)


def test_an_anchored_fid_of_few_is_not_biased():
    rng, reference = np.random.default_rng(0), Gaussian.of(normal(5000, 12, 1))
    anchor = normal(12_000, 12, 1)
    own = 0.8 * anchor + 0.6 * rng.standard_normal(anchor.shape) + 0.1  # which go along in part only
    whole, wanted = Gaussian.of(anchor), quality.fid(own, reference)
    parts = [slice(k, k + 100) for k in range(0, len(own), 100)]
    found = [quality.anchored_fid(own[few], anchor[few], whole, reference) for few in parts]
    assert abs(np.mean(found) - wanted) < 3 * np.std(found) / len(parts) ** 0.5 < 0.3 * wanted


def test_an_anchored_fid_wants_pairs():
    with pytest.raises(ValueError, match="not pairs"):
        quality.anchored_fid(normal(5, 3, 0), normal(6, 3, 0), Gaussian.of(normal(9, 3, 1)), Gaussian.of(normal(9, 3, 2)))


@pytest.mark.parametrize(("n", "name"), [(1000, "fid_1k"), (10_000, "fid_10k"), (250, "fid_250"), (1500, "fid_1500")])
def test_the_sample_count_is_in_the_metrics_name(n, name):
    assert quality.fid_name(n) == name


def test_kid_equals_torchmetrics(monkeypatch):
    monkeypatch.setattr(quality, "ROWS", 32)  # several blocks
    x, y = normal(80, 6, 3), normal(80, 6, 4, shift=0.2)
    wanted = poly_mmd(torch.from_numpy(x), torch.from_numpy(y), degree=3, gamma=None, coef=1.0).item()
    assert quality.kid(x, y) == pytest.approx(wanted, rel=1e-9)


def test_kid_is_unbiased_for_sets_of_different_sizes():
    rng = np.random.default_rng(5)
    values = [quality.kid(rng.standard_normal((20, 3)), rng.standard_normal((60, 3))) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20


def test_kid_of_sets_with_fixed_numbers_per_class_is_unbiased_too():
    rng, labels = np.random.default_rng(5), np.arange(20) % 2
    far = 3.0 * labels[:, None]  # two classes far apart
    pairs = [(rng.standard_normal((20, 2)) + far, rng.standard_normal((20, 2)) + far) for _ in range(400)]
    plain, stratified = ([quality.kid(x, y, *given) for x, y in pairs] for given in ((), (labels, labels)))
    assert abs(np.mean(stratified)) < 3 * np.std(stratified) / 20
    assert np.mean(plain) < -3 * np.std(plain) / 20
    with pytest.raises(ValueError, match="class 7 has 1 of 3 samples"):
        quality.kid(np.zeros((3, 2)), np.zeros((3, 2)), np.array([0, 0, 7]))


def test_a_difference_of_kids_is_that_of_the_kids_and_its_error_covers():
    """One-sided bounds of 400 pairs whose sets differ by a shift; the truth is the mean over all."""
    rng, labels = np.random.default_rng(4), np.arange(100) % 5
    centres, y = 2 * rng.standard_normal((5, 4)), rng.standard_normal((400, 4))
    found = []
    for _ in range(400):
        base = rng.standard_normal((100, 4)) + centres[labels]
        found.append(quality.kid_difference(base + 0.1, base, y, labels))
    assert found[-1].estimate == pytest.approx(quality.kid(base + 0.1, y, labels) - quality.kid(base, y, labels), rel=1e-9)
    truth = np.mean([d.estimate for d in found])
    assert np.mean([d.upper95 >= truth for d in found]) == pytest.approx(0.95, abs=0.035)
    loose = quality.kid_difference(base + 0.1, base, y)
    assert loose.error > 1.2 * found[-1].error  # strata take the spread between classes out
    with pytest.raises(ValueError, match="are not pairs"):
        quality.kid_difference(base[1:], base, y)



def test_precision_and_recall_by_hand():
    # With k = 1 a ball reaches the nearest neighbour: radii 1, 1, 1 around the reference and 0.5, 0.5, 20.5 around x.
    reference = np.array([[0.0], [1.0], [2.0]])
    x = np.array([[0.5], [1.0], [-20.0]])
    precision, recall = quality.precision_recall(x, reference, k=1)
    assert precision == pytest.approx(2 / 3)  # -20 is in no ball
    assert recall == pytest.approx(2 / 3)     # 2 is in no ball: |2 - 1| > 0.5 and |2 + 20| > 20.5


def test_precision_and_recall_equal_brute_force(monkeypatch):
    monkeypatch.setattr(quality, "ROWS", 16)
    x, y = normal(50, 4, 6), normal(70, 4, 7, shift=0.5)

    def covered(a, b, k=3):
        inside = 0
        for point in a:
            inside += any(np.linalg.norm(point - c) <= sorted(np.linalg.norm(b - c, axis=1))[k] for c in b)
        return inside / len(a)

    assert quality.precision_recall(x, y) == pytest.approx((covered(x, y), covered(y, x)))


def test_precision_names_the_bound_when_there_are_too_few_points():
    with pytest.raises(ValueError, match="3 points are too few for k = 3"):
        quality.precision_recall(normal(3, 2, 0), normal(9, 2, 1))


def test_paired_distance_by_hand_and_only_of_pairs():
    assert quality.paired_distance(np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[3.0, 4.0], [1.0, 1.0]])) == 2.5
    with pytest.raises(ValueError, match="not pairs"):
        quality.paired_distance(np.zeros((2, 3)), np.zeros((3, 3)))


def test_resamples_keep_the_size_of_every_stratum():
    strata = np.arange(30) % 3
    counts = quality.resample_counts(30, 50, np.random.default_rng(0), strata)
    for stratum in range(3):
        assert (counts[:, strata == stratum].sum(1) == 10).all()
    assert counts.std() > 0.5  # it does resample


def test_bootstrap_fid_equals_fid_of_the_repeated_rows():
    x, reference = normal(40, 5, 8, shift=3.0), Gaussian.of(normal(60, 5, 9))
    counts = quality.resample_counts(40, 6, np.random.default_rng(1))
    wanted = [quality.fid(np.repeat(x, row.astype(int), axis=0), reference) for row in counts]
    assert quality.bootstrap_fid(x, reference, counts) == pytest.approx(wanted, rel=1e-8)


def test_a_set_is_not_worse_than_itself():
    x, reference = normal(100, 4, 10), Gaussian.of(normal(100, 4, 11))
    difference = quality.paired_bootstrap(x, x, reference, 100, np.random.default_rng(2))
    assert difference.estimate == 0 and difference.upper95 == 0
    assert difference.p_worse_by(0.05) == 0 and difference.p_worse_by(0.0) == 1


def test_the_paired_bound_is_tighter_than_an_unpaired_one():
    rng = np.random.default_rng(3)
    base, reference = normal(300, 4, 12), Gaussian.of(normal(300, 4, 13))
    near = base + 0.01 * rng.standard_normal(base.shape)
    paired = quality.paired_bootstrap(near, base, reference, 200, rng)
    shuffled = quality.paired_bootstrap(rng.permutation(near), base, reference, 200, rng)
    assert paired.estimate == pytest.approx(shuffled.estimate)
    assert paired.upper95 - paired.estimate < 0.2 * (shuffled.upper95 - shuffled.estimate)


def test_the_upper_bound_covers_the_truth_95_times_in_100():
    """250 samples from known Gaussians, where the quantile of the resampled ratios covers one time in two."""
    rng = np.random.default_rng(4)
    reference = Gaussian(np.zeros(16), np.eye(16))
    draws = [(base * 1.05 + 0.16, base + 0.15) for base in rng.standard_normal((150, 250, 16))]
    fids = np.array([[quality.fid(part, reference) for part in draw] for draw in draws])
    truth = fids[:, 0].mean() / fids[:, 1].mean() - 1
    bounds = np.array([quality.paired_bootstrap(x, base, reference, 60, rng).upper95 for x, base in draws])
    assert 0.90 <= (bounds >= truth).mean() <= 0.99


def test_bound_and_p_value_are_those_of_a_normal_distribution():
    difference = quality.Difference(0.02, 0.01)
    assert difference.upper95 == pytest.approx(0.02 + 0.01 * norm.ppf(0.95), rel=1e-4)
    assert difference.p_worse_by(0.05) == pytest.approx(norm.sf(3.0))


def test_holm_by_hand():
    adjusted = quality.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert quality.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_copies_of_training_images_are_full_memorisation():
    train, holdout = normal(120, 6, 14), normal(30, 6, 14)
    found = quality.memorisation(train[:50], train, holdout, np.random.default_rng(0))
    assert found.excess == 1.0 and found.nn_holdout > 0


def test_fresh_samples_show_no_memorisation_whatever_the_sizes_of_the_splits():
    rng = np.random.default_rng(5)
    excess = [quality.memorisation(*(rng.standard_normal((n, 3)) for n in (100, 80, 20)), rng).excess for _ in range(60)]
    assert abs(np.mean(excess)) < 3 * np.std(excess) / np.sqrt(60)


def test_an_image_in_both_splits_counts_for_neither():
    x = normal(10, 3, 15)
    assert quality.memorisation(x, x, x, np.random.default_rng(0)).excess == pytest.approx(0)


def test_features_do_not_depend_on_the_batch_and_see_minus_one_to_one():
    images = np.random.default_rng(6).integers(0, 256, (7, 1, 4, 4), dtype=np.uint8)
    images[0] = 255

    def net(x):
        assert x.min() >= -1 and x.max() <= 1
        return x.flatten(1), x.mean((2, 3))

    whole, logits = quality.features_and_logits(net, images, 7)
    assert whole.shape == (7, 16) and logits.shape == (7, 1) and (whole[0] == 1).all()
    assert np.array_equal(quality.features(net, images, 3), whole)


def test_classes_of_few_samples_are_no_strata():
    assert quality.strata_of(None) is None
    assert quality.strata_of(np.arange(100) % 10) is None
    labels = np.arange(200) % 10
    assert quality.strata_of(labels) is labels


def test_evenly_takes_as_many_of_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40))
    assert np.bincount(labels[quality.evenly(200, 50, labels)]).tolist() == [10] * 5
    assert quality.evenly(3, 10).tolist() == [0, 1, 2]
