"""What each layer of the teacher costs on this machine, per backend, precision and grain.

Reads: pretrain_load (teacher/).
Writes: layers.csv (layer, kind, backend, precision, grain, density, batch, time_us), model.csv (backend, precision, batch,
time_us, spread), machine.json. Times are of one evaluation of a whole batch, medians of interleaved repeats; where instruments
slow the nodes down, scaled so that all parts add up to the whole. density is the kept share of the layer's weights: grain 2:4
is zeros in a dense kernel, grain unit is hidden units taken away. `int8` of backend eager is the emulation in fp32 that a
search runs, not a fast kernel. spread: interquartile range over the median.
A precision of two names in model.csv, such as int8+bf16: the layers take turns, so every change between them shows its cost.
Left out: CUDA and its semi-structured kernels; a CPU has none, there 2:4 is a matter of storage. Not byte-deterministic.
"""

import copy
import csv
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tasks.core import load
from tasks.core.artifacts import Inputs, Report, write_json
from tasks.core.cost import LayerCost, layer_costs
from tasks.core.denoiser import Denoiser
from tasks.core.denoiser import load as load_teacher
from tasks.core.machine import describe
from tasks.core.params import check_range
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.profile.compressed import layers_of, narrowed, two_of_four
from tasks.profile.probe import Probe, eager_probe, graph_probe, pooled
from tasks.runtime.graph import export, open_graph
from tasks.runtime.precision import apply_precision, calibrate_ranges, live_precision

INPUTS = ("pretrain_load",)
TOKENS = {"fp32": "fp32", "bf16": "bf16", "int8": "w8a8"}  # the table's precision -> a recipe's token
TURNS = tuple("+".join(pair) for pair in itertools.combinations(TOKENS, 2))
BACKENDS = ("eager", "openvino")
WHOLE = ("dense", "turns")  # the cells that are timed as whole models: nothing pruned


@dataclass(frozen=True, kw_only=True)
class Params:
    batches: tuple[int, ...]      # images per evaluation
    densities: tuple[float, ...]  # shares of hidden units kept
    repeats: int                  # evaluations per cell, interleaved

    def __post_init__(self):
        for batch in self.batches:
            check_range("profile.batches", batch, 1, 4096)
        for density in self.densities:
            check_range("profile.densities", density, 0.01, 0.99)
        check_range("profile.repeats", self.repeats, 3, 10_000)


@dataclass(frozen=True)
class Cell:
    """One compressed form of the teacher at one precision, backend and batch, ready to be timed."""

    backend: str
    precision: str
    grain: str
    density: Mapping[str, float]  # kept share of each layer that lost weights
    batch: int
    probe: Probe                  # one evaluation that times layers
    evaluate: Callable[[], None]  # one without instruments

    @property
    def setting(self) -> tuple[str, str, int]:
        """What a scale holds for, whatever the form."""
        return self.backend, self.precision, self.batch


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    teacher = load_teacher(inputs["pretrain_load"] / "teacher")
    costs = layer_costs(teacher)
    count = len(list(forms_and_precisions(teacher.model, params.densities))) * len(BACKENDS) * len(params.batches)
    cells = list(track(make_cells(teacher, costs, params), count, "profile: prepare"))
    load.warn("profile")
    with load.watched() as others:
        wholes, by_layer = measure(cells, params.repeats)
    shapes = {name: tuple(m.weight.shape) for name, m in teacher.prunable_layers().items()}
    scales = {cell.setting: scale(times, whole) for cell, times, whole in zip(cells, by_layer, wholes, strict=True)
              if cell.grain == "dense"}
    layers = [row for cell, times in zip(cells, by_layer, strict=True)
              for row in layer_rows(cell, costs, shapes, times, scales.get(cell.setting, 1.0))]
    models = [model_row(cell, times) for cell, times in zip(cells, wholes, strict=True) if cell.grain in WHOLE]
    write_csv(out / "layers.csv", layers)
    write_csv(out / "model.csv", models)
    write_json(out / "machine.json", machine())
    timings = {f"{r['backend']}.{r['precision']}.b{r['batch']}.{key}": r[key] for r in models for key in ("time_us", "spread")}
    return Report({"layers": len(costs), "rows": len(layers)}, {**timings, "load": others.numbers()})


def machine() -> dict:
    """The descriptor and what else a time depends on."""
    return {**describe(), "threads": torch.get_num_threads(), "torch": torch.__version__, "openvino": version("openvino")}


def make_cells(teacher: Denoiser, costs: Sequence[LayerCost], params: Params) -> Iterator[Cell]:
    for (grain, model, density), precision in forms_and_precisions(teacher.model, params.densities):
        live = at_precision(model, precision, example(teacher, batch=8))
        with tempfile.TemporaryDirectory() as folder:
            export(live, Recipe(timesteps=(0,), precision=live_precision(live)), folder)
            for batch in params.batches:
                inputs = example(teacher, batch)
                whole = partial(eager_evaluation, live, inputs)
                yield Cell("eager", precision, grain, density, batch, eager_probe(live, costs, whole), whole)
                # counting nodes costs time, so the whole model is timed on a second copy without counters
                counting = open_graph(folder, batch, torch.get_num_threads(), PERF_COUNT=True)
                plain = open_graph(folder, batch, torch.get_num_threads()) if grain in WHOLE else counting
                for predict in (counting, plain):
                    predict(*inputs, 0)  # compiled while its files are there
                yield Cell("openvino", precision, grain, density, batch, graph_probe(counting, costs, inputs),
                           partial(plain, *inputs, 0))


def forms_and_precisions(model: nn.Module, densities: Sequence[float]) -> Iterator[tuple[tuple, str]]:
    yield from itertools.product(forms(model, densities), TOKENS)
    yield from itertools.product([("turns", model, {})], TURNS)


def forms(model: nn.Module, densities: Sequence[float]) -> Iterator[tuple[str, nn.Module, dict[str, float]]]:
    """Grain, the model in that form, kept share of each layer that lost weights."""
    yield "dense", model, {}
    yield "2:4", *two_of_four(model)
    for kept in densities:
        yield "unit", *narrowed(model, kept)


def at_precision(model: nn.Module, precision: str, inputs: tuple) -> nn.Module:
    """A copy with every Linear and Conv2d that runs at one precision, or taking turns between the two of `int8+bf16`.
    Ranges are rough: they decide quality, not time."""
    live = copy.deepcopy(model)
    ranges = calibrate_ranges(live, [inputs]) if "int8" in precision else {}
    tokens = itertools.cycle(TOKENS[name] for name in precision.split("+"))  # turns without end
    apply_precision(live, dict(zip(ranges or layers_of(live), tokens)), ranges)  # noqa: B905
    return live


def example(denoiser: Denoiser, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, t, labels: noise at timesteps spread over the schedule."""
    x = torch.randn(batch, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(batch) % denoiser.num_classes if denoiser.num_classes else None
    return x, torch.linspace(0, denoiser.schedule.steps - 1, batch).long(), labels


@torch.inference_mode()
def eager_evaluation(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None]) -> None:
    x, t, labels = inputs
    model(x, timestep=t, class_labels=labels, return_dict=False)


def measure(cells: Sequence[Cell], repeats: int) -> tuple[list[list[float]], list[dict[str, list[float]]]]:
    """-> for each cell: microseconds of whole evaluations, and of each layer. Cells take turns; one round warms up.

    Each is run once untimed before it is timed: a sampler's loop finds its weights in the cache, a cell whose turn it is does
    not (which made whole models 1.3 to 1.4 times too slow, and int8 look worse than it is).
    """
    wholes: list[list[float]] = [[] for _ in cells]
    by_layer: list[dict[str, list[float]]] = [defaultdict(list) for _ in cells]
    for turn in track(range(repeats + 1), repeats + 1, "profile: measure"):
        for i, cell in enumerate(cells):
            cell.probe()
            spent, whole = cell.probe(), warm_seconds(cell.evaluate) if cell.grain in WHOLE else 0.0
            if turn > 0:
                wholes[i].append(1e6 * whole)
                for name, time_us in spent.items():
                    by_layer[i][name].append(time_us)
    return wholes, by_layer


def warm_seconds(call: Callable[[], object]) -> float:
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def scale(times: Mapping[str, Sequence[float]], whole: Sequence[float]) -> float:
    """Counting makes nodes slower: the factor by which all parts of the dense model add up to its whole time, at most 1.

    Unscaled they exceed it by a third, and a model of narrow layers would be predicted to take less than no time.
    """
    return min(1.0, statistics.median(whole) / sum(statistics.median(part) for part in times.values()))


def layer_rows(cell: Cell, costs: Sequence[LayerCost], shapes: Mapping[str, tuple[int, ...]],
               times: Mapping[str, Sequence[float]], scale: float) -> list[dict]:
    """Of a dense form every layer and product, of a pruned one the layers that lost weights. shapes: of the layers' weights."""
    medians = pooled(times, shapes)
    return [{"layer": c.name, "kind": c.kind, "backend": cell.backend, "precision": cell.precision, "grain": cell.grain,
             "density": round(cell.density.get(c.name, 1.0), 6), "batch": cell.batch,
             "time_us": round(scale * medians[c.name], 3)}
            for c in costs if cell.grain == "dense" or c.name in cell.density]


def model_row(cell: Cell, times: Sequence[float]) -> dict:
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"backend": cell.backend, "precision": cell.precision, "batch": cell.batch, "time_us": round(float(median), 3),
            "spread": round(float((high - low) / median), 4)}


def write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
