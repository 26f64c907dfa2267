"""A cache plan refined by what it does to whole trajectories, network in the loop.

The error table adds up events that it measured one by one. Whole trajectories do not add up: where a block and all after it are
skipped together, no error of the one passes through the others; errors of one step grow or fade on the way to the image; and a
forecast is off by other amounts than plain reuse. So plans that the table says are good are run, and the best is improved by
local search: what is tried is what runs, with the weights that it would have.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from tasks.cache_learn.baselines import time_threshold, uniform_interval
from tasks.cache_learn.forecast import Reference, fit, run_plan
from tasks.cache_learn.plan import plan_from_costs
from tasks.core.checkpoint import Checkpoint
from tasks.core.progress import track
from tasks.core.recipe import CachePlan

ATTEMPTS = 100  # at a change that keeps to budget and limit

Stray = Callable[[CachePlan], float]  # how far a plan's images lie from the uncached run's, to be made small


def proposals(costs: np.ndarray, sublayers: Sequence[str], budget: float, max_masks: int, forecast: str) -> list[CachePlan]:
    """What the table says for every number of masks up to the limit, and the rules that skip whole steps, as far as they reach
    the budget; with plain reuse and with `forecast`, but where weights are learned for a plan they are left to be. costs: as
    `plan_from_costs`."""
    steps = costs.shape[1]
    plans = [plan_from_costs(costs, sublayers, budget, masks) for masks in range(min(2, max_masks), max_masks + 1)]
    enough = min(math.ceil(budget * steps * len(sublayers) - 1e-9), *(removed(np.array(plan.compute)) for plan in plans))
    if max_masks > 1:
        rules = (uniform_interval(steps, sublayers, budget),
                 *(time_threshold(steps, sublayers, budget, end) for end in ("noisy", "clean")))
        plans += [plan for plan in rules if removed(np.array(plan.compute)) >= enough]
    kinds = ("none",) if forecast == "learned" else dict.fromkeys(("none", forecast))
    return [replace(plan, forecast=kind) for plan in dict.fromkeys(plans) for kind in kinds]


def straying(reference: Reference, forecast: str) -> Stray:
    """Distance of a plan's images to the reference's: as it is, or `learned`, with the weights that one run fits."""
    if forecast == "learned":
        return lambda plan: reference.distance(fit(plan, reference)[1])
    return lambda plan: reference.distance(run_plan(plan, reference))


def refine(proposed: Sequence[CachePlan], stray: Stray, budget: float, max_masks: int, tries: int, seed: int,
           checkpoint: Checkpoint) -> tuple[CachePlan, list[tuple[int, float]]]:
    """-> the best of the plans proposed after `tries` changes were tried on it, and (tries, how far it strayed) as it fell.

    Every plan that is tried removes at least `budget` of all sublayer evaluations, or what the proposed do if that is less, and
    has at most `max_masks` distinct step masks. Deterministic; goes on from its checkpoint after a kill.
    """
    saved = checkpoint.load()
    if saved is None:
        strays = [stray(plan) for plan in track(proposed, len(proposed), "cache plans proposed")]
        best, done, curve = proposed[int(np.argmin(strays))], 0, [(0, min(strays))]
    else:
        best = replace(proposed[0], compute=tuple(map(tuple, saved["compute"].tolist())), forecast=saved["forecast"])
        done, curve = saved["done"], [tuple(point) for point in saved["curve"]]
    target = min(math.ceil(budget * np.size(best.compute) - 1e-9), *(removed(np.array(plan.compute)) for plan in proposed))
    for k in track(range(done, tries), tries - done, "cache plan, changes tried"):
        compute = changed(np.array(best.compute), target, max_masks, np.random.default_rng([seed, k]))
        if (strayed := stray(plan := replace(best, compute=compute))) < curve[-1][1]:
            best = plan
            curve.append((k + 1, strayed))
        checkpoint.save_if_due(partial(state, best, k + 1, curve))
    return best, curve


def state(plan: CachePlan, done: int, curve: Sequence[tuple[int, float]]) -> dict:
    return {"compute": torch.tensor(plan.compute), "forecast": plan.forecast, "done": done, "curve": list(curve)}


def removed(compute: np.ndarray) -> int:
    return int((~compute).sum())


def changed(compute: np.ndarray, target: int, max_masks: int, rng: np.random.Generator) -> tuple[tuple[bool, ...], ...]:
    """compute (N, S) bool -> a random neighbour that removes `target` evaluations or more, with at most max_masks masks; the
    same again where none was found."""
    masks, groups = masks_of(compute, max_masks)
    for _ in range(ATTEMPTS):
        m, g = masks.copy(), groups.copy()
        for _ in range(1 + rng.integers(2)):
            CHANGES[rng.integers(len(CHANGES))](m, g, rng)
        if removed(m[g]) >= target and (m[g] != compute).any():
            return tuple(map(tuple, m[g].tolist()))
    return tuple(map(tuple, compute.tolist()))


def masks_of(compute: np.ndarray, max_masks: int) -> tuple[np.ndarray, np.ndarray]:
    """-> masks (max_masks, S), the full one first, groups (N,): the mask of every step. Masks to spare repeat one."""
    partial = np.unique(compute[~compute.all(axis=1)], axis=0)
    masks = np.concatenate([np.ones((1, compute.shape[1]), bool), partial])
    groups = (compute[:, None] == masks).all(axis=2).argmax(axis=1)
    spare = np.resize(masks[1:] if len(partial) else masks, (max_masks - len(masks), compute.shape[1]))
    return np.concatenate([masks, spare]), groups


# ---- changes, in place; the first step and the first mask stay full ----

def move(masks: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> None:
    """One step takes another mask."""
    groups[rng.integers(1, len(groups))] = rng.integers(len(masks))


def swap(masks: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> None:
    """Two steps change masks."""
    i, j = rng.integers(1, len(groups), 2)
    groups[i], groups[j] = groups[j], groups[i]


def exchange(masks: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> None:
    """In one mask a sublayer is skipped instead of another, or without one in return."""
    if len(masks) == 1:
        return
    mask = masks[rng.integers(1, len(masks))]
    computed, skipped = np.flatnonzero(mask), np.flatnonzero(~mask)
    if len(computed):
        mask[rng.choice(computed)] = False
    if len(skipped) and rng.random() < 0.8:
        mask[rng.choice(skipped)] = True


CHANGES = (move, swap, exchange)
