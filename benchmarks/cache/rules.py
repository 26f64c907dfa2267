"""Layers and steps chosen without looking at them, as cache plans: what Learning-to-Cache (arXiv 2406.01733) compares with."""

import math
from collections.abc import Sequence

import numpy as np

from tasks.core.recipe import CachePlan


def layers(steps: int, sublayers: Sequence[str], budget: float, order: str, seed: int = 0) -> CachePlan:
    """Every second step skips the same sublayers, as many as the budget asks for: from the top (the last), from the bottom,
    or at random. Half of all evaluations at most; the last sublayer taken is skipped at as many steps as are still due."""
    ranked = np.arange(len(sublayers))
    if order == "random":
        ranked = np.random.default_rng(seed).permutation(ranked)
    elif order == "top":
        ranked = ranked[::-1]
    elif order != "bottom":
        raise ValueError(f"order: {order!r} is not one of top, bottom, random")
    halves = np.arange(1, steps, 2)
    due = min(math.ceil(budget * steps * len(sublayers) - 1e-9), len(halves) * len(sublayers))
    compute = np.ones((steps, len(sublayers)), bool)
    compute[np.tile(halves, len(sublayers))[:due], np.repeat(ranked, len(halves))[:due]] = False
    return CachePlan(sublayers=tuple(sublayers), compute=tuple(tuple(map(bool, row)) for row in compute))
