"""Steady-state evolution of candidates that are within the bound, for least loss at least cost.

TMPQ-DM's operators (arXiv 2404.09532, from AutoDiffusion, 2309.10438): uniform crossover and mutation of the best, and random
candidates; NSGA-II's survival (Deb et al. 2002, by pymoo) instead of its top ten, since loss and cost both count. There are no
generations, so none waits for its slowest candidate: each is made from the results told so far.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from tasks.core.params import check_range

ATTEMPTS = 200  # at a candidate that was not asked before; in a small space none may be left


class SearchSpace(Protocol):
    """What `search` asks of a space. Every candidate that it makes is within its bound on cost."""

    def key(self, candidate) -> Hashable: ...
    def cost(self, candidate) -> float: ...
    def sample(self, rng: np.random.Generator): ...
    def mutate(self, parent, probability: float, rng: np.random.Generator): ...
    def crossover(self, a, b, rng: np.random.Generator): ...


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the next candidate is made; random = 1 is random search."""

    population: int       # survivors
    top: int              # of them that become parents
    random: float         # share of candidates drawn at random
    crossover: float      # share made by crossover; the rest by mutation
    mutation: float       # probability of each gene to change

    def __post_init__(self):
        check_range("population", self.population, 2, 10_000)
        check_range("top", self.top, 1, self.population)
        for name in ("random", "crossover", "mutation"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("random + crossover", self.random + self.crossover, 0, 1)


@dataclass(frozen=True)
class Evaluation:
    candidate: object
    cost: float
    loss: float | None    # None: its evaluation failed


def search(space: SearchSpace, evaluate: Callable[[Iterable], Iterable[float | None]], rng: np.random.Generator, budget: int,
           strategy: Strategy, seeds: Sequence = ()) -> list[Evaluation]:
    """-> at most `budget` evaluations of distinct candidates, in the order asked; fewer when the space holds no more.

    evaluate: takes an iterable of candidates and yields their losses in the same order. Candidates are made while it runs, from
    what it has yielded: the outcome depends on how far it looks ahead, and on nothing else. seeds: asked first.
    """
    seeds = list({space.key(seed): seed for seed in seeds}.values())
    asked, keys, told, survivors = [], set(), [], []

    def ask() -> Iterator:
        for k in range(budget):
            parents = [e.candidate for e in survivors[: strategy.top]] or seeds
            candidate = seeds[k] if k < len(seeds) else fresh(space, parents, rng, strategy, keys)
            if candidate is None:
                return
            asked.append(candidate)
            keys.add(space.key(candidate))
            yield candidate

    for k, loss in enumerate(evaluate(ask())):
        told.append(Evaluation(asked[k], space.cost(asked[k]), loss))
        survivors[:] = survive([*survivors, told[-1]], strategy.population)
    return told


def fresh(space: SearchSpace, parents: Sequence, rng: np.random.Generator, strategy: Strategy, asked: set[Hashable]):
    """A candidate that was never asked, or None."""
    for _ in range(ATTEMPTS):
        candidate = offspring(space, parents, rng, strategy)
        if space.key(candidate) not in asked:
            return candidate
    return None


def offspring(space: SearchSpace, parents: Sequence, rng: np.random.Generator, strategy: Strategy):
    kind = rng.random()
    if not parents or kind < strategy.random:
        return space.sample(rng)
    a, b = (parents[int(rng.integers(len(parents)))] for _ in range(2))
    if kind < strategy.random + strategy.crossover:
        return space.crossover(a, b, rng)
    return space.mutate(a, strategy.mutation, rng)


def survive(evaluated: Sequence[Evaluation], population: int) -> list[Evaluation]:
    """NSGA-II: by rank of the front, within a front the less crowded first; at most `population`."""
    succeeded = [e for e in evaluated if e.loss is not None]
    if not succeeded:
        return []
    objectives = np.array([[e.cost, e.loss] for e in succeeded], float)
    kept: list[int] = []
    for front in NonDominatedSorting().do(objectives, n_stop_if_ranked=population):
        crowding = calc_crowding_distance(objectives[front])
        kept.extend(front[np.argsort(-crowding, kind="stable")].tolist())
    return [succeeded[i] for i in kept[:population]]


def pareto_front(told: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that no other beats in both cost and loss, by rising cost."""
    front, least = [], float("inf")
    for e in sorted((e for e in told if e.loss is not None), key=lambda e: (e.cost, e.loss)):
        if e.loss < least:
            front.append(e)
            least = e.loss
    return front


def hypervolume(told: Sequence[Evaluation], reference: tuple[float, float]) -> float:
    """Share of the box from (0, 0) to `reference` = (cost, loss) that the front dominates."""
    front = pareto_front(told)
    if not front:
        return 0.0
    return float(HV(ref_point=np.ones(2))(np.array([[e.cost, e.loss] for e in front]) / reference))
