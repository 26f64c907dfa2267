"""The space that is searched: timesteps, per-layer precision, cache budget, solver and weights; what may be changed, how.

A genome is a `Candidate`. TMPQ-DM (arXiv 2404.09532, its code) searches timesteps and bits, a gene for the weights and one for
the activations of every layer, under a bound on BitOPs; here the number of steps, the cache, the solver and the weights are
searched too. Its candidates beyond the bound are thrown away, ours are repaired: at a tight bound nearly all are beyond it.

A learned solver brings its own timesteps; a student that was trained for few steps is sampled by its own solver alone. So which
solvers there are depends on the weights, and whether timesteps are searched depends on the solver.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tasks.core.params import check_choice
from tasks.core.recipe import Recipe
from tasks.core.sampler import strictly_decreasing

GROUPINGS = {"quadratic": 2.0, "uniform": 1.0}  # exponent of the groups' boundaries; "free" has no groups
COURSE = 6  # places along the trajectory at which a surrogate sees the timestep


@dataclass(frozen=True)
class Candidate:
    timesteps: tuple[int, ...]   # strictly decreasing
    genes: tuple[str, ...]       # one choice from each of the space's menus
    cache: float                 # share of sublayer evaluations that the cache plan is to remove
    solver: str                  # a classical one, or one that belongs to the weights and whose timesteps these are
    weights: str = "teacher"     # teacher, or a student's name
    reuse: tuple[int, str] = (4, "none")  # of the cache plan: most distinct step masks, forecast


@dataclass(frozen=True, kw_only=True)
class Space:
    """What can be searched, and the two things that a search must know of a candidate beforehand: its recipe and its cost."""

    horizon: int                          # T of the noise schedule
    steps: tuple[int, int]                # fewest and most
    menus: tuple[tuple[str, ...], ...]    # choices of each gene, cheapest first
    cache: tuple[float, ...]              # menu of cache budgets, rising
    solvers: tuple[str, ...]
    recipe: Callable[[Candidate], Recipe]
    recipe_cost: Callable[[Recipe], float]
    bound: float = float("inf")           # of the cost; every candidate that the space makes is within it
    grouping: str = "quadratic"           # prior of random timestep lists: quadratic | uniform | free
    timesteps: tuple[int, ...] | None = None  # the only list there is, if it is not searched
    weights: tuple[str, ...] = ("teacher",)   # a student has to earn its place against the dense weights
    own: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)  # weights -> their solvers -> timesteps
    tied: frozenset[str] = frozenset()        # weights that only their own solvers sample
    reuse: tuple[tuple[int, str], ...] = ((4, "none"),)  # kinds of cache plans; which is the best for a list is found by trying

    def __post_init__(self):
        check_choice("grouping", self.grouping, (*GROUPINGS, "free"))

    def cost(self, candidate: Candidate) -> float:
        return self._cost(candidate)

    @functools.cached_property
    def _cost(self) -> Callable[[Candidate], float]:
        """A candidate's cost is asked for where it is repaired, ranked, asked and told."""
        return functools.lru_cache(maxsize=4096)(lambda candidate: self.recipe_cost(self.recipe(candidate)))

    def key(self, candidate: Candidate) -> Hashable:
        """Equal for candidates of one recipe: two cache budgets may come to the same plan."""
        recipe = self.recipe(candidate)
        return candidate.weights, *recipe.sampling.values(), recipe.cache, tuple(recipe.precision.items())

    def solvers_of(self, weights: str) -> tuple[str, ...]:
        return (() if weights in self.tied else self.solvers) + tuple(self.own.get(weights, ()))

    @functools.cached_property
    def every_solver(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.solvers, *(name for found in self.own.values() for name in found))))

    def settled(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """The nearest that there is: a solver that its weights have, and timesteps that the solver has."""
        menu = self.solvers_of(candidate.weights)
        solver = candidate.solver if candidate.solver in menu else choose(menu, rng)
        timesteps = self.own.get(candidate.weights, {}).get(solver) or self.timesteps
        if timesteps is None:
            steps = min(max(len(candidate.timesteps), self.steps[0]), self.steps[1])
            timesteps = resize(candidate.timesteps, steps)
        return replace(candidate, solver=solver, timesteps=timesteps)

    def unbounded(self) -> "Space":
        return replace(self, bound=float("inf"))

    def features(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """(n, d) what the logarithm of a loss is about linear in, for `Surrogate`.

        A choice counts half of the next cheaper one, as the rounding error of a bit more, and one that is on no menu as the
        cheapest. Genes with one menu also count together, so that before a gene is known it is taken for one like the others.
        """
        damages, together = self._damages
        damage = np.array([[known.get(gene, 1.0) for known, gene in zip(damages, c.genes, strict=True)] for c in candidates])
        damage = damage.reshape(len(candidates), len(self.menus))
        course = np.array([course_of(c.timesteps) for c in candidates]) / self.horizon
        rest = np.array([self.other_features(c) for c in candidates], float)
        return np.concatenate([damage, damage @ together, course, course**2, rest], 1)

    def other_features(self, candidate: Candidate) -> list[float]:
        steps, solver = len(candidate.timesteps), [candidate.solver == s for s in self.every_solver]
        kind = [candidate.cache * (candidate.reuse == reuse) for reuse in self.reuse]
        weights = [candidate.weights == w for w in self.weights]
        return [*solver, *(s / steps for s in solver), *kind, math.log(steps), *weights]

    @functools.cached_property
    def _damages(self) -> tuple[list[dict[str, float]], np.ndarray]:
        """For every gene what each of its choices counts; (genes, distinct menus) 1 where a gene has the menu."""
        distinct = list(dict.fromkeys(self.menus))
        together = np.array([[menu == other for other in distinct] for menu in self.menus], float)
        return ([{choice: 2.0**-rank for rank, choice in enumerate(menu)} for menu in self.menus],
                together.reshape(len(self.menus), len(distinct)))

    def cheapest(self) -> Candidate:
        """The fewest steps, the cheapest choice of every gene, the largest cache budget, the cheapest weights and solver."""
        evenly = np.linspace(self.horizon - 1, 0, self.steps[0], endpoint=False).astype(int)
        searched, genes = self.timesteps or strictly_decreasing(evenly), tuple(menu[0] for menu in self.menus)
        every = (Candidate(self.own.get(weights, {}).get(solver, searched), genes, self.cache[-1], solver, weights,
                           self.reuse[0]) for weights in self.weights for solver in self.solvers_of(weights))
        return min(every, key=self.cost)

    def sample(self, rng: np.random.Generator) -> Candidate:
        """A random candidate, repaired."""
        steps = int(rng.integers(self.steps[0], self.steps[1] + 1))
        timesteps = self.timesteps or sample_timesteps(self.horizon, steps, self.grouping, rng)
        drawn = rng.integers([len(menu) for menu in self.menus]).tolist()  # a hundred genes, faster than one by one
        genes = tuple([menu[i] for menu, i in zip(self.menus, drawn, strict=True)])
        cache, weights, reuse = choose(self.cache, rng), choose(self.weights, rng), choose(self.reuse, rng)
        solver = choose(self.solvers_of(weights), rng)
        return self.repair(self.settled(Candidate(timesteps, genes, cache, solver, weights, reuse), rng), rng)

    def mutate(self, parent: Candidate, probability: float, rng: np.random.Generator) -> Candidate:
        """Each gene changes with this probability, timesteps and their number included; repaired."""
        def maybe(menu: tuple, now):
            return choose(menu, rng) if rng.random() < probability else now

        timesteps = self.timesteps or mutate_timesteps(parent.timesteps, self.horizon, self.steps, probability, rng)
        draw = rng.random  # a hundred genes, for every offspring
        genes = tuple([choose(menu, rng) if draw() < probability else gene
                       for menu, gene in zip(self.menus, parent.genes, strict=True)])
        cache, weights = maybe(self.cache, parent.cache), maybe(self.weights, parent.weights)
        reuse = maybe(self.reuse, parent.reuse)
        solver = maybe(self.solvers_of(weights), parent.solver)
        return self.repair(self.settled(Candidate(timesteps, genes, cache, solver, weights, reuse), rng), rng)

    def crossover(self, a: Candidate, b: Candidate, rng: np.random.Generator) -> Candidate:
        """Uniform crossover, p = 1/2 for each gene; repaired."""
        def either(x, y):
            return x if rng.random() < 0.5 else y

        timesteps = cross_timesteps(a.timesteps, b.timesteps, rng)
        genes = tuple([x if drawn < 0.5 else y for drawn, x, y in
                       zip(rng.random(len(self.menus)).tolist(), a.genes, b.genes, strict=True)])
        rest = (either(a.cache, b.cache), either(a.solver, b.solver), either(a.weights, b.weights),
                either(a.reuse, b.reuse))
        return self.repair(self.settled(Candidate(timesteps, genes, *rest), rng), rng)

    def repair(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """Cheapen at random, as little as needed, until the cost is within the bound."""
        while (cost := self.cost(candidate)) > self.bound:
            moves = list(self.cheaper(candidate, rng))
            cheaper = (moves[i] for i in rng.permutation(len(moves)) if self.cost(moves[i]) < cost)
            found = next(cheaper, None)
            if found is None:
                return self.cheapest()
            candidate = found
        return candidate

    def cheaper(self, candidate: Candidate, rng: np.random.Generator) -> Iterator[Candidate]:
        """One step less, or the solver of the next fewer steps where it is one of their own; a quarter of the genes one choice
        down; the next larger cache budget; other weights: as far as there are such."""
        steps, own = len(candidate.timesteps), self.own.get(candidate.weights, {})
        if candidate.solver in own:
            fewer = [(len(timesteps), solver) for solver, timesteps in own.items() if len(timesteps) < steps]
            if fewer:
                yield self.settled(replace(candidate, solver=max(fewer)[1]), rng)
        elif self.timesteps is None and steps > self.steps[0]:
            dropped = int(rng.integers(1, steps))  # the first stays: it is where the noise is
            yield replace(candidate, timesteps=candidate.timesteps[:dropped] + candidate.timesteps[dropped + 1:])
        genes = list(candidate.genes)
        above = [i for i, (menu, gene) in enumerate(zip(self.menus, genes, strict=True)) if gene != menu[0]]
        if above:
            for i in rng.choice(above, max(1, len(above) // 4), replace=False).tolist():
                menu = self.menus[i]
                genes[i] = menu[menu.index(genes[i]) - 1] if genes[i] in menu else menu[0]
            yield replace(candidate, genes=tuple(genes))
        if candidate.cache < self.cache[-1]:
            yield replace(candidate, cache=self.cache[self.cache.index(candidate.cache) + 1])
        if others := tuple(weights for weights in self.weights if weights != candidate.weights):
            yield self.settled(replace(candidate, weights=choose(others, rng)), rng)


def course_of(timesteps: tuple[int, ...]) -> np.ndarray:
    """(COURSE,) timesteps at evenly spaced places along the trajectory."""
    steps = len(timesteps)
    return np.interp(np.arange(COURSE) * (steps / COURSE), np.arange(steps + 1), [*timesteps, 0])


def choose(menu: tuple, rng: np.random.Generator):
    return menu[int(rng.integers(len(menu)))]


def sample_timesteps(horizon: int, steps: int, grouping: str, rng: np.random.Generator) -> tuple[int, ...]:
    """`steps` distinct timesteps in [0, horizon): one of each group, or any.

    The boundaries of the groups are horizon (i / steps)^2 (TMPQ-DM's "quad"; arXiv 2010.02502, appendix D.2), or evenly spaced.
    """
    if grouping == "free":
        return tuple(sorted(rng.choice(horizon, steps, replace=False).tolist(), reverse=True))
    bounds = horizon * (np.arange(steps + 1) / steps) ** GROUPINGS[grouping]
    drawn = rng.uniform(bounds[:-1], bounds[1:])
    return strictly_decreasing(np.minimum(drawn[::-1], horizon - 1).astype(int))


def mutate_timesteps(timesteps: tuple[int, ...], horizon: int, bounds: tuple[int, int], probability: float,
                     rng: np.random.Generator) -> tuple[int, ...]:
    """Each timestep moves anywhere between its neighbours with this probability; so does the number of steps, by one."""
    moved = list(timesteps)
    for i in range(len(moved)):
        if rng.random() < probability:
            low = moved[i + 1] + 1 if i + 1 < len(moved) else 0
            high = moved[i - 1] if i else horizon
            moved[i] = int(rng.integers(low, high))
    if rng.random() < probability:
        wanted = int(np.clip(len(moved) + rng.choice((-1, 1)), *bounds))
        return resize(tuple(moved), wanted)
    return tuple(moved)


def cross_timesteps(a: tuple[int, ...], b: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
    """As many steps as one of the parents; each from either parent, by its place in the trajectory."""
    steps = len(a if rng.random() < 0.5 else b)
    pairs = zip(resize(a, steps), resize(b, steps), strict=True)
    return strictly_decreasing(sorted((pair[int(rng.random() < 0.5)] for pair in pairs), reverse=True))


def resize(timesteps: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """The same course of timesteps in another number of steps, from the same first one."""
    if steps == len(timesteps):
        return timesteps
    course = [*timesteps, 0]  # a trajectory ends at x0, one step after the last timestep
    places = np.linspace(0, len(timesteps), steps, endpoint=False)
    return strictly_decreasing(np.interp(places, np.arange(len(course)), course).round().astype(int))
