"""Searches of candidates that are within the bound, for least loss at least cost: `search` and what its strategies share.

`ours` is steady-state: TMPQ-DM's operators (arXiv 2404.09532, from AutoDiffusion, 2309.10438), that is uniform crossover and
mutation of the best and random candidates; NSGA-II's survival (Deb et al. 2002, by pymoo), not its top ten, since loss and
cost both count; and of several offspring the one is asked that a surrogate of the loss expects most of. There are no
generations, so none waits for its slowest candidate: each is made from the results told so far.
`random` is the same without parents. `tmpq_dm` is TMPQ-DM's evolution as published, in generations that wait.
"""

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from threadpoolctl import threadpool_limits

from tasks.core.memory import rare_collections
from tasks.core.params import check_choice, check_range
from tasks.evolve.surrogate import Surrogate, hypervolume_gains

KINDS = ("ours", "tmpq_dm", "random")
ATTEMPTS = 200  # at a candidate that was not asked before; in a small space none may be left


class SearchSpace(Protocol):
    """What `search` asks of a space. Every candidate that it makes is within its bound on cost."""

    bound: float

    def key(self, candidate) -> Hashable: ...
    def cost(self, candidate) -> float: ...
    def sample(self, rng: np.random.Generator): ...
    def mutate(self, parent, probability: float, rng: np.random.Generator): ...
    def crossover(self, a, b, rng: np.random.Generator): ...

    def features(self, candidates: Sequence) -> np.ndarray:
        """(n, d) numbers that the logarithm of the loss is about linear in; asked for only where offspring > 1."""

    def unbounded(self) -> "SearchSpace":
        """The same without a bound: nothing is repaired. Asked for by tmpq_dm only."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the next candidate is made. tmpq_dm has the numbers that were published, none of these; random is random = 1."""

    kind: str = "ours"    # ours | tmpq_dm | random
    population: int       # survivors
    top: int              # of them that become parents
    random: float         # share of candidates drawn at random
    crossover: float      # share made by crossover; the rest by mutation
    mutation: float       # probability of each gene to change
    offspring: int = 1    # made for each one that is asked: the one that the surrogate expects most of

    def __post_init__(self):
        check_choice("evolve.strategy.kind", self.kind, KINDS)
        check_range("evolve.strategy.population", self.population, 2, 10_000)
        check_range("evolve.strategy.top", self.top, 1, self.population)
        for name in ("random", "crossover", "mutation"):
            check_range(f"evolve.strategy.{name}", getattr(self, name), 0, 1)
        check_range("evolve.strategy.random + crossover", self.random + self.crossover, 0, 1)
        check_range("evolve.strategy.offspring", self.offspring, 1, 1000)


@dataclass(frozen=True)
class Evaluation:
    candidate: object
    cost: float
    loss: float | None    # None: its evaluation failed


Evaluate = Callable[[Iterable], Iterable[float | None]]


def search(space: SearchSpace, evaluate: Evaluate, rng: np.random.Generator, budget: int, strategy: Strategy,
           seeds: Sequence = ()) -> list[Evaluation]:
    """-> at most `budget` evaluations of distinct candidates, in the order asked; fewer when the space holds no more.

    evaluate: takes an iterable of candidates and yields their losses in the same order. Candidates are made while it runs, from
    what it has yielded: the outcome depends on how far it looks ahead, and on nothing else. tmpq_dm calls it once for every
    generation, with a list. seeds: asked first.
    """
    seeds = list({space.key(seed): seed for seed in seeds}.values())
    if strategy.kind == "random":
        strategy = replace(strategy, random=1.0, crossover=0.0, offspring=1)
    with rare_collections(), threadpool_limits(1, "blas"):  # small products: a second thread only spins, and rounds otherwise
        if strategy.kind == "tmpq_dm":
            return tmpq_dm(space, evaluate, rng, budget, seeds)
        return steady_state(space, evaluate, rng, budget, strategy, seeds)


def steady_state(space: SearchSpace, evaluate: Evaluate, rng: np.random.Generator, budget: int, strategy: Strategy,
                 seeds: Sequence) -> list[Evaluation]:
    asked, told, survivors = [], [], []
    keys = set(map(space.key, seeds))
    guide = Guide(space) if strategy.offspring > 1 else None

    def ask() -> Iterator:
        for k in range(budget):
            candidate = seeds[k] if k < len(seeds) else fresh(space, brood, keys)
            if candidate is None:
                return
            asked.append(candidate)
            if guide:
                guide.ask(candidate)
            yield candidate

    def brood() -> list:
        parents = [e.candidate for e in survivors[: strategy.top]] or seeds
        made = offspring(space, parents, rng, strategy)
        return guide.ranked(made, survivors) if guide and len(made) > 1 else made

    for k, loss in enumerate(evaluate(ask())):
        told.append(Evaluation(asked[k], space.cost(asked[k]), loss))
        survivors[:] = survive([*survivors, told[-1]], strategy.population)
        if guide:
            guide.tell(loss)
    return told


def fresh(space: SearchSpace, make: Callable[[], Iterable], keys: set[Hashable], attempts: int = ATTEMPTS):
    """The first of what `make` makes that is within the bound and whose key is not among `keys`, where it then is; or None."""
    for _ in range(attempts):
        for candidate in make():
            if space.cost(candidate) <= space.bound and (key := space.key(candidate)) not in keys:
                keys.add(key)
                return candidate
    return None


def offspring(space: SearchSpace, parents: Sequence, rng: np.random.Generator, strategy: Strategy) -> list:
    """All of one kind; a random candidate comes alone: the surrogate learns most from what it would not have chosen."""
    kind = rng.random()
    if not parents or kind < strategy.random:
        return [space.sample(rng)]
    made = []
    for _ in range(strategy.offspring):
        a, b = (parents[int(rng.integers(len(parents)))] for _ in range(2))
        crossed = kind < strategy.random + strategy.crossover
        made.append(space.crossover(a, b, rng) if crossed else space.mutate(a, strategy.mutation, rng))
    return made


class Guide:
    """Ranks offspring by the hypervolume that they are expected to add to what was told and to what is being evaluated."""

    def __init__(self, space: SearchSpace):
        self.space, self.surrogate = space, Surrogate()
        # Of those asked and not told, in order; hundreds, where there are many workers.
        self.features: deque[np.ndarray] = deque()
        self.points = np.empty((0, 2))  # cost and guessed loss; guesses of the first of these stay while the model does
        self.guessed = 0                # how many these are

    def ask(self, candidate) -> None:
        self.features.append(self.space.features([candidate])[0])
        self.points = np.append(self.points, [(self.space.cost(candidate), np.nan)], 0)

    def tell(self, loss: float | None) -> None:
        features = self.features.popleft()
        self.points, self.guessed = self.points[1:], max(0, self.guessed - 1)
        if loss is not None:
            self.surrogate.tell(features, loss)

    def ranked(self, candidates: list, survivors: Sequence[Evaluation]) -> list:
        """Best first; as they came while too little was told."""
        fitted = self.surrogate.fitted
        if not survivors or not self.surrogate.fit():
            return candidates
        if self.surrogate.fitted != fitted:
            self.guessed = 0
        losses = self.surrogate.losses(self.space.features(candidates))
        points = np.stack([[self.space.cost(c) for c in candidates], losses], 1)
        known = np.array([(e.cost, e.loss) for e in survivors])
        gains = hypervolume_gains(points, np.concatenate([known, self.expected()]), known.max(0))
        return [candidates[i] for i in np.argsort(-gains, kind="stable")]

    def expected(self) -> np.ndarray:
        """(n, 2) cost and guessed loss of what is being evaluated."""
        if self.guessed < len(self.points):
            unguessed = [*itertools.islice(self.features, self.guessed, None)]
            self.points[self.guessed:, 1] = self.surrogate.losses(np.stack(unguessed))
            self.guessed = len(self.points)
        return self.points


def tmpq_dm(space: SearchSpace, evaluate: Evaluate, rng: np.random.Generator, budget: int, seeds: Sequence) -> list[Evaluation]:
    """TMPQ-DM's evolution as its code has it: generations of 50; the ten of least loss so far are the only parents; 25 mutants
    (p = 0.25 for each gene), 10 uniform crossovers, the rest random. What is beyond the bound, or was asked before, is thrown
    away and tried again, ten times for each one wanted. Cost does not count below the bound.

    The first generation: its seed (quadratic timesteps, 6 bits), 24 mutants of it (p = 0.1), 25 random candidates. The bit
    vectors of those 25 come from a file that was never published; here they are random, and every one of `seeds` is a seed.
    """
    size, top, mutants, crossed, tries = 50, 10, 25, 10, 10
    free, keys, told, best = space.unbounded(), set(map(space.key, seeds)), [], list(seeds)

    def parent():
        return best[int(rng.integers(len(best)))]

    def some(wanted: int, make: Callable) -> Iterator:
        """Up to `wanted` candidates from so many times as many tries."""
        found = (fresh(space, lambda: [make()], keys, tries) for _ in range(wanted))
        return (candidate for candidate in found if candidate is not None)

    def refill(generation: list) -> list:
        while len(generation) < size and (drawn := fresh(space, lambda: [free.sample(rng)], keys)) is not None:
            generation.append(drawn)
        return generation

    generation = [*seeds, *(some(mutants - 1, lambda: free.mutate(parent(), 0.1, rng)) if seeds else ())]
    while generation := refill(generation)[: budget - len(told)]:
        losses = evaluate(generation)
        told += [Evaluation(c, space.cost(c), loss) for c, loss in zip(generation, losses, strict=True)]
        best = [e.candidate for e in sorted((e for e in told if e.loss is not None), key=lambda e: e.loss)[:top]]
        generation = []
        if best:
            generation += some(mutants, lambda: free.mutate(parent(), 0.25, rng))
            generation += some(crossed, lambda: free.crossover(parent(), parent(), rng))
    return told


def survive(evaluated: Sequence[Evaluation], population: int) -> list[Evaluation]:
    """NSGA-II: by rank of the front, within a front the less crowded first; at most `population`."""
    succeeded = [e for e in evaluated if e.loss is not None]
    if not succeeded:
        return []
    objectives = np.array([[e.cost, e.loss] for e in succeeded], float)
    ranks = NonDominatedSorting().do(objectives, return_rank=True)[1]
    order = np.lexsort((-crowding(objectives, ranks), ranks))
    return [succeeded[i] for i in order[:population]]


def crowding(objectives: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(n,) NSGA-II's crowding distance of (n, d) objectives within the front of each (Deb et al. 2002, III B); infinite at the
    ends. All fronts at once: pymoo's is of one."""
    distance = np.zeros(len(ranks))
    for values in objectives.T:
        order = np.lexsort((values, ranks))
        front, values = ranks[order], values[order]
        begins = np.flatnonzero(np.diff(front, prepend=-1))
        sizes = np.diff(begins, append=len(front))
        width = np.repeat(values[begins + sizes - 1] - values[begins], sizes)
        alike = width == 0  # in this objective, which does not tell them apart
        width[alike] = 1.0
        before = np.diff(values, prepend=0.0)
        before[begins] = np.inf
        after = np.append(before[1:], np.inf)
        distance[order] += np.where(alike, 0.0, before / width + after / width)
    return distance / objectives.shape[1]


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
