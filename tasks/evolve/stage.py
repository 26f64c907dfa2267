"""Search timesteps, precision per layer, cache budget, solver and weights for least damage within the goal's bound on cost.

Reads: data (the feature net that guides the search), pretrain_load (teacher), profile (times per layer, for the target
latency), mask_search (which grain pays on the target), distill (its weights), cache_learn (reuse errors, base list).
Writes: recipe.json, the candidate nearest to the teacher's images among all within the bound, its cache plan with weights
learned for its list where that brings it nearer; single.json, recipes for the dense weights: `timesteps` (searched, as many as
the recipe's, fp32) and `precision` (searched, on the base list); pareto.csv; evaluations.jsonl; rounding/, integers for every
layer and width, where rounding is learned. Report: evaluations, hypervolume, the best, the goal.
Left out: quality on the holdout and with fresh noise (fid judges that); the search never sees the second feature net.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.core.artifacts import Inputs, Report, read_json, write_json
from tasks.core.params import Goal, check_choice, check_range
from tasks.core.quality import paired_distance
from tasks.core.recipe import Recipe
from tasks.evolve.costs import bound_of
from tasks.evolve.finalist import with_learned_weights
from tasks.evolve.fitness import TEACHER_INTEGERS, Protocol, calibration_states, open_weights
from tasks.evolve.lab import Lab, key_of, open_lab
from tasks.evolve.problem import STUDENTS, Problem, chosen_grain, read_problem
from tasks.evolve.promote import Contest, Promotion
from tasks.evolve.rounded import write_rounding
from tasks.evolve.search import Evaluation, Strategy, hypervolume, pareto_front, search
from tasks.evolve.space import GROUPINGS, Candidate, Space
from tasks.evolve.standing import Standing
from tasks.runtime.rounding import Rounding
from tasks.runtime.solver import SOLVERS

INPUTS = ("data", "pretrain_load", "profile", "mask_search", "distill", "cache_learn")
CURVE = 10  # points of the hypervolume over evaluations
PROBLEM = ("steps", "grouping", "solvers", "cache_budgets", "cache_masks", "dense_steps", "edge_bits",
           "backend", "batch")  # of Params


@dataclass(frozen=True, kw_only=True)
class Params:
    goal: Goal
    evaluations: int                  # of the search for everything together
    single_evaluations: int           # of each of the two searches for one idea alone
    lookahead: int                    # candidates asked beyond the last one told
    timeout_s: float                  # of one evaluation
    steps: tuple[int, int]            # fewest and most
    grouping: str                     # quadratic | uniform | free
    solvers: tuple[str, ...]
    cache_budgets: tuple[float, ...]  # shares of sublayer evaluations to remove
    cache_masks: tuple[int, ...]      # limits on the distinct step masks of a cache plan
    edge_bits: int                    # fewest of the first and the last layer, where bits are searched
    rounding_steps: int               # of learned rounding, each layer and width; 0: to the nearest integer
    dense_steps: int                  # NFE of the dense model that costs are compared to
    backend: str                      # of the profile's times
    batch: int
    distance_per_loss: float          # distance that stands for a relative FID increase of 1
    seed: int
    protocol: Protocol
    promotion: Promotion
    strategy: Strategy

    def __post_init__(self):
        check_choice("evolve.grouping", self.grouping, (*GROUPINGS, "free"))
        for solver in self.solvers:
            check_choice("evolve.solvers", solver, SOLVERS)
        if len(self.steps) != 2 or not 2 <= self.steps[0] <= self.steps[1] <= 1000:
            raise ValueError(f"evolve.steps: {list(self.steps)} is not [fewest, most] with 2 <= fewest <= most <= 1000")
        if not self.cache_budgets or list(self.cache_budgets) != sorted(set(self.cache_budgets)):
            raise ValueError(f"evolve.cache_budgets: {list(self.cache_budgets)} is not a rising list")
        if not self.cache_masks:
            raise ValueError("evolve.cache_masks: [] is empty; a plan needs a limit, 1 .. 8")
        for name, value, low, high in (("evaluations", self.evaluations, 1, 10**6), ("lookahead", self.lookahead, 1, 10_000),
                                       ("single_evaluations", self.single_evaluations, 1, 10**6),
                                       ("cache_budgets", self.cache_budgets[0], 0, 0.95),
                                       ("cache_budgets", self.cache_budgets[-1], 0, 0.95),
                                       *(("cache_masks", masks, 1, 8) for masks in self.cache_masks),
                                       ("dense_steps", self.dense_steps, 1, 1000), ("edge_bits", self.edge_bits, 3, 8),
                                       ("rounding_steps", self.rounding_steps, 0, 100_000), ("batch", self.batch, 1, 4096),
                                       ("timeout_s", self.timeout_s, 1, 10**6),
                                       ("distance_per_loss", self.distance_per_loss, 0, 10**6)):
            check_range(f"evolve.{name}", value, low, high)
        images, few = self.protocol.images, self.promotion.images
        if few and (few == 1 or few >= images or few % self.protocol.chunk):
            raise ValueError(f"evolve.promotion.images: {few} is neither 0 nor a multiple of protocol.chunk, "
                             f"{self.protocol.chunk}, from 2 to below protocol.images, {images}")

    @property
    def tolerated(self) -> float:
        """Distance that stands for goal.max_quality_loss."""
        return self.distance_per_loss * self.goal.max_quality_loss


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    problem = read_problem(inputs, params.goal, **{name: getattr(params, name) for name in PROBLEM})
    space, student = problem.space(), STUDENTS.get(chosen_grain(inputs))
    lab = open_lab(inputs, student, params.protocol, params.lookahead, params.timeout_s,
                   learned_rounding(params, inputs, student, out), params.promotion.images > 0)
    searches = Searches(params, problem, lab, lab.references(problem.teacher.schedule), np.random.default_rng(params.seed))

    told = searches.of(space, params.evaluations, "evolve")
    best = least_distance(told)
    steps, bits = problem.space_of_timesteps(len(best.candidate.timesteps)), problem.space_of_precision()
    by_steps = searches.of(steps, params.single_evaluations, "evolve timesteps alone")
    by_bits = searches.of(bits, params.single_evaluations, "evolve precision alone")
    single = {"timesteps": (steps, least_distance(by_steps)), "precision": (bits, least_cost(by_bits, params.tolerated))}
    recipe, learned = finalist(best, space.recipe(best.candidate), searches, inputs)

    write_json(out / "recipe.json", recipe.to_json())
    write_json(out / "single.json", {name: within.recipe(e.candidate).to_json() for name, (within, e) in single.items()})
    write_front(out / "pareto.csv", space, pareto_front(told))
    write_evaluations(out / "evaluations.jsonl", space, told, lab.failures)
    return Report({
        "evaluations": len(told), "failed": sum(e.loss is None for e in told), "grain": problem.grain,
        "unit": paired_distance(*searches.references), "best": facts(space, best), "distance_with_learned_weights": learned,
        "hypervolume": growth(told), "goal": goal_facts(params, told, best),
        "single": {name: facts(*found) for name, found in single.items()}})


@dataclass(frozen=True)
class Searches:
    """Searches of one problem in one lab, one after the other from one stream of random numbers."""

    params: Params
    problem: Problem
    lab: Lab
    references: tuple[np.ndarray, np.ndarray]
    rng: np.random.Generator

    def of(self, space: Space, budget: int, label: str) -> list[Evaluation]:
        """As `search` returns them; the log's lines show how they stand."""
        standing, contest = Standing(space.cost), Contest(self.params.promotion, self.references)

        def evaluate(asked: Iterable[Candidate]) -> Iterable[float | None]:
            total = len(asked) if isinstance(asked, Sized) else budget  # a generation, or the whole search
            items = ((c.weights, space.recipe(c), space.cost(c)) for c in standing.asked(asked))
            if self.lab.each_image:
                return standing.told(self.lab.contested(contest, items, total, label, standing.line))
            return standing.told(self.distances((item[:2] for item in items), total, label, standing.line))

        return search(space, evaluate, self.rng, budget, self.params.strategy, self.problem.seeds(space))

    def distances(self, items: Iterable[tuple[str, Recipe]], total: int, label: str,
                  note: Callable[[], str] = str) -> Iterator[float | None]:
        return self.lab.distances(self.references, items, total, label, note)


def learned_rounding(params: Params, inputs: Inputs, student: str | None, out: Path) -> Path | None:
    if params.rounding_steps == 0:
        return None
    opened = open_weights(inputs["pretrain_load"] / "teacher", student and inputs["distill"] / student)
    weights = {TEACHER_INTEGERS if name == "teacher" else student: denoiser for name, denoiser in opened.items()}
    states = {file: list(calibration_states(denoiser, params.protocol)) for file, denoiser in weights.items()}
    folder = out / "rounding"
    write_rounding(weights, states, Rounding(steps=params.rounding_steps), inputs.checkpoint("evolve_rounding"), folder)
    return folder


def finalist(best: Evaluation, recipe: Recipe, searches: Searches, inputs: Inputs) -> tuple[Recipe, float | None]:
    """-> the best's recipe, with weights learned for its list where these bring it nearer; its distance with them, if tried."""
    learn, protocol = read_json(inputs["cache_learn"] / "grid.json").get("learn"), searches.params.protocol
    if recipe.cache is None or learn is None:
        return recipe, None
    first = protocol.images + protocol.calibration_images  # noises that no evaluation sees
    tried = with_learned_weights(recipe, searches.problem.teacher, learn, first, protocol.seed,
                                 inputs.checkpoint("evolve_finalist"))
    learned, = searches.distances([(best.candidate.weights, tried)], 1, "evolve, the best with learned weights")
    return (tried if learned is not None and learned < best.loss else recipe), learned


def least_distance(told: Sequence[Evaluation]) -> Evaluation:
    """The cheaper of equals. Raises ValueError when nothing could be evaluated."""
    succeeded = [e for e in told if e.loss is not None]
    if not succeeded:
        raise ValueError(f"evolve: all {len(told)} evaluations failed; the lines above say why")
    return min(succeeded, key=lambda e: (e.loss, e.cost))


def least_cost(told: Sequence[Evaluation], tolerated: float) -> Evaluation:
    """The cheapest within the tolerated distance, or the one nearest to it."""
    within = [e for e in told if e.loss is not None and e.loss <= tolerated]
    return min(within, key=lambda e: (e.cost, e.loss)) if within else least_distance(told)


def facts(space: Space, e: Evaluation) -> dict:
    recipe = space.recipe(e.candidate)
    return {"cost": e.cost, "distance": e.loss, "nfe": recipe.nfe, "solver": recipe.solver, "weights": e.candidate.weights,
            "removed_share": recipe.cache.removed_share if recipe.cache else 0.0,
            "precisions": dict(sorted(Counter(recipe.precision.values()).items()))}


def goal_facts(params: Params, told: Sequence[Evaluation], best: Evaluation) -> dict:
    """Whether the search's own proxy says that the goal is met, and at what cost the tolerated distance was reached at all."""
    within = [e.cost for e in told if e.loss is not None and e.loss <= params.tolerated]
    return {"target": params.goal.target, "bound": bound_of(params.goal), "tolerated_distance": params.tolerated,
            "met_by_proxy": best.loss <= params.tolerated, "least_cost_within_tolerance": min(within, default=None)}


def growth(told: Sequence[Evaluation]) -> list[list[float]]:
    """[evaluations so far, hypervolume], up to CURVE points. The box ends at the dearest and the farthest of all."""
    succeeded = [e for e in told if e.loss is not None]
    corner = max(e.cost for e in succeeded), max(e.loss for e in succeeded)
    counts = sorted({round(len(told) * (i + 1) / CURVE) for i in range(CURVE)} - {0})
    return [[n, hypervolume(told[:n], corner)] for n in counts]


def write_front(path: Path, space: Space, front: Sequence[Evaluation]) -> None:
    rows = [facts(space, e) for e in front]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cost", "distance", "nfe", "solver", "weights", "removed_share", "precisions"])
        for row in rows:
            counts = " ".join(f"{n}x{token}" for token, n in row.pop("precisions").items())
            writer.writerow([*row.values(), counts])


def write_evaluations(path: Path, space: Space, told: Sequence[Evaluation], failures: Mapping[str, str]) -> None:
    """One JSON line each, by rising cost; `asked` is its place in the search, `failed` why it has no distance.

    `tasks.evolve.table.read_evaluations` makes a DataFrame of it.
    """
    rows = []
    for k, e in enumerate(told):
        recipe = space.recipe(e.candidate)
        failed = {"failed": failures[key_of(e.candidate.weights, recipe)]} if e.loss is None else {}
        rows.append({"asked": k, "cost": e.cost, "distance": e.loss, "recipe": recipe.to_json(), **failed})
    rows.sort(key=lambda row: (row["cost"], row["asked"]))
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
