"""What there is to search on this teacher, for this goal: the upstream artifacts as spaces of candidates."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tasks.cache_learn.plan import plan_from_costs
from tasks.cache_learn.table import ReuseTable
from tasks.core.artifacts import Inputs, read_json
from tasks.core.cost import layer_costs
from tasks.core.denoiser import Denoiser, load
from tasks.core.latency import Times, read_times
from tasks.core.params import Goal
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import SPACINGS, dense_recipe, spaced_timesteps
from tasks.evolve.costs import (
    LATENCY_CLASSES,
    RecipeCost,
    bitops_share,
    bound_of,
    edges,
    latency,
    precision_menus,
    quantisable,
    weights_bytes,
)
from tasks.evolve.space import Candidate, Space, resize
from tasks.evolve.weights import STUDENTS, TEACHER, Weights, read_weights
from tasks.runtime.solver import SolverStep, recipe_steps

SEED_BITS = (8, 6)  # of every layer in what a search for bits starts from

Rows = tuple[SolverStep, ...] | None
Planner = Callable[[tuple[int, ...], str, Rows, float, tuple[int, str]], CachePlan | None]  # sampling, budget, reuse
Genes = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Problem:
    teacher: Denoiser
    goal: Goal
    weights: Mapping[str, Weights]  # that may be chosen, by name
    base: tuple[int, ...]           # cache_learn's timesteps
    layers: tuple[str, ...]         # that can be quantised
    menus: tuple[tuple[str, ...], ...]
    plan: Planner
    cost: RecipeCost
    spacings: tuple[str, ...] = SPACINGS  # of the lists that a search starts from
    limits: Mapping = field(default_factory=dict)  # arguments of Space: steps, grouping, solvers, cache, reuse

    def space(self) -> Space:
        """Everything together. Raises ValueError when nothing in it meets the goal."""
        recipe = functools.partial(to_recipe, layers=self.layers, weights=self.weights, plan=self.plan)
        own = {name: {solver: one.timesteps for solver, one in found.own.items()} for name, found in self.weights.items()}
        space = Space(horizon=self.teacher.schedule.steps, menus=self.menus, recipe=recipe, recipe_cost=self.cost,
                      bound=bound_of(self.goal), weights=tuple(self.weights), own=own,
                      tied=frozenset(name for name, found in self.weights.items() if found.tied), **self.limits)
        check_feasible(self.goal, space)
        return space

    def space_of_timesteps(self, steps: int) -> Space:
        """Solvers and lists of so many timesteps, for the dense weights at fp32."""
        return self.without_bound(menus=(), cache=(0.0,), steps=(steps, steps), layers=())

    def space_of_precision(self) -> Space:
        """Precisions of the dense weights on the base list."""
        return self.without_bound(timesteps=self.base, cache=(0.0,), solvers=("ddim",), layers=self.layers)

    def without_bound(self, layers: tuple[str, ...], **changes) -> Space:
        recipe = functools.partial(to_recipe, layers=layers, weights={TEACHER: Weights()}, plan=self.plan)
        return replace(self.space(), recipe=recipe, bound=float("inf"), weights=(TEACHER,), own={}, **changes)

    def seeds(self, space: Space) -> list[Candidate]:
        """What a search starts from, all at one precision: every solver and student that was learned, what anyone would try
        (`dull`), and the same of students that any list samples. Where precisions are a few classes what is dull is at the
        fastest one alone: `stage.Searches.challengers` tries the nearest of it at all."""
        genes = self.seed_genes(space)
        tried = genes[-1:] if self.goal.target == "latency" and space.timesteps is None else genes
        learned = [Candidate(timesteps, each, space.cache[0], solver, weights, space.reuse[0])
                   for weights, own in space.own.items() for solver, timesteps in own.items() for each in genes]
        others = [weights for weights in space.weights if weights != TEACHER and weights not in space.tied]
        widest = [self.widest(space, spacing, solver, genes[-1], weights, space.bound)
                  for weights in others for spacing, solver in itertools.product(self.spacings, space.solvers)]
        dull = [c for (*_, each), c in self.dull(space, space.bound).items() if each in tried]
        found = [*(c for c in learned if space.cost(c) <= space.bound), *dull, *filter(None, widest)]
        return list({space.key(candidate): candidate for candidate in found}.values())

    def dull(self, space: Space, cost: float) -> dict[tuple[str, str, Genes], Candidate]:
        """What anyone would try, by spacing, solver and genes: dense weights, one precision, as many steps as `cost` allows."""
        choices = itertools.product(self.spacings, space.solvers, self.seed_genes(space))
        found = {choice: self.widest(space, *choice, TEACHER, cost) for choice in choices}
        return {choice: candidate for choice, candidate in found.items() if candidate is not None}

    def widest(self, space: Space, spacing: str, solver: str, genes: Genes, weights: str, cost: float) -> Candidate | None:
        fewest, most = space.steps
        for steps in range(most, fewest - 1, -1):
            timesteps = space.timesteps or spaced_timesteps(self.teacher.schedule, steps, spacing)
            candidate = Candidate(timesteps, genes, space.cache[0], solver, weights, space.reuse[0])
            if space.cost(candidate) <= cost:
                return candidate
        return None

    def uniform(self, space: Space, bits: Sequence[int] = range(8, 2, -1)) -> list[Genes]:
        """One precision for all layers, the most accurate first. bits: where bits are searched, as far as a layer has them."""
        if not space.menus:
            return [()]
        if self.goal.target == "latency":
            return [(token,) * len(space.menus) for token in reversed(LATENCY_CLASSES)]
        return [tuple(menu[max(0, len(menu) - 1 - (8 - b))] for menu in space.menus) for b in bits]

    def seed_genes(self, space: Space) -> list[Genes]:
        """Of these the ones that are cheaper than every more accurate one, the cheapest last."""
        cheapest, least, kept = space.cheapest(), float("inf"), []
        for each in self.uniform(space, SEED_BITS):
            if (cost := space.cost(replace(cheapest, genes=each))) < least:
                kept, least = [*kept, each], cost
        return kept

    def siblings(self, space: Space, candidate: Candidate) -> list[Candidate]:
        """The same but for its precision, which is one for all layers."""
        return [replace(candidate, genes=genes) for genes in self.uniform(space)]

    def wider(self, space: Space, candidate: Candidate) -> Candidate | None:
        """The same course of timesteps in as many steps as the bound allows, where those are searched and it is not so yet."""
        searched = space.timesteps is None and candidate.solver in space.solvers
        for steps in range(space.steps[1], len(candidate.timesteps), -1) if searched else ():
            found = replace(candidate, timesteps=resize(candidate.timesteps, steps))
            if space.cost(found) <= space.bound:
                return found
        return None


def read_problem(inputs: Inputs, goal: Goal, *, steps: tuple[int, int], grouping: str, solvers: tuple[str, ...],
                 cache_budgets: tuple[float, ...], cache_masks: tuple[int, ...], dense_steps: int, edge_bits: int,
                 backend: str, batch: int) -> Problem:
    teacher = load(inputs["pretrain_load"] / "teacher")
    if steps[1] > teacher.schedule.steps:
        raise ValueError(f"evolve.steps: {list(steps)} wants up to {steps[1]} timesteps, one from each group, but the "
                         f"teacher's noise schedule has {teacher.schedule.steps}")
    grain = chosen_grain(inputs)
    layers = tuple(c.name for c in layer_costs(teacher) if quantisable(c))
    dense = dense_recipe(teacher.schedule, dense_steps)
    weights = read_weights(inputs, teacher, grain)
    grains = {None, *(found.sparsity["grain"] for found in weights.values() if found.sparsity)}
    times = {each: read_times(inputs["profile"], backend, batch, each) for each in grains if goal.target == "latency"}
    return Problem(
        teacher=teacher, goal=goal, weights=weights, layers=layers,
        base=tuple(read_json(inputs["cache_learn"] / "plan.json")["timesteps"]),
        menus=precision_menus(goal.target, layers, times.get(None), dict.fromkeys(edges(teacher), edge_bits)),
        plan=planner(ReuseTable.read(inputs["cache_learn"]), teacher),
        cost=cost_of(goal.target, teacher, dense, times),
        limits={"steps": steps, "grouping": grouping, "solvers": solvers, "cache": cache_budgets,
                "reuse": kinds_of_reuse(inputs["cache_learn"], cache_masks)})


def chosen_grain(inputs: Inputs) -> str | None:
    chosen = read_json(inputs["mask_search"] / "choice.json")["chosen"]
    return chosen if chosen in STUDENTS else None


def kinds_of_reuse(folder: Path, cache_masks: tuple[int, ...]) -> tuple[tuple[int, str], ...]:
    """Limits on distinct step masks, of which one is enough where all blocks are skipped at once, with each forecast: the
    one that cache_learn has for any list, and none."""
    grid = read_json(folder / "grid.json")
    limits = cache_masks if len(grid["sublayers"]) > 1 else (max(cache_masks),)
    return tuple(itertools.product(limits, dict.fromkeys((grid["forecast"], "none"))))


def planner(table: ReuseTable, teacher: Denoiser) -> Planner:
    """Cache plans for any timestep list and solver from cache_learn's table, which is the dense teacher's."""
    @functools.lru_cache(maxsize=4096)
    def plan(timesteps: tuple[int, ...], solver: str, rows: Rows, budget: float, reuse: tuple[int, str]) -> CachePlan | None:
        if budget == 0:
            return None
        masks, forecast = reuse
        steps = recipe_steps(teacher.schedule.config, {"timesteps": timesteps, "solver": solver, "rows": rows})
        costs = table.costs(steps)
        return table.forecasting(plan_from_costs(costs, table.sublayers, budget, masks), forecast, timesteps)

    return plan


def cost_of(target: str, teacher: Denoiser, dense: Recipe, times: Mapping[str | None, Times]) -> RecipeCost:
    """times: with weights of each grain that there is, None: dense ones; read where the target is latency."""
    costs = layer_costs(teacher)
    if target == "latency":
        of_grain = {grain: latency(costs, found, dense) for grain, found in times.items()}
        return lambda recipe: of_grain[recipe.sparsity and recipe.sparsity["grain"]](recipe)
    if target == "bitops":
        return bitops_share(costs, dense)
    return weights_bytes(costs, sum(p.numel() for p in teacher.model.parameters()))


def to_recipe(candidate: Candidate, layers: Sequence[str], weights: Mapping[str, Weights], plan: Planner) -> Recipe:
    found = weights[candidate.weights]
    learned = found.own.get(candidate.solver)
    sampling = learned.sampling if learned else {"timesteps": candidate.timesteps, "solver": candidate.solver, "rows": None}
    return Recipe(**sampling, precision=precision_of(candidate.genes, tuple(layers)), sparsity=found.sparsity,
                  cache=plan(*sampling.values(), candidate.cache, candidate.reuse))


@functools.lru_cache(maxsize=4096)
def precision_of(genes: tuple[str, ...], layers: tuple[str, ...]) -> Mapping[str, str]:
    """A layer's token is made of its genes: "w8a8", or "w4" and "a6". One and the same for all recipes that have it: a search
    asks a dozen times for every candidate."""
    each = len(genes) // max(1, len(layers))
    tokens = list(map("".join, zip(*[iter(genes)] * each, strict=True)))
    found = dict(zip(layers, tokens, strict=True))
    return {layer: token for layer, token in found.items() if token != "fp32"} if "fp32" in tokens else found


def check_feasible(goal: Goal, space: Space) -> None:
    """The preflight of the goal: one line, with the nearest that the space reaches."""
    cheapest = space.cheapest()
    least = space.cost(cheapest)
    if least <= space.bound:
        return
    key = {"latency": "min_speedup", "bitops": "max_bitops", "size": "max_size"}[goal.target]
    reached = 1 / least if goal.target == "latency" else least
    raise ValueError(f"goal.{key}: {getattr(goal, key)} is out of reach; the nearest feasible is {reached:.6g}, with "
                     f"{len(cheapest.timesteps)} steps (evolve.steps), the cheapest precision of every layer and a cache "
                     f"budget of {cheapest.cache:g} (evolve.cache_budgets)")
