"""What there is to search on this teacher, for this goal: the upstream artifacts as spaces of candidates."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors.torch import load_file

from tasks.cache_learn.plan import plan_from_costs
from tasks.cache_learn.table import ReuseTable
from tasks.core.artifacts import Inputs, read_json
from tasks.core.cost import layer_costs
from tasks.core.denoiser import Denoiser, load
from tasks.core.latency import Times, read_times
from tasks.core.params import Goal
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import SPACINGS, dense_recipe, spaced_timesteps
from tasks.core.sparsity import kept_shares
from tasks.evolve.costs import (
    RecipeCost,
    bitops_share,
    bound_of,
    edges,
    latency,
    precision_menus,
    quantisable,
    weights_bytes,
)
from tasks.evolve.space import Candidate, Space
from tasks.runtime.solver import solver_steps

STUDENTS = {"unit": "student_unit.safetensors", "2:4": "student_2_4.safetensors"}
MASKS = {"unit": "masks_unit.safetensors", "2:4": "masks_2_4.safetensors"}  # the frozen ones, after training
SEED_LEVELS = {"latency": (0.0,), "bitops": (0.6, 1.0), "size": (0.6, 1.0)}  # places in the menus: int8; w6a6, w8a8

Planner = Callable[[tuple[int, ...], str, float, tuple[int, str]], CachePlan | None]  # timesteps, solver, budget, reuse


@dataclass(frozen=True, kw_only=True)
class Problem:
    teacher: Denoiser
    goal: Goal
    grain: str | None               # of the weights that are compressed; None: the teacher's own
    sparsity: Mapping | None        # as in a recipe
    base: tuple[int, ...]           # cache_learn's timesteps
    layers: tuple[str, ...]         # that can be quantised
    menus: tuple[tuple[str, ...], ...]
    plan: Planner
    cost: RecipeCost
    limits: Mapping = field(default_factory=dict)  # arguments of Space: steps, grouping, solvers, cache, reuse

    @property
    def weights(self) -> tuple[str, ...]:
        return ("teacher",) if self.grain is None else ("student", "teacher")

    def space(self) -> Space:
        """Everything together. Raises ValueError when nothing in it meets the goal."""
        recipe = functools.partial(to_recipe, layers=self.layers, sparsity=self.sparsity, plan=self.plan)
        space = Space(horizon=self.teacher.schedule.steps, menus=self.menus, recipe=recipe, recipe_cost=self.cost,
                      bound=bound_of(self.goal), weights=self.weights, **self.limits)
        check_feasible(self.goal, space)
        return space

    def space_of_timesteps(self, steps: int) -> Space:
        """Solvers and lists of so many timesteps, for the dense weights at fp32."""
        return self.without_bound(menus=(), cache=(0.0,), steps=(steps, steps), layers=())

    def space_of_precision(self) -> Space:
        """Precisions of the dense weights on the base list."""
        return self.without_bound(timesteps=self.base, cache=(0.0,), solvers=("ddim",), layers=self.layers)

    def without_bound(self, layers: tuple[str, ...], **changes) -> Space:
        recipe = functools.partial(to_recipe, layers=layers, sparsity=None, plan=self.plan)
        return replace(self.space(), recipe=recipe, bound=float("inf"), weights=("teacher",), **changes)

    def seeds(self, space: Space) -> list[Candidate]:
        """What anyone would try: all solvers, spacings and weights at one precision, with as many steps as the bound allows."""
        levels = SEED_LEVELS[self.goal.target] if space.menus else (0.0,)
        choices = itertools.product(SPACINGS, space.solvers, levels, space.weights)
        found = [self.widest(space, *choice) for choice in choices]
        return [candidate for candidate in found if candidate is not None]

    def widest(self, space: Space, spacing: str, solver: str, level: float, weights: str) -> Candidate | None:
        genes = tuple(menu[round(level * (len(menu) - 1))] for menu in space.menus)
        fewest, most = space.steps
        for steps in range(most, fewest - 1, -1):
            timesteps = space.timesteps or spaced_timesteps(self.teacher.schedule, steps, spacing)
            candidate = Candidate(timesteps, genes, space.cache[0], solver, weights, space.reuse[0])
            if space.cost(candidate) <= space.bound:
                return candidate
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
    times = read_times(inputs["profile"], backend, batch, grain) if goal.target == "latency" else None
    return Problem(
        teacher=teacher, goal=goal, grain=grain, sparsity=sparsity_of(teacher, grain, inputs), layers=layers,
        base=tuple(read_json(inputs["cache_learn"] / "plan.json")["timesteps"]),
        menus=precision_menus(goal.target, layers, times, dict.fromkeys(edges(teacher), edge_bits)),
        plan=planner(ReuseTable.read(inputs["cache_learn"]), teacher),
        cost=cost_of(goal.target, teacher, dense, times),
        limits={"steps": steps, "grouping": grouping, "solvers": solvers, "cache": cache_budgets,
                "reuse": kinds_of_reuse(inputs["cache_learn"], cache_masks)})


def chosen_grain(inputs: Inputs) -> str | None:
    chosen = read_json(inputs["mask_search"] / "choice.json")["chosen"]
    return chosen if chosen in STUDENTS else None


def sparsity_of(teacher: Denoiser, grain: str | None, inputs: Inputs) -> dict | None:
    """The recipe's entry for the masks that are live in the student."""
    if grain is None:
        return None
    masks = load_file(inputs["distill"] / MASKS[grain])
    return {"grain": grain, "density": kept_shares(teacher.model, grain, {name: mask.bool() for name, mask in masks.items()})}


def kinds_of_reuse(folder: Path, cache_masks: tuple[int, ...]) -> tuple[tuple[int, str], ...]:
    """Limits on distinct step masks, of which one is enough where all blocks are skipped at once, with each forecast: the
    one that cache_learn has for any list, and none."""
    grid = read_json(folder / "grid.json")
    limits = cache_masks if len(grid["sublayers"]) > 1 else (max(cache_masks),)
    return tuple(itertools.product(limits, dict.fromkeys((grid["forecast"], "none"))))


def planner(table: ReuseTable, teacher: Denoiser) -> Planner:
    """Cache plans for any timestep list from cache_learn's table."""
    @functools.lru_cache(maxsize=4096)
    def plan(timesteps: tuple[int, ...], solver: str, budget: float, reuse: tuple[int, str]) -> CachePlan | None:
        if budget == 0:
            return None
        masks, forecast = reuse
        costs = table.costs(solver_steps(teacher.schedule.config, timesteps, solver))
        return table.forecasting(plan_from_costs(costs, table.sublayers, budget, masks), forecast, timesteps)

    return plan


def cost_of(target: str, teacher: Denoiser, dense: Recipe, times: Times | None) -> RecipeCost:
    costs = layer_costs(teacher)
    if target == "latency":
        return latency(costs, times, dense)
    if target == "bitops":
        return bitops_share(costs, dense)
    return weights_bytes(costs, sum(p.numel() for p in teacher.model.parameters()))


def to_recipe(candidate: Candidate, layers: Sequence[str], sparsity: Mapping | None, plan: Planner) -> Recipe:
    return Recipe(timesteps=candidate.timesteps, solver=candidate.solver,
                  precision=precision_of(candidate.genes, tuple(layers)),
                  sparsity=sparsity if candidate.weights == "student" else None,
                  cache=plan(candidate.timesteps, candidate.solver, candidate.cache, candidate.reuse))


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
