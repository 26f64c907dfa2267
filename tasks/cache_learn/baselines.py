"""Rules without learning that a learned plan is to beat, at the same share of removed sublayer evaluations."""

from collections.abc import Sequence

import numpy as np

from tasks.core.recipe import CachePlan


def uniform_interval(steps: int, sublayers: Sequence[str], budget: float) -> CachePlan:
    """Whole steps are computed or skipped, the computed ones evenly spaced: a fixed cache interval, fractional if need be."""
    computed = max(1, int(steps * (1 - budget) + 1e-9))
    rows = np.zeros(steps, bool)
    rows[np.arange(computed) * steps // computed] = True
    return whole_steps(rows, sublayers)


def time_threshold(steps: int, sublayers: Sequence[str], budget: float, end: str = "noisy") -> CachePlan:
    """Every second step is skipped from one end to a threshold, none beyond it. Removes half of all evaluations at most.

    end: noisy, as the released routers of Learning-to-Cache nearly do | clean, from the last step backwards."""
    skipped = min(int(np.ceil(steps * budget - 1e-9)), steps // 2)
    rows = np.ones(steps, bool)
    rows[1 + 2 * np.arange(skipped) if end == "noisy" else steps - 1 - 2 * np.arange(skipped)] = False
    return whole_steps(rows, sublayers)


def whole_steps(rows: np.ndarray, sublayers: Sequence[str]) -> CachePlan:
    """rows: (N,) bool, whether a step computes all sublayers or none."""
    return CachePlan(sublayers=tuple(sublayers), compute=tuple((bool(row),) * len(sublayers) for row in rows))
