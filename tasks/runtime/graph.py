"""A compressed model as OpenVINO runs it: opened from the graphs that `graph_export.py` writes. Not shipped inside packages.

An image's evaluations run in one loop inside OpenVINO, or each with its solver update in one graph, or alone, for whoever needs
every prediction. What timestep and label decide is looked up.
"""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.core.denoiser import Denoiser
from tasks.core.recipe import Recipe
from tasks.runtime.compiling import anatomy, compile_graphs
from tasks.runtime.conditioning import RowTable
from tasks.runtime.graph_export import export
from tasks.runtime.graph_index import CONDITIONING, graph_files, is_stored, read_index, weight_bits
from tasks.runtime.graph_solver import Solving, coefficients, history_of, started
from tasks.runtime.graph_store import unpacked
from tasks.runtime.solver import Clip, SolverStep, Thresholding, integrate

LOOPED, STEPPED, PLAIN = WAYS = ("loop", "step", "evaluation")
NOT_IN_LOOPS = "GroupNormalization"  # OpenVINO 2026.4.1 cannot compile it there; taken apart, it is slower than a loop is worth
KEPT_COMPILED = 2  # loops and updates of other lengths


def open_graph(folder: str | Path, batch: int, threads: int, **config: object) -> "GraphPredictor":
    """-> predict(x (batch, C, H, W) fp32, t (batch,) or scalar, labels (batch,) int64 or None, step) -> (batch, C, H, W).

    Graphs are compiled for the CPU with static shapes, each when it is first needed. Steps are taken in order from 0; a tensor
    kept between steps is the output of the graph that writes it and the input of those that read it, never copied.
    `predict.sample` runs a whole trajectory. config: further OpenVINO properties.
    Where the folder is a package's, its graphs are unpacked into a temporary one first (`graph_store.py`).
    Files are compared with the hashes in `graph.json`, and in a package with those of `package.json`, now and again when they
    are compiled. Raises ValueError for damaged files and those of an older version, for a recipe beside them that is not theirs
    or means nothing, for a graph that the compiler dies of, for another batch, a step that the cache plan does not have or that
    is taken out of order.
    """
    folder = Path(folder)
    if not is_stored(folder):
        return GraphPredictor(folder, batch, threads, config)
    files = unpacked(folder, read_index(folder))
    predict = GraphPredictor(Path(files.name), batch, threads, config)
    predict.files = files  # removed with it
    return predict


class GraphPredictor:
    """See `open_graph`. Form i of `graph.json` is `compiled[i]`; its one request is `requests[i]`."""

    def __init__(self, folder: Path, batch: int, threads: int, config: dict):
        self.folder, self.index, self.batch = folder, read_index(folder), batch
        # Pinned, every process takes the same first cores: two workers of one thread each ran at 40 % of their speed.
        self.properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
                           "INFERENCE_PRECISION_HINT": self.index["inference_precision"], **config}
        self.kept = Kept(self.index["sums"])
        self.rows = RowTable(self.computed_rows)
        self.solving = functools.lru_cache(KEPT_COMPILED)(self.compiled_solving)

    @property
    def has_plan(self) -> bool:
        return self.index["steps"] is not None

    @functools.cached_property
    def loops(self) -> bool:
        """Whether OpenVINO can compile the network inside a loop."""
        return NOT_IN_LOOPS not in anatomy((self.folder / "0.xml").read_bytes()).kinds

    @functools.cached_property
    def compiled(self) -> list:
        return self.compile_forms(len(self.index["forms"]))

    @functools.cached_property
    def requests(self) -> list:
        return [compiled.create_infer_request() for compiled in self.compiled]

    @functools.cached_property
    def bound(self) -> list["Bound"]:
        return self.bind(self.requests)

    def compile_forms(self, count: int, solving: Solving | None = None) -> list:
        """Of the first `count` forms."""
        if read_index(self.folder) != self.index:
            raise ValueError(f"{self.folder}: other graphs than when it was opened; open it again")
        names = graph_files(count)[:count]
        return compile_graphs([self.folder / name for name in names], self.batch, weight_bits(self.index["precision"]),
                              self.properties, solving)

    def compiled_solving(self, solving: Solving) -> list["Bound"]:
        """The forms with a solver's update in each, or the one form in a loop."""
        count = len(self.index["forms"]) if self.has_plan else 1
        return self.bind([one.create_infer_request() for one in self.compile_forms(count, solving)], solving)

    def bind(self, requests: Sequence, solving: Solving | None = None) -> list["Bound"]:
        return [Bound(request, form, self.index["labelled"], solving)
                for request, form in zip(requests, self.index["forms"], strict=False)]

    @functools.cached_property
    def conditioning(self):
        """Exact, in fp32 but for the layers that round: once for each time, so its speed is of no matter."""
        exact = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        count = self.index["rows"]["labels"] or 1
        if read_index(self.folder) != self.index:
            raise ValueError(f"{self.folder}: other graphs than when it was opened; open it again")
        [compiled] = compile_graphs([self.folder / CONDITIONING], count, 0, {**self.properties, **exact})
        return compiled.create_infer_request()

    def computed_rows(self, t: float) -> Tensor:
        """-> (labels or 1, width)."""
        labels = self.index["rows"]["labels"]
        given = [np.full(labels or 1, t, np.float32), *([np.arange(labels)] if labels else [])]
        self.conditioning.infer(given)
        return torch.from_numpy(self.conditioning.get_output_tensor(0).data.copy())

    def row_labels(self, labels: Tensor | None) -> Tensor | None:
        return labels if self.index["rows"]["labels"] else None

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        self.check_batch(x)
        place = self.place(step)
        form, bound = self.index["forms"][place], self.bound[place]
        bound.x[...], bound.rows[...] = x.float().numpy(), self.rows(t, self.row_labels(labels)).numpy()
        bound.set_labels(labels)
        self.infer(bound, form, step)
        return torch.from_numpy(bound.put_out[0].copy())

    def check_batch(self, x: Tensor) -> None:
        if len(x) != self.batch:
            raise ValueError(f"graph: opened for a batch of {self.batch}, got {len(x)}")

    def place(self, step: int) -> int:
        """Of the form that the step runs."""
        steps = self.index["steps"]
        if steps is not None and not 0 <= step < len(steps):
            raise ValueError(f"graph: step {step} is not between 0 and {len(steps) - 1}, the last of the cache plan")
        return steps[step] if steps else 0

    def infer(self, bound: "Bound", form: Mapping, step: int) -> None:
        if step == 0:
            self.kept.reset()
        tensors, weights = self.kept.read(form["skipped"], step)
        bound.set_reused(tensors, weights)
        first = len(bound.put_out)
        for i, name in enumerate(form["kept"], start=first):
            bound.request.set_output_tensor(i, self.kept.write(name, step, bound.request.get_output_tensor(i)))
        bound.request.infer()
        self.kept.release(step)

    def way(self, clip: Clip) -> tuple[str, str]:
        """How a trajectory is run, one of WAYS, and why not by the one before it."""
        if isinstance(clip, Thresholding):
            return PLAIN, "dynamic thresholding is no operation of the graph"
        if self.has_plan:
            return STEPPED, "the steps of a cache plan run different graphs"
        if not self.loops:
            return STEPPED, f"{NOT_IN_LOOPS} is compiled outside of loops alone"
        return LOOPED, ""

    def sample(self, steps: Sequence[SolverStep], noise: Tensor, labels: Tensor | None, clip: Clip,
               way: str | None = None) -> Tensor:
        """The trajectory of a solver from noise (batch, C, H, W) to its end. way: another one of WAYS than `way` says."""
        self.check_batch(noise)
        way = way or self.way(clip)[0]
        if way == PLAIN:
            *_, (_, _, images) = integrate(self, steps, noise, labels, clip)
            return images
        if self.has_plan and len(steps) != len(self.index["steps"]):
            raise ValueError(f"graph: {len(steps)} steps, but the cache plan has {len(self.index['steps'])}")
        run = self.looped if way == LOOPED else self.stepped
        return run(steps, noise, labels, clip)

    def looped(self, steps: Sequence[SolverStep], noise: Tensor, labels: Tensor | None, clip: float | None) -> Tensor:
        history = history_of(steps)
        [bound] = self.solving(Solving(history, clip, len(steps)))
        rows = torch.from_numpy(bound.rows).view(len(steps), self.batch, -1)
        for row, step in zip(rows, steps, strict=True):
            self.write_rows(row, step.t, labels)
        bound.start(*started(steps, noise, labels))
        bound.coefficients[...] = np.ravel([coefficients(s, history) for s in steps])
        bound.set_labels(labels)
        bound.request.infer()
        return torch.from_numpy(bound.put_out[0].copy())

    def write_rows(self, row: Tensor, t: float, labels: Tensor | None) -> None:
        """row: (batch, width), written."""
        table, labels = self.rows.at(t), self.row_labels(labels)
        if labels is None:
            row.copy_(table)
        else:
            torch.index_select(table, 0, labels, out=row)

    def stepped(self, steps: Sequence[SolverStep], noise: Tensor, labels: Tensor | None, clip: float | None) -> Tensor:
        history = history_of(steps)
        forms = self.solving(Solving(history, clip))
        x, past = started(steps, noise, labels)
        for i, step in enumerate(steps):
            place = self.place(i)
            bound = forms[place]
            bound.start(x, past)
            bound.coefficients[...] = coefficients(step, history)
            self.write_rows(torch.from_numpy(bound.rows), step.t, labels)
            bound.set_labels(labels)
            self.infer(bound, self.index["forms"][place], i)
            x, past = bound.put_out
        return torch.from_numpy(x.copy())


class Bound:
    """What a request reads and writes, bound to it once and not at every step: arrays that are its memory."""

    def __init__(self, request, form: Mapping, labelled: bool, solving: Solving | None):
        """form: of `graph.json`."""
        self.request, places = request, list(range(len(request.model_inputs)))

        def last(there: bool) -> np.ndarray | None:
            return request.get_input_tensor(places.pop()).data if there else None

        self.past = last(solving is not None and solving.history > 0)
        self.coefficients = last(solving is not None)
        self.weights = last(bool(form["skipped"]) and form["summed"])
        self.x, self.rows, *labels = (request.get_input_tensor(i).data for i in places[: 3 if labelled else 2])
        self.labels = labels[0] if labels else None
        self.reused = dict.fromkeys(places[3 if labelled else 2 :])  # place -> tensor that another step's request wrote
        updates = solving is not None and solving.steps is None
        self.put_out = [request.get_output_tensor(i).data for i in range(2 if updates else 1)]

    def start(self, x: np.ndarray, past: np.ndarray) -> None:
        self.x[...] = x
        if self.past is not None:
            self.past[...] = past

    def set_labels(self, labels: Tensor | None) -> None:
        if self.labels is not None:
            self.labels[...] = labels.numpy()

    def set_reused(self, tensors: Sequence, weights: Sequence[float]) -> None:
        if self.weights is not None:
            self.weights[...] = weights
        for place, tensor in zip(self.reused, tensors, strict=True):
            if self.reused[place] is not tensor:
                self.request.set_input_tensor(place, tensor)
                self.reused[place] = tensor


class Kept:
    """The outputs that later steps need, in tensors that are used in turns."""

    def __init__(self, terms: dict[str, list]):
        """terms: as `sums` returns them."""
        self.terms = terms
        self.last_use = {name: {source: step for step, found in enumerate(rows) for source, _ in found}
                         for name, rows in terms.items()}
        self.tensors: dict[str, list] = {name: [] for name in terms}
        self.held: dict[str, dict[int, int]] = {name: {} for name in terms}  # computed step -> place in tensors
        self.spare: dict[str, list[int]] = {name: [] for name in terms}      # places

    def reset(self) -> None:
        """A new trajectory: nothing is kept of one that ended early."""
        for name, held in self.held.items():
            self.spare[name] += held.values()
            held.clear()

    def read(self, skipped: Sequence[tuple[str, int]], step: int) -> tuple[list, list[float]]:
        """-> the tensors that the step's skipped outputs are made of, and their weights. skipped: (sublayer, how many);
        where there are fewer yet, the oldest stands in with weight 0. Those of one sublayer come by their places and not by
        their age, so that most find themselves bound to the input where they were."""
        tensors, weights = [], []
        for name, most in skipped:
            found = self.terms[name][step]
            padded = [*found, *[[found[-1][0], 0.0]] * (most - len(found))]
            for source, _ in padded:
                if source not in self.held[name]:
                    raise ValueError(f"graph: {name}: step {step} reuses the output of step {source}, but none is kept; a "
                                     "trajectory starts at step 0")
            placed = sorted((self.held[name][source], weight) for source, weight in padded)
            tensors += [self.tensors[name][place] for place, _ in placed]
            weights += [weight for _, weight in placed]
        return tensors, weights

    def write(self, name: str, step: int, like) -> object:
        """-> the tensor that this step's output goes to; like: one of its shape."""
        import openvino as ov
        tensors, spare = self.tensors[name], self.spare[name]
        if not spare:
            tensors.append(ov.Tensor(like.element_type, like.shape))
        place = self.held[name][step] = spare.pop() if spare else len(tensors) - 1
        return tensors[place]

    def release(self, step: int) -> None:
        """What no step after this one needs is free again."""
        for name, held in self.held.items():
            for source in [s for s in held if self.last_use[name].get(s, -1) <= step]:
                self.spare[name].append(held.pop(source))


def live_graph(denoiser: Denoiser, recipe: Recipe, batch: int) -> GraphPredictor:
    """`export` and `open_graph` in one, on as many threads as torch has, with nothing left on disk once it is gone."""
    folder = tempfile.TemporaryDirectory()
    export(denoiser.model, recipe, folder.name)
    predict = open_graph(folder.name, batch, torch.get_num_threads())
    predict.files = folder  # removed with it
    return predict
