"""How fast every variant is on this machine, what it costs on paper, and how much memory it takes.

Reads: pretrain_load (teacher, for the costs of its layers), package (every variant, torch and OpenVINO form), fid (which point
of the dull front is the best).
Writes: benchmark.csv, one row per variant, backend and batch; report: MACs, BitOPs and bytes of every variant; timings:
throughput, latency, intervals of the speed-ups, peak memory, machine and protocol. Exempt from hash equality: its rows are of
one machine.
Left out: GPUs and other runtimes (a study measures those); energy.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from tasks.benchmark.certain import ERROR, LOOKS, Question, interval, settle
from tasks.benchmark.measure import Case, interleaved, summary
from tasks.benchmark.memory import peak_growth
from tasks.core import load
from tasks.core.artifacts import Inputs, Report, read_json
from tasks.core.cost import LayerCost, bitops, layer_costs, macs
from tasks.core.denoiser import Denoiser
from tasks.core.denoiser import load as load_teacher
from tasks.core.machine import describe
from tasks.core.params import Goal, check_choice, check_range
from tasks.core.progress import track
from tasks.core.recipe import VARIANTS, Recipe
from tasks.core.sampler import initial_noise, labels_for
from tasks.runtime.solver import Predict, clip_bound, final, recipe_steps

INPUTS = ("pretrain_load", "package", "fid")
BACKENDS = ("eager", "openvino")
IMPORTED_BEFORE = ("tasks.runtime.packed", "diffusers.models.transformers.dit_transformer_2d", "diffusers.models.unets.unet_2d",
                   "openvino")  # before memory is measured, so that libraries do not count
NUMBERS = ("images_per_s", "latency_ms_p50", "latency_ms_p95", "spread", "repeats")
BOUNDS = ("speedup_low", "speedup_high", "over_dull_best_low", "over_dull_best_high")  # of rows that were timed often enough
COLUMNS = ("variant", "backend", "batch", "nfe", "timed_steps", *NUMBERS, *BOUNDS)


@dataclass(frozen=True, kw_only=True)
class Params:
    batches: tuple[int, ...]   # images sampled together
    warmup: int                # rounds thrown away
    min_repeats: int           # rounds measured even when the budget is spent
    max_repeats: int
    budget_s: float            # seconds for all timing, shared equally by the batch sizes
    timed_steps: int           # a longer loop at a batch above 1 is timed on that many of its steps
    backend: str               # on which the verdict is about latency, and at which batch: the report's
    batch: int
    undecided_budget_s: float  # seconds of further timing there at most, while a verdict on latency hangs on it
    memory: tuple[str, ...]    # variants whose peak memory is measured, at batch 1
    goal: Goal

    def __post_init__(self):
        if not self.batches:
            raise ValueError("benchmark.batches: [] is empty; at least one batch size is timed")
        for i, batch in enumerate(self.batches):
            check_range(f"benchmark.batches[{i}]", batch, 1, 4096)
        for i, name in enumerate(self.memory):
            check_choice(f"benchmark.memory[{i}]", name, VARIANTS)
        for name, low, high in (("warmup", 0, 100), ("min_repeats", 1, self.max_repeats), ("max_repeats", 1, 10**4),
                                ("budget_s", 0, 10**6), ("timed_steps", 1, 1000), ("undecided_budget_s", 0, 10**6)):
            check_range(f"benchmark.{name}", getattr(self, name), low, high)
        check_choice("benchmark.backend", self.backend, BACKENDS)
        if self.batch not in self.batches:
            raise ValueError(f"benchmark.batch: {self.batch} is not one of benchmark.batches: {list(self.batches)}")


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """What one variant runs: a package folder and the recipe, which for dull_best is not the package's own."""

    folder: Path
    recipe: Recipe
    shape: tuple[int, ...]   # (C, H, W)
    num_classes: int
    schedule: dict           # the scheduler's config

    @property
    def size_bytes(self) -> int:
        """On disk: the network's files and the recipe; code and the graphs that are made from them do not count."""
        data = [path for path in (self.folder / "denoiser").iterdir() if path.suffix != ".py"]
        return sum(path.stat().st_size for path in (*data, self.folder / "recipe.json"))


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    teacher = load_teacher(inputs["pretrain_load"] / "teacher")
    shipped = {name: find(name, inputs, teacher) for name in VARIANTS}
    costs = layer_costs(teacher)
    load.warn("benchmark")
    with load.watched() as others:
        rows = [row for batch in track(params.batches, len(params.batches), "benchmark: batch sizes")
                for row in timed_rows(shipped, batch, params)]
    write_rows(out / "benchmark.csv", rows)
    timings = nested(rows)
    for (name, backend), grown in peak_memory({name: shipped[name] for name in params.memory}).items():
        timings[name][backend]["peak_memory_bytes"] = grown
    return Report({name: paper_costs(costs, s) for name, s in shipped.items()},
                  {**timings, "machine": describe(), "protocol": protocol(params), "load": others.numbers()})


def find(variant: str, inputs: Inputs, teacher: Denoiser) -> Shipped:
    """dull_best is a dull package with the steps and the solver that won on the dull front."""
    if variant == "dull_best":
        best = read_json(inputs["fid"] / "dull_best.json")
        folder, recipe = inputs["package"] / best["package"], best["recipe"]
    else:
        folder = inputs["package"] / variant
        recipe = read_json(folder / "recipe.json")
    return Shipped(folder=folder, recipe=Recipe.from_json(recipe), shape=teacher.sample_shape, num_classes=teacher.num_classes,
                   schedule=teacher.schedule.config)


def paper_costs(costs: list[LayerCost], shipped: Shipped) -> dict[str, int]:
    """MACs and BitOPs per image over all steps, bytes on disk."""
    return {"macs": macs(costs, shipped.recipe), "bitops": bitops(costs, shipped.recipe), "size_bytes": shipped.size_bytes}


def open_backend(folder: Path, backend: str, batch: int, threads: int) -> Predict:
    """A package's network, ready to run in this process."""
    if backend == "eager":
        from tasks.runtime.packed import PackedDenoiser
        return PackedDenoiser.from_pretrained(folder / "denoiser")
    from tasks.runtime.graph import open_graph
    return open_graph(folder / "openvino", batch, threads)


def sampling(predict: Predict, shipped: Shipped, batch: int, steps: int) -> Callable[[], None]:
    """A function that takes the first `steps` steps of the recipe for `batch` images."""
    coefficients = recipe_steps(shipped.schedule, shipped.recipe)[:steps]
    noise, labels = initial_noise(shipped.shape, range(batch), seed=0), labels_for(range(batch), shipped.num_classes)

    @torch.inference_mode()
    def sample() -> None:
        final(predict, coefficients, noise, labels, clip_bound(shipped.schedule))

    return sample


def timed_steps(recipe: Recipe, batch: int, most: int) -> int:
    """How many steps of a loop are timed: all at batch 1, where single latencies count, and with a cache plan, whose steps
    differ in cost; otherwise at most `most`, since every step costs the same."""
    return recipe.nfe if batch == 1 or recipe.cache is not None else min(recipe.nfe, most)


def timed_rows(shipped: Mapping[str, Shipped], batch: int, params: Params) -> list[dict]:
    """A row of the table for every variant and backend at one batch size. Backends do not share their rounds: most of a round
    would be eager's, and the backend that ships would be timed too seldom."""
    times, cases = {}, []
    for backend in BACKENDS:
        found = [timing_case(name, s, backend, batch, params.timed_steps) for name, s in shipped.items()]
        seconds = interleaved(found, warmup=params.warmup, min_repeats=params.min_repeats, max_repeats=params.max_repeats,
                              budget_s=params.budget_s / len(params.batches) / len(BACKENDS))
        times |= settle(found, seconds, questions(params, backend, batch), params.undecided_budget_s)
        cases += found
    return [{"variant": case.variant, "backend": case.backend, "batch": batch, "nfe": shipped[case.variant].recipe.nfe,
             "timed_steps": timed_steps(shipped[case.variant].recipe, batch, params.timed_steps),
             **summary(times[case.key], batch), **bounds(case, times)} for case in cases]


def questions(params: Params, backend: str, batch: int) -> list[Question]:
    """What the report asks of the timings of this setting: is compressed as fast as was wanted, and faster than dull_best?"""
    if params.goal.target != "latency" or (backend, batch) != (params.backend, params.batch):
        return []
    dense, dull, ours = (Case.key_of(name, backend, batch) for name in ("dense", "dull_best", "compressed"))
    return [Question(dense, ours, params.goal.min_speedup), Question(dull, ours, 1.0)]


def bounds(case: Case, times: Mapping[str, list[float]]) -> dict[str, float]:
    """How many times as fast the case is as dense and, of compressed, as dull_best: 95 % intervals where there are any."""
    bases = {"speedup": "dense"} if case.variant != "dense" else {}
    bases |= {"over_dull_best": "dull_best"} if case.variant == "compressed" else {}
    found = {name: interval(times[Case.key_of(base, case.backend, case.batch)], times[case.key])
             for name, base in bases.items()}
    return {f"{name}_{end}": value for name, ends in found.items() if ends
            for end, value in zip(("low", "high"), ends, strict=True)}


def timing_case(name: str, shipped: Shipped, backend: str, batch: int, most: int) -> Case:
    steps = timed_steps(shipped.recipe, batch, most)
    predict = open_backend(shipped.folder, backend, batch, torch.get_num_threads())
    return Case(variant=name, backend=backend, batch=batch, run=sampling(predict, shipped, batch, steps),
                scale=shipped.recipe.nfe / steps)


def peak_memory(shipped: Mapping[str, Shipped]) -> dict[tuple[str, str], int]:
    """Bytes that opening a package and sampling one image add to a process, by variant and backend."""
    keys = [(name, backend) for name in shipped for backend in BACKENDS]
    works = [partial(sample_once, shipped[name], backend, torch.get_num_threads()) for name, backend in keys]
    return dict(zip(keys, peak_growth(works, IMPORTED_BEFORE), strict=True))


def sample_once(shipped: Shipped, backend: str, threads: int) -> None:
    sampling(open_backend(shipped.folder, backend, 1, threads), shipped, 1, shipped.recipe.nfe)()


def nested(rows: list[dict]) -> dict:
    """{variant: {backend: {"b<batch>": numbers}}}"""
    table: dict = {}
    for row in rows:
        numbers = {key: row[key] for key in (*NUMBERS, *BOUNDS) if key in row}
        table.setdefault(row["variant"], {}).setdefault(row["backend"], {})[f"b{row['batch']}"] = numbers
    return table


def protocol(params: Params) -> dict:
    """What a reader needs to repeat the timings."""
    in_words = ("goal", "backend", "batch", "undecided_budget_s")
    return {**{key: value for key, value in asdict(params).items() if key not in in_words},
            "threads": torch.get_num_threads(), "clock": "from noise to the whole finished batch",
            "order": "one backend after the other; its variants take turns, each round starts with another",
            "intervals": f"95 % for the median of the rounds' ratios, together for {LOOKS} looks (order statistics, each "
                         f"{1 - ERROR / LOOKS:.0%}); {params.backend} at batch {params.batch} is timed on while one holds what "
                         f"was wanted, {params.undecided_budget_s:g} s at most",
            "long loops": f"whole at batch 1 and with a cache plan; else at most {params.timed_steps} steps, scaled to the NFE"}


def write_rows(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
