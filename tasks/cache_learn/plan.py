"""The cheapest cache plan for a budget: which sublayers to skip at which steps, under a limit on distinct step masks.

The error of a plan is the sum of its reuse events' costs, cost[sublayer, from, to], as in CEM (arXiv 2512.23258). Without the
limit the optimum is exact: a dynamic program over the steps of each sublayer, then a multiple-choice knapsack over sublayers.
A graph backend compiles graphs for each distinct mask, hence the limit; given which steps share a mask the same knapsack is
exact again, and which steps share one is found by local search from the unlimited optimum and from periodic patterns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.core.recipe import CachePlan

LEVELS = 12       # budgets whose unlimited optimum the local search starts from
PERIODS = (2, 3)  # and periodic patterns: a step computed in full, then one or two that share a mask


@dataclass(frozen=True)
class Options:
    """What each sublayer may do over the whole trajectory, and what that costs."""

    cost: np.ndarray      # (S, P) inf where impossible
    removed: np.ndarray   # (P,) evaluations skipped
    computed: np.ndarray  # (S, P, N) bool


def plan_from_costs(costs: np.ndarray, sublayers: Sequence[str], budget: float, max_masks: int = 4) -> CachePlan:
    """costs: (S, N, N) of reusing at step `to` what was computed at step `from`, >= 0, inf where forbidden.

    budget: share of all S x N evaluations to remove at least; if that many cannot be removed, as many as can. max_masks: limit
    on distinct rows, the full first one included. A larger budget never removes less: plans for all budgets are chosen from one
    frontier. Raises ValueError for a budget or a limit out of range.
    """
    count, steps, _ = costs.shape
    check(costs, sublayers, budget, max_masks)
    target = math.ceil(budget * count * steps - 1e-9)
    candidates = [(o, *combine(o, count * (steps - 1))) for o in menus(costs, max_masks)]
    table = np.stack([best for _, best, _ in candidates])  # (menus, removed)
    removed = cheapest(table.min(axis=0), target)
    options, _, picks = candidates[int(table[:, removed].argmin())]
    compute = np.stack([options.computed[i, p] for i, p in enumerate(trace(options, picks, removed))], axis=1)
    return CachePlan(sublayers=tuple(sublayers), compute=tuple(tuple(bool(c) for c in row) for row in compute))


def check(costs: np.ndarray, sublayers: Sequence[str], budget: float, max_masks: int) -> None:
    if not 0 <= budget < 1:
        raise ValueError(f"budget: {budget} is not in [0, 1)")
    if max_masks < 1:
        raise ValueError(f"max_masks: {max_masks} is less than 1, the full mask of the first step")
    if len(costs) != len(sublayers):
        raise ValueError(f"costs of {len(costs)} sublayers for {len(sublayers)} names")


def cheapest(best: np.ndarray, target: int) -> int:
    """The number >= target of removed evaluations that costs least (the largest of equals), or the largest possible one."""
    possible = np.flatnonzero(np.isfinite(best))
    enough = possible[possible >= target]
    return int(possible[-1] if len(enough) == 0 else enough[best[enough] == best[enough].min()][-1])


def menus(costs: np.ndarray, max_masks: int) -> Iterator[Options]:
    """The sets of choices to search: every pattern where the limit cannot bind; else one set per grouping of steps."""
    free = free_options(costs)
    if max_masks >= min(costs.shape[1], 2 ** len(costs)):
        yield free
        return
    everything = np.zeros(costs.shape[1], int)
    found = {everything.tobytes(): everything}  # alone where no reuse is allowed at all
    for slope, computed in optima(free):
        for start in (cluster(computed, max_masks), *periodic(costs.shape[1], max_masks)):
            groups = improve(costs, start, slope, max_masks)
            found[groups.tobytes()] = groups
    yield from (group_options(costs, groups, max_masks) for groups in found.values())


# ---- every pattern: dynamic program over the steps of each sublayer

def free_options(costs: np.ndarray) -> Options:
    """For every sublayer and every number r < N of skipped steps, the cheapest pattern that skips r."""
    count, steps, _ = costs.shape
    runs = run_costs(costs)
    best = np.full((count, steps + 1, steps), np.inf)  # [sublayer, next computed step (N: the end), skipped before it]
    previous = np.zeros(best.shape, int)
    best[:, 0, 0] = 0.0
    for end in range(1, steps + 1):
        for start in range(end):
            skipped = end - start - 1
            reached = best[:, start, : steps - skipped] + runs[:, start, skipped, None]
            target = best[:, end, skipped:]
            better = reached < target
            target[better] = reached[better]
            previous[:, end, skipped:][better] = start
    computed = np.zeros((count, steps, steps), bool)
    for i, r in np.ndindex(count, steps):
        walk_back(previous[i], r, computed[i, r])
    return Options(best[:, steps], np.arange(steps), computed)


def run_costs(costs: np.ndarray) -> np.ndarray:
    """(S, N, N): cost of computing step `from` and reusing that at the l steps after it; inf beyond the last step."""
    count, steps, _ = costs.shape
    runs = np.full((count, steps, steps), np.inf)
    for start in range(steps):
        runs[:, start, 0] = 0.0
        runs[:, start, 1: steps - start] = costs[:, start, start + 1:].cumsum(axis=1)
    return runs


def walk_back(previous: np.ndarray, removed: int, computed: np.ndarray) -> None:
    """Mark in `computed` (N,) the steps of the best pattern that skips `removed` steps."""
    end = len(computed)
    while end > 0:
        start = previous[end, removed]
        removed -= end - start - 1
        computed[start] = True
        end = start


# ---- over sublayers: multiple-choice knapsack

def combine(options: Options, total: int) -> tuple[np.ndarray, np.ndarray]:
    """-> (total + 1,) least cost for each number of removed evaluations, (S, total + 1) the option each sublayer then takes."""
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    picks = np.zeros((len(options.cost), total + 1), int)
    for i, costs in enumerate(options.cost):
        reached = np.full((len(costs), total + 1), np.inf)
        for p, (cost, removed) in enumerate(zip(costs, options.removed, strict=True)):
            reached[p, removed:] = best[: total + 1 - removed] + cost
        picks[i] = reached.argmin(axis=0)
        best = reached.min(axis=0)
    return best, picks


def trace(options: Options, picks: np.ndarray, removed: int) -> list[int]:
    """The option of every sublayer in the best combination that removes `removed` evaluations."""
    chosen = []
    for row in picks[::-1]:
        chosen.append(int(row[removed]))
        removed -= options.removed[chosen[-1]]
    return chosen[::-1]


def optima(free: Options) -> Iterator[tuple[float, np.ndarray]]:
    """(cost of one more removed evaluation, (N, S) computed) at LEVELS points of the unlimited frontier."""
    best, picks = combine(free, free.cost.shape[0] * (free.cost.shape[1] - 1))
    most = int(np.flatnonzero(np.isfinite(best))[-1])
    for level in filter(None, np.unique(np.linspace(0, most, LEVELS + 1).round().astype(int))):
        lower = max(0, level - max(1, most // LEVELS))
        patterns = [free.computed[i, p] for i, p in enumerate(trace(free, picks, level))]
        yield (best[level] - best[lower]) / (level - lower), np.stack(patterns, axis=1)


# ---- given which steps share a mask

def group_options(costs: np.ndarray, groups: np.ndarray, max_masks: int) -> Options:
    """groups: (N,) the group of every step; group 0 is computed in full. Each sublayer chooses among all 2^(K-1) patterns."""
    computed = patterns(max_masks)[:, groups]
    every = np.broadcast_to(computed, (len(costs), *computed.shape))
    return Options(pattern_costs(costs, computed), (~computed).sum(axis=-1), every)


def patterns(groups: int) -> np.ndarray:
    """(2^(K-1), K) bool: in which groups a sublayer is computed; always in group 0."""
    rest = (np.arange(2 ** (groups - 1))[:, None] >> np.arange(groups - 1)) & 1 == 0
    return np.concatenate([np.ones((len(rest), 1), bool), rest], axis=1)


def pattern_costs(costs: np.ndarray, computed: np.ndarray) -> np.ndarray:
    """costs (S, N, N), computed (..., N) -> (S, ...) summed cost of the reuse events of each pattern."""
    step = np.arange(computed.shape[-1])
    last = np.maximum.accumulate(np.where(computed, step, 0), axis=-1)
    return np.where(computed, 0.0, costs[:, last, step]).sum(axis=-1)


def improve(costs: np.ndarray, groups: np.ndarray, slope: float, max_masks: int) -> np.ndarray:
    """Coordinate descent: each step in turn joins the group with the least cost - slope x removed, until none moves."""
    table = patterns(max_masks)
    value = np.inf
    while True:
        for step in range(1, len(groups)):
            tried = np.repeat(groups[None], max_masks, axis=0)
            tried[:, step] = range(max_masks)
            values = lagrangian(costs, table[:, tried].swapaxes(0, 1), slope)
            if values.min() < values[groups[step]] - 1e-12 * abs(values[groups[step]]):
                groups = tried[values.argmin()]
        if values.min() >= value - 1e-12 * abs(value):
            return groups
        value = values.min()


def lagrangian(costs: np.ndarray, computed: np.ndarray, slope: float) -> np.ndarray:
    """computed (M, P, N) -> (M,) min over patterns of cost - slope x removed, summed over sublayers."""
    return (pattern_costs(costs, computed) - slope * (~computed).sum(axis=-1)).min(axis=-1).sum(axis=0)


def cluster(computed: np.ndarray, max_masks: int) -> np.ndarray:
    """computed: (N, S) -> (N,) groups: the most frequent masks lead, every other step joins the one with fewest differences."""
    masks, frequency = np.unique(computed[~computed.all(axis=1)], axis=0, return_counts=True)
    leaders = masks[np.argsort(-frequency, kind="stable")[: max_masks - 1]]
    centres = np.concatenate([np.ones((1, computed.shape[1]), bool), leaders])
    groups = (computed[:, None] != centres).sum(axis=2).argmin(axis=1)
    groups[0] = 0
    return groups


def periodic(steps: int, max_masks: int) -> Iterator[np.ndarray]:
    """Every p-th step in full; the steps between share a mask within each of K - 1 equal parts of the trajectory."""
    part = np.arange(steps) * (max_masks - 1) // steps
    for period in PERIODS:
        yield np.where(np.arange(steps) % period == 0, 0, np.minimum(1 + part, max_masks - 1))
