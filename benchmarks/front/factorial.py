"""A 2^k factorial: main effects and interactions of two factors, and their intervals. Pure.

y is the logarithm of what is measured, so an effect e multiplies it by exp(e).
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

FACTORS = ("sparsity", "cache", "solver", "weights", "precision")
NORMAL_975 = 1.96


def design(k: int) -> list[tuple[bool, ...]]:
    """All 2^k rows; the last factor changes fastest."""
    return list(itertools.product((False, True), repeat=k))


def terms(factors: Sequence[str]) -> list[tuple[str, ...]]:
    """Every factor, then every two of them."""
    return [*itertools.combinations(factors, 1), *itertools.combinations(factors, 2)]


def effects(y: np.ndarray, factors: Sequence[str]) -> dict[str, np.ndarray]:
    """y: (..., 2^k) in the order of `design` -> "a" or "a x b" -> (...,).

    Of one factor: the mean where it is on less the mean where it is off. Of two: the mean where both are alike less the mean
    where one of them is on; it is half of what turning b on adds to the effect of a (Box, Hunter and Hunter, chapter 5).
    """
    signs = np.where(np.array(design(len(factors))), 1, -1)  # (2^k, k)
    if y.shape[-1] != len(signs):
        raise ValueError(f"factorial: {y.shape[-1]} values are not the {len(signs)} of {len(factors)} factors")
    place = {name: i for i, name in enumerate(factors)}
    contrasts = {" x ".join(term): signs[:, [place[name] for name in term]].prod(1) for term in terms(factors)}
    return {name: y @ contrast / (len(signs) / 2) for name, contrast in contrasts.items()}


def intervals(estimate: Mapping[str, np.ndarray], drawn: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """estimate: effects of the whole; drawn: (B,) effects of its resamples. -> estimate, low and high of 95 %.

    Only the spread is taken from the resamples: a resample repeats samples, so its FID is biased upwards.
    """
    spread = {name: NORMAL_975 * float(np.std(drawn[name], ddof=1)) for name in estimate}
    return {name: (float(e), float(e) - spread[name], float(e) + spread[name]) for name, e in estimate.items()}


def resampled_medians(times: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """times: (rounds, n) seconds. -> (resamples, n) medians over rounds drawn with replacement, the same for all n: what slows
    the machine for a while slows all of a round."""
    rounds = rng.integers(len(times), size=(resamples, len(times)))
    return np.median(times[rounds], axis=1)
