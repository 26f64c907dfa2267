"""What an evaluation of a candidate costs and is worth: against a plain one, in a switch of precision, in rank order.

`python -m benchmarks.search.evaluation PART ...` replaces its own rows in results.csv; see EVALUATION.md. Teacher, student,
profile and cache table are those of the last `make run`, in artifacts/.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import numpy as np

from benchmarks import results
from benchmarks.search import correlation, promotion, supernet
from benchmarks.search.floor import Seconds, floor_numbers, profiled
from benchmarks.search.plain import plain_evaluator
from tasks.core import denoiser as denoisers
from tasks.core.artifacts import Inputs
from tasks.core.params import Goal, read_params, stage_params
from tasks.core.parcel import Parcel
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.serial import torch_threads
from tasks.evolve import stage
from tasks.evolve.fitness import Evaluator, Protocol, distance, make_sampler, ranges_of, reference_items
from tasks.evolve.problem import Problem, chosen_grain, read_problem
from tasks.evolve.promote import Rival, image_losses
from tasks.evolve.search import search
from tasks.evolve.weights import Weights, read_weights
from tasks.runtime.integer import INTEGER, available
from tasks.runtime.precision import SIMULATED, WIDTHS, apply_precision
from tasks.runtime.rounding import Rounding

RESULTS = Path(__file__).parent / "results.csv"
TEACHERS = Path("tasks/pretrain_load/teachers")
WORK = Path("runs/search")
GOALS = {"bitops": {"max_bitops": 0.03}, "latency": {"min_speedup": 5.0}}
OF_TARGETS = ("cost", "floor", "promotion", "correlation")  # parts that are measured on targets, the others on teachers
ROUNDS = 40  # switches of a whole model's precision


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A search on the last run's artifacts."""

    inputs: Inputs
    params: stage.Params

    @property
    def protocol(self) -> Protocol:
        return self.params.protocol

    @functools.cached_property
    def weights(self) -> dict[str, Weights]:
        return read_weights(self.inputs, denoisers.load(self.inputs["pretrain_load"] / "teacher"), chosen_grain(self.inputs))

    def problem(self, target: str) -> Problem:
        how = {name: getattr(self.params, name) for name in stage.PROBLEM}
        return read_problem(self.inputs, goal_of(target), **how)

    def evaluator(self) -> Evaluator:
        """As a warm worker makes it."""
        teacher, data, distill = (Parcel(path.name, here=path.resolve()) for path in (
            self.inputs["pretrain_load"] / "teacher", self.inputs["data"], self.inputs["distill"]))
        return make_sampler(teacher, distill, self.weights, data, self.protocol)

    def plain(self, warm: Evaluator) -> Callable[[tuple[str, Recipe]], np.ndarray]:
        return plain_evaluator(self.inputs["pretrain_load"] / "teacher", self.inputs["distill"], self.weights, warm.ranges,
                               warm.net, self.protocol)


def open_setting(artifacts: Path, scale: str, **protocol: object) -> Setting:
    """protocol: what is to be other than in params.yaml."""
    params = stage_params(stage, read_params(scale=scale))
    inputs = Inputs({name: artifacts / name for name in stage.INPUTS}, "evaluation")
    return Setting(inputs=inputs, params=dataclasses.replace(params, protocol=dataclasses.replace(params.protocol, **protocol)))


def goal_of(target: str) -> Goal:
    free = {"min_speedup": None, "max_bitops": None, "max_size": None}
    return Goal(target=target, max_quality_loss=0.05, **free | GOALS[target])


def row(teacher: str, variant: str, seed: int, metric: str, value: float, protocol: str) -> dict:
    return dict(zip(results.COLUMNS, (teacher, variant, seed, metric, f"{value:.6g}", protocol), strict=True))


# ---- cost: against a plain evaluation ----

@dataclass(frozen=True)
class Pair:
    """One candidate, both ways."""

    ours_spent: float | Seconds  # of all, or of each operation
    plain_spent: float | Seconds
    ours: float                  # distance
    plain: float


def timed(f: Callable, *args) -> tuple[object, float]:
    """-> f(*args), seconds of this thread, in which all of it runs: what else the machine does does not count."""
    started = time.thread_time()
    found = f(*args)
    return found, time.thread_time() - started


def both_ways(setting: Setting, target: str, candidates: int, watch: Callable) -> tuple[list[Pair], float]:
    """A search of so many candidates whose evaluations are done in both ways, taking turns at being first.
    watch: f, *args -> f(*args), what it spent. -> pairs, the share of network evaluations that ours found done."""
    problem, warm = setting.problem(target), setting.evaluator()
    plain, pairs = setting.plain(warm), []
    references = tuple(warm(item) for item in reference_items(problem.teacher.schedule))
    space = problem.space()
    prepare(warm)

    def evaluate(asked: Iterable) -> Iterator[float]:
        for k, candidate in enumerate(asked):
            item, found = (candidate.weights, space.recipe(candidate)), {}
            for way in ("ours", "plain") if k % 2 else ("plain", "ours"):
                found[way] = watch(warm if way == "ours" else plain, item)
            (ours, ours_spent), (other, plain_spent) = found["ours"], found["plain"]
            pairs.append(Pair(ours_spent, plain_spent, distance(ours, references), distance(other, references)))
            yield pairs[-1].ours

    rng = np.random.default_rng(setting.params.seed)
    search(space, evaluate, rng, candidates, setting.params.strategy, problem.seeds(space))
    return pairs, warm.predictions.hit_rate


def prepare(warm: Evaluator) -> None:
    """Every width of every layer: a search of hundreds of candidates makes its tables once, a short measurement would make some
    for each."""
    for name, denoiser in warm.weights.items():
        for bits in WIDTHS:
            apply_precision(denoiser.model, dict.fromkeys(warm.ranges[name], f"w{bits}a{bits}"), warm.ranges[name], warm.kinds)


def cost_numbers(pairs: list[Pair], hit_rate: float) -> dict[str, float]:
    """Medians over candidates, and quartiles of the ratio; `evaluation_share` is what a whole search takes of a plain one."""
    ratios = [pair.ours_spent / pair.plain_spent for pair in pairs]
    low, _, high = quantiles(ratios, n=4)
    return {"evaluation_ratio": median(ratios), "evaluation_ratio_q25": low, "evaluation_ratio_q75": high,
            "evaluation_share": sum(pair.ours_spent for pair in pairs) / sum(pair.plain_spent for pair in pairs),
            "evaluation_s": median(pair.ours_spent for pair in pairs), "plain_s": median(pair.plain_spent for pair in pairs),
            "fitness_difference": max(abs(pair.ours - pair.plain) for pair in pairs), "shared_steps": hit_rate}


def cost_rows(setting: Setting, targets: Iterable[str], candidates: int) -> Iterator[dict]:
    for target in targets:
        found = cost_numbers(*both_ways(setting, target, candidates, timed))
        yield from pair_rows(setting, f"evaluation.{target}", candidates, "its CPU time", found)


def floor_rows(setting: Setting, targets: Iterable[str], candidates: int) -> Iterator[dict]:
    for target in targets:
        pairs, _ = both_ways(setting, target, candidates, profiled)
        found = floor_numbers((pair.ours_spent, pair.plain_spent) for pair in pairs)
        yield from pair_rows(setting, f"evaluation.floor.{target}", candidates, "by torch's profiler", found)


def pair_rows(setting: Setting, variant: str, candidates: int, clock: str, found: Mapping[str, float]) -> Iterator[dict]:
    protocol = setting.protocol
    said = (f"{results.machine()}, {clock}; {'u8 x s8' if available() else 'fp32'} kernels; "
            f"{candidates} candidates of a search; "
            f"{protocol.images} images in chunks of {protocol.chunk}; plain: a fresh model, weights quantised on the fly, no "
            "shared steps; interleaved; tables made before")
    return (row("mnist_dit", variant, setting.params.seed, name, value, said) for name, value in found.items())


# ---- switch: the whole model's precision ----

def measure_switch(teacher: denoisers.Denoiser, ranges: Mapping, rounds: int) -> list[float]:
    """ms of each switch to another width of weights and activations in every layer, all tables made before."""
    kinds = INTEGER if available() else SIMULATED
    plans = [dict.fromkeys(ranges, f"w{bits}a{bits}") for bits in WIDTHS]
    elapsed = []
    for plan in itertools.islice(itertools.cycle(plans), len(plans) + rounds):
        _, seconds = timed(apply_precision, teacher.model, plan, ranges, kinds)
        elapsed.append(1e3 * seconds)
    return elapsed[len(plans):]


def switch_rows(protocol: Protocol, names: Iterable[str]) -> Iterator[dict]:
    for name in names:
        teacher = denoisers.load(TEACHERS / name)
        ranges = ranges_of(teacher, protocol)
        said = f"{results.machine()}; {len(ranges)} layers, each to another width; {ROUNDS} switches"
        elapsed = measure_switch(teacher, ranges, ROUNDS)
        low, middle, high = quantiles(elapsed, n=4)
        for metric, value in {"switch_ms": middle, "switch_ms_q25": low, "switch_ms_q75": high}.items():
            yield row(name, "evaluation.switch", 0, metric, value, said)


# ---- supernet, promotion, correlation: see their files ----

def supernet_rows(protocol: Protocol, names: Iterable[str], how: Rounding) -> Iterator[dict]:
    for name in names:
        teacher = denoisers.load(TEACHERS / name)
        said = (f"norm of the output's change over its norm; {protocol.calibration_images} trajectories of "
                f"{protocol.calibration_steps} steps for ranges and rounding, as many others for the error; {how}")
        found = supernet.errors(teacher, protocol, how)
        for arm, bits, error in track(found, len(supernet.BITS) * len(supernet.ARMS), f"supernet of {name}"):
            yield row(name, f"evaluation.supernet_{arm}", 0, f"output_error_w{bits}a{bits}", error, said)


def searched(setting: Setting, target: str, candidates: int) -> tuple:
    """A search of so many candidates beyond those that it starts from. -> evaluator, references, what was told, losses of each
    image, (weights, recipe, cost)"""
    problem, warm = setting.problem(target), setting.evaluator()
    references, space = tuple(warm(item) for item in reference_items(problem.teacher.schedule)), problem.space()
    rivals, items, seeds = [], [], problem.seeds(space)

    def evaluate(asked: Iterable) -> Iterator[float]:
        for candidate in track(asked, len(seeds) + candidates, f"search for {target}"):
            items.append((candidate.weights, space.recipe(candidate), space.cost(candidate)))
            rivals.append(Rival(items[-1][2], image_losses(warm(items[-1][:2]), references)))
            yield float(rivals[-1].losses.mean())

    rng = np.random.default_rng(setting.params.seed)
    told = search(space, evaluate, rng, len(seeds) + candidates, setting.params.strategy, seeds)
    return warm, references, told, rivals, items


def promotion_rows(setting: Setting, targets: Iterable[str], candidates: int, few: Iterable[int]) -> Iterator[dict]:
    for target in targets:
        *_, rivals, _ = searched(setting, target, candidates)
        for n, z in itertools.product(few, (1.0, 2.0, 3.0)):
            said = f"{candidates} candidates of a search, {setting.protocol.images} images; replayed: {n} first, z {z:g}"
            for metric, value in promotion.replay(rivals, n, z).items():
                yield row("mnist_dit", f"evaluation.promotion_{n}_z{z:g}.{target}", setting.params.seed, metric, value, said)


def correlation_rows(setting: Setting, target: str, candidates: int, judged: int, few: int, samples: int) -> Iterator[dict]:
    warm, references, told, _, items = searched(setting, target, candidates)
    learned = [e for e in told if setting.weights[e.candidate.weights].own.get(e.candidate.solver)][:judged]
    chosen = [items[told.index(e)] for e in dict.fromkeys([*learned, *correlation.spread(told, judged)])]
    dense = (*reference_items(warm.weights["teacher"].schedule)[0], 1.0)
    whole, *found = correlation.judge(warm, [dense, *chosen], references, stage.read_bank(setting.inputs),
                                      setting.inputs["data"], WORK / "correlation", (few, setting.protocol.images), samples)
    said = (f"{len(found)} of {len(told)} candidates, {len(learned)} with a solver of their own; proxies on {few} and "
            f"{setting.protocol.images} images, search net; FID of {samples} fresh samples, report net, OpenVINO, real images "
            f"that nothing has seen; FID of dense: {whole.fid:.4g}")
    variant, seed = f"evaluation.correlation.{target}", setting.params.seed
    for metric, value in correlation.rank_correlations(found).items() | correlation.per_loss(found, whole.fid).items():
        yield row("mnist_dit", variant, seed, metric, value, said)
    for k, one in enumerate(found):
        for metric, value in {"cost": one.cost, "fid": one.fid, **one.proxies}.items():
            yield row("mnist_dit", f"{variant}.{k}", seed, metric, value, said)


# ---- the command ----

def write(rows: Iterable[dict], path: Path = RESULTS) -> None:
    """Rows of the same teacher and variant are replaced."""
    rows = list(rows)
    own = {(found["teacher"], found["variant"]) for found in rows}
    results.replace(path, lambda found: (found["teacher"], found["variant"]) in own, rows)
    for found in rows:
        print(f"{found['teacher']:12} {found['variant']:28} {found['metric']:28} {found['value']}", flush=True)


def rows_of(given: argparse.Namespace, setting: Setting) -> Iterator[Iterable[dict]]:
    """What is written together: an hour's work on one target is there before the next begins."""
    if given.part == "cost":
        yield cost_rows(setting, given.targets, given.candidates)
    elif given.part == "floor":
        yield floor_rows(setting, given.targets, given.candidates)
    elif given.part == "switch":
        yield switch_rows(setting.protocol, given.teachers)
    elif given.part == "supernet":
        yield supernet_rows(setting.protocol, given.teachers, Rounding(steps=given.steps))
    elif given.part == "promotion":
        yield promotion_rows(setting, given.targets, given.candidates, given.few)
    else:
        for target in given.targets:
            yield correlation_rows(setting, target, given.candidates, given.judged, given.few[0], given.samples)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search.evaluation", description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("cost", "floor", "switch", "supernet", "promotion", "correlation"))
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="of the last run")
    parser.add_argument("--scale", choices=("quick", "full"), default="full", help="whose protocol an evaluation follows")
    parser.add_argument("--candidates", type=int, default=40, help="of a search, 8..")
    parser.add_argument("--targets", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--teachers", nargs="+", default=["mnist_dit", "mnist_unet"])
    parser.add_argument("--few", nargs="+", type=int, default=[16], help="images of the cheaper proxy")
    parser.add_argument("--judged", type=int, default=24, help="candidates whose quality is measured")
    parser.add_argument("--samples", type=int, default=10_000, help="that it is measured on")
    parser.add_argument("--steps", type=int, default=500, help="of learned rounding")
    given = parser.parse_args(arguments)
    try:
        setting = open_setting(given.artifacts, given.scale)
        began = time.monotonic()
        with torch_threads(1):
            for found in rows_of(given, setting):
                write(found)
        on = given.targets if given.part in OF_TARGETS else given.teachers
        how = f"{', '.join(on)}; what an earlier run kept is not in it"
        write([row("mnist_dit", f"evaluation.seconds_{given.part}", 0, "seconds", time.monotonic() - began, how)])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
