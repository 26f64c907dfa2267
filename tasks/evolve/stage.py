"""Search timesteps, precision per layer, cache budget, solver and weights for what the verdict asks for.

Reads: data (the feature net that guides the search), pretrain_load (teacher, bank), profile (times per layer, for the target
latency), mask_search (which grain pays on the target), distill (students), cache_learn (reuse errors, base list), solver_learn
(solvers).
Writes: recipe.json, the cheapest candidate within the bound that the proxy says for certain to hold the quality, the nearest to
the teacher where there is none (`tasks/evolve/choice.py`), its cache plan with weights learned for its list where that brings
it nearer; weights.json, which weights it is for; single.json, recipes for the dense weights: `timesteps` (searched, as many as
the recipe's, fp32) and `precision` (searched, on the base list); pareto.csv; evaluations.jsonl; rounding/, integers for every
layer and width, where rounding is learned. Report: evaluations, hypervolume, what was chosen and why, the goal, and whether
what anyone would try is as near at the same cost.
Left out: quality on the holdout and with fresh noise (fid judges that); the search never sees the second feature net.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tasks.core.artifacts import Inputs, Report, read_json, write_json
from tasks.core.params import Goal, check_choice, check_different, check_range
from tasks.core.quality import Difference, Gaussian, features, paired_distance
from tasks.core.recipe import Recipe
from tasks.data.features import load_feature_net
from tasks.evolve.choice import Choice, choose
from tasks.evolve.costs import bound_of
from tasks.evolve.finalist import with_learned_weights
from tasks.evolve.finals import Final, Finals, decide, finalists, judge_finals
from tasks.evolve.fitness import Protocol, base_of, calibration_states, integers_file, open_weights, reference_items
from tasks.evolve.lab import Lab, key_of, open_lab, succeeded
from tasks.evolve.problem import Problem, read_problem
from tasks.evolve.promote import Contest, Promotion
from tasks.evolve.proxy import LEAST_IMAGES, PROXIES
from tasks.evolve.rounded import write_rounding
from tasks.evolve.search import Evaluation, Strategy, hypervolume, pareto_front, search
from tasks.evolve.space import GROUPINGS, Candidate, Space
from tasks.evolve.standing import Standing
from tasks.evolve.weights import Weights
from tasks.runtime.rounding import Rounding
from tasks.runtime.solver import SOLVERS

INPUTS = ("data", "pretrain_load", "profile", "mask_search", "solver_learn", "distill", "cache_learn")
CURVE = 10   # points of the hypervolume over evaluations
FINAL_DIGITS = 4  # of features that a log keeps of finalists
ROUNDS = 5   # of looking for something better than what would be chosen, at its own cost
FAMILIES = 3 # of dull solvers and spacings, the nearest ones, that are tried at that cost
PROBLEM = ("steps", "grouping", "solvers", "cache_budgets", "cache_masks", "dense_steps", "edge_bits",
           "backend", "batch")  # of Params


@dataclass(frozen=True, kw_only=True)
class Params:
    goal: Goal
    evaluations: int                  # of the search for everything together, beyond what it starts from
    single_evaluations: int           # of each of the two searches for one idea alone, the same
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
    finals: Finals
    proxy: str                        # paired | frechet | sum
    seed: int
    protocol: Protocol
    promotion: Promotion
    strategy: Strategy

    def __post_init__(self):
        check_choice("evolve.grouping", self.grouping, (*GROUPINGS, "free"))
        check_choice("evolve.proxy", self.proxy, PROXIES)
        check_different("evolve.solvers", self.solvers)
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
        if self.proxy != "paired" and images < LEAST_IMAGES:
            raise ValueError(f"evolve.protocol.images: {images} is below {LEAST_IMAGES}, which proxy {self.proxy} needs")
        if self.proxy != "paired" and few:
            raise ValueError(f"evolve.promotion.images: {few} is not 0: by proxy {self.proxy} an image has no loss of its own")
        if few and (few == 1 or few >= images or few % self.protocol.chunk):
            raise ValueError(f"evolve.promotion.images: {few} is neither 0 nor a multiple of protocol.chunk, "
                             f"{self.protocol.chunk}, from 2 to below protocol.images, {images}")

    @property
    def tolerated(self) -> float:
        """Distance that stands for goal.max_quality_loss."""
        return self.distance_per_loss * self.goal.max_quality_loss


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    problem = read_problem(inputs, params.goal, **{name: getattr(params, name) for name in PROBLEM})
    space = problem.space()
    rounding = learned_rounding(params, inputs, problem.weights, out)
    bank = None if params.proxy == "paired" else read_gaussian(inputs["pretrain_load"] / "bank.npy", inputs)

    def opened(protocol: Protocol, timeout_s: float) -> Lab:
        return open_lab(inputs, problem.weights, protocol, params.lookahead, timeout_s, rounding, params.proxy, bank)

    lab, rng = opened(params.protocol, params.timeout_s), np.random.default_rng(params.seed)
    searches = Searches(params, problem, lab, lab.references(problem.teacher.schedule), rng, opened)

    told = searches.challenged(space, searches.of(space, params.evaluations, "evolve"))
    choice = searches.choice(space, told)
    rule, best, finals = searches.decided(space, told, choice, inputs)
    steps, bits = problem.space_of_timesteps(len(best.candidate.timesteps)), problem.space_of_precision()
    by_steps = searches.of(steps, params.single_evaluations, "evolve timesteps alone")
    by_bits = searches.of(bits, params.single_evaluations, "evolve precision alone")
    single = {"timesteps": (steps, searches.choice(steps, by_steps).nearest),
              "precision": (bits, searches.choice(bits, by_bits).best)}
    recipe, learned = finalist(best, space.recipe(best.candidate), searches, inputs)

    write_json(out / "recipe.json", recipe.to_json())
    write_json(out / "weights.json", problem.weights[best.candidate.weights].to_json(best.candidate.weights))
    write_json(out / "single.json", {name: within.recipe(e.candidate).to_json() for name, (within, e) in single.items()})
    write_front(out / "pareto.csv", space, pareto_front(told))
    write_evaluations(out / "evaluations.jsonl", space, told, lab.failures)
    return Report({
        "evaluations": len(told), "failed": sum(e.loss is None for e in told), "weights": [*problem.weights],
        "unit": paired_distance(*searches.references), "best": searches.facts(space, best),
        "finals": finals,
        "choice": {"rule": rule, "proxy": params.proxy, "nearest": searches.facts(space, choice.nearest),
                   "cheapest": choice.cheapest and searches.facts(space, choice.cheapest)},
        "dull": searches.against_dull(space, told, best),
        "distance_with_learned_weights": learned, "hypervolume": growth(told),
        "goal": goal_facts(params, choice), "single": {name: searches.facts(*found) for name, found in single.items()}})


def read_gaussian(images: Path, inputs: Inputs) -> Gaussian:
    """Of the images' features by the net that guides the search."""
    return Gaussian.of(features(load_feature_net(inputs["data"], "search"), np.load(images)))


@dataclass(frozen=True)
class Searches:
    """Searches of one problem in one lab, one after the other from one stream of random numbers."""

    params: Params
    problem: Problem
    lab: Lab
    references: tuple[np.ndarray, np.ndarray]
    rng: np.random.Generator
    open_lab: Callable[[Protocol, float], Lab]  # protocol, s after which an evaluation counts as hung

    def of(self, space: Space, evaluations: int, label: str) -> list[Evaluation]:
        """As `search` returns them, those that it starts from first; the log's lines show how they stand."""
        seeds = self.problem.seeds(space)
        budget = len(seeds) + evaluations
        standing, contest = Standing(space.cost), Contest(self.params.promotion, self.references)

        def evaluate(asked: Iterable[Candidate]) -> Iterable[float | None]:
            total = len(asked) if isinstance(asked, Sized) else budget  # a generation, or the whole search
            items = ((c.weights, space.recipe(c), space.cost(c)) for c in standing.asked(asked))
            if self.params.promotion.images:
                return standing.told(self.lab.contested(contest, items, total, label, standing.line))
            return standing.told(self.distances((item[:2] for item in items), total, label, standing.line))

        return search(space, evaluate, self.rng, budget, self.params.strategy, seeds)

    def distances(self, items: Iterable[tuple[str, Recipe]], total: int, label: str,
                  note: Callable[[], str] = str) -> Iterator[float | None]:
        return self.lab.distances(self.references, items, total, label, note)

    # ---- what is chosen ----

    def decided(self, space: Space, told: Sequence[Evaluation], choice: Choice,
                inputs: Inputs) -> tuple[str, Evaluation, list[dict]]:
        """-> the rule, what is handed over, and what is known of the finalists; without finals the proxy decides.

        The chosen one at one precision throughout is a finalist, too, where that costs no more.
        """
        how, bound = self.params.finals, self.params.goal.max_quality_loss
        if not how.images:
            return choice.rule, choice.best, []
        judge = self.final_judge(space, inputs)
        found = judge(finalists(told, space.bound, how.finalists,
                                lambda e: (e.candidate.weights, space.recipe(e.candidate).rows is None)))
        if not found:
            raise ValueError("evolve: all finalists failed; the lines above say why")
        seen, (_, best) = {id(one.evaluation) for one in found}, decide(found, bound)
        found += judge([e for e in self.siblings_of(space, told)(best.evaluation)
                        if e.loss is not None and e.cost <= best.evaluation.cost and id(e) not in seen])
        rule, best = decide(found, bound)
        return rule, best.evaluation, [self.facts(space, one.evaluation) | one.facts for one in found]

    def final_judge(self, space: Space, inputs: Inputs) -> Callable[[Sequence[Evaluation]], list[Final]]:
        how, num_classes = self.params.finals, self.problem.teacher.num_classes
        protocol = replace(self.params.protocol, images=how.images, seed=how.seed)
        lab = self.open_lab(protocol, -(-how.images // self.params.protocol.images) * self.params.timeout_s)
        dense, real = reference_items(self.problem.teacher.schedule)[0], read_gaussian(inputs["data"] / "train.npy", inputs)

        def judge(found: Sequence[Evaluation]) -> list[Final]:
            items = [dense, *(item_of(space, e) for e in found)]
            seen = lab.results(items, "evolve finals", lambda x: x.round(FINAL_DIGITS).tolist(), len(items))
            base, *others = (None if x is None else np.asarray(x) for x in succeeded(seen, "evolve finals"))
            if base is None:
                raise ValueError("evolve: the teacher cannot be sampled from: the line above says why")
            return judge_finals(found, others, base, real, how, num_classes)

        return judge

    def challenged(self, space: Space, told: list[Evaluation]) -> list[Evaluation]:
        """With what might be chosen in place of what would be: the same at one precision, that with as many steps as the bound
        allows, and the nearest that anyone would try, at the bound and at no more cost; until nothing is new."""
        keys = {space.key(e.candidate) for e in told}
        for _ in range(ROUNDS):
            found = {space.key(c): c for c in self.challengers(space, told, self.choice(space, told).best)}
            fresh = [c for key, c in found.items() if key not in keys]
            if not fresh:
                break
            items = ((c.weights, space.recipe(c)) for c in fresh)
            losses = self.distances(items, len(fresh), "evolve, what is compared with the best")
            told = [*told, *(Evaluation(c, space.cost(c), loss) for c, loss in zip(fresh, losses, strict=True))]
            keys |= found.keys()
        return told

    def challengers(self, space: Space, told: Sequence[Evaluation], best: Evaluation) -> list[Candidate]:
        siblings = [c for c in self.problem.siblings(space, best.candidate) if space.cost(c) <= best.cost]
        wider = filter(None, (self.problem.wider(space, c) for c in siblings))
        at_bound, at_cost = (self.problem.dull(space, cost) for cost in (space.bound, best.cost))
        families = nearest_families(at_bound, told)
        dull = [c for family, c in (*at_bound.items(), *at_cost.items()) if family[:2] in families]
        return [*siblings, *wider, *dull]

    def choice(self, space: Space, told: Sequence[Evaluation]) -> Choice:
        """Among those that were seen on all images: a promotion leaves those out that are behind."""
        whole = [e for e in told if e.loss is None or self.lab.is_whole(self.lab.log.known[key_of(*item_of(space, e))])]
        return choose(whole, space.bound, self.params.tolerated, self.above(space), self.siblings_of(space, whole))

    def siblings_of(self, space: Space, told: Sequence[Evaluation]) -> Callable[[Evaluation], list[Evaluation]]:
        """Of an evaluation, those of the same candidate at one precision throughout."""
        by_key = {space.key(e.candidate): e for e in told}
        return lambda e: [by_key[key] for key in map(space.key, self.problem.siblings(space, e.candidate)) if key in by_key]

    def above(self, space: Space) -> Callable[[Evaluation, Evaluation | None], Difference]:
        return lambda e, base: self.lab.judged(item_of(space, e), base and item_of(space, base))

    def against_dull(self, space: Space, told: Sequence[Evaluation], best: Evaluation) -> dict:
        """Whether anything that anyone would try is as near at no more cost, and the cheapest within the bound that is."""
        keys = {space.key(c) for cost in (space.bound, best.cost) for c in self.problem.dull(space, cost).values()}
        dull = [e for e in told if e.loss is not None and space.key(e.candidate) in keys]
        as_near = min((e for e in dull if e.loss <= best.loss), key=lambda e: e.cost, default=None)
        at_cost = min((e for e in dull if e.cost <= best.cost), key=lambda e: e.loss, default=None)
        ahead = at_cost is None or at_cost.loss > best.loss
        return {"ahead": ahead, "nearest_at_its_cost": at_cost and self.facts(space, at_cost),
                "cheapest_as_near": as_near and self.facts(space, as_near)}

    def facts(self, space: Space, e: Evaluation) -> dict:
        told = self.above(space)(e, None)
        return facts(space, e) | {"distance_error": told.error, "distance_upper95": told.upper95}


def item_of(space: Space, e: Evaluation) -> tuple[str, Recipe]:
    return e.candidate.weights, space.recipe(e.candidate)


def nearest_families(dull: Mapping[tuple, Candidate], told: Sequence[Evaluation]) -> list[tuple]:
    """The FAMILIES solvers and spacings whose points came nearest. dull: points by (solver, spacing, genes)."""
    loss = {e.candidate: e.loss for e in told if e.loss is not None}
    best: dict[tuple, float] = {}
    for family, candidate in dull.items():
        if candidate in loss:
            best[family[:2]] = min(loss[candidate], best.get(family[:2], float("inf")))
    return sorted(best, key=best.get)[:FAMILIES]


def learned_rounding(params: Params, inputs: Inputs, weights: Mapping[str, Weights], out: Path) -> Path | None:
    if params.rounding_steps == 0:
        return None
    opened = open_weights(inputs["pretrain_load"] / "teacher", inputs["distill"], weights)
    files = {integers_file(found): name for name, found in weights.items()}
    states = {file: list(calibration_states(opened[name], params.protocol, base_of(weights[name])))
              for file, name in files.items()}
    folder = out / "rounding"
    write_rounding({file: opened[name] for file, name in files.items()}, states, Rounding(steps=params.rounding_steps),
                   inputs.checkpoint("evolve_rounding"), folder)
    return folder


def finalist(best: Evaluation, recipe: Recipe, searches: Searches, inputs: Inputs) -> tuple[Recipe, float | None]:
    """-> the best's recipe, with weights learned for its list where these bring it nearer; its distance with them, if tried."""
    learn, protocol = read_json(inputs["cache_learn"] / "grid.json").get("learn"), searches.params.protocol
    if recipe.cache is None or learn is None:
        return recipe, None
    name = best.candidate.weights
    wanted = {name: searches.problem.weights[name]}
    denoiser = open_weights(inputs["pretrain_load"] / "teacher", inputs["distill"], wanted)[name]
    first = protocol.images + protocol.calibration_images  # noises that no evaluation sees
    tried = with_learned_weights(recipe, denoiser, learn, first, protocol.seed, inputs.checkpoint("evolve_finalist"))
    learned, = searches.distances([(name, tried)], 1, "evolve, the best with learned weights")
    return (tried if learned is not None and learned < best.loss else recipe), learned


def facts(space: Space, e: Evaluation) -> dict:
    recipe = space.recipe(e.candidate)
    return {"cost": e.cost, "distance": e.loss, "nfe": recipe.nfe, "solver": recipe.solver, "weights": e.candidate.weights,
            "removed_share": recipe.cache.removed_share if recipe.cache else 0.0,
            "precisions": dict(sorted(Counter(recipe.precision.values()).items()))}


def goal_facts(params: Params, choice: Choice) -> dict:
    """Whether the search's own proxy says that the goal is met, and at what cost the tolerated distance was reached at all."""
    return {"target": params.goal.target, "bound": bound_of(params.goal), "tolerated_distance": params.tolerated,
            "met_by_proxy": choice.cheapest is not None,
            "least_cost_within_tolerance": choice.cheapest and choice.cheapest.cost}


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
        rows.append({"asked": k, "cost": e.cost, "distance": e.loss, "weights": e.candidate.weights, "recipe": recipe.to_json(),
                     **failed})
    rows.sort(key=lambda row: (row["cost"], row["asked"]))
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
