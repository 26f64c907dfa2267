"""A compressed model as OpenVINO graphs: one or two for each distinct step mask of the cache plan. Not shipped inside packages.

Integer layers run as integers: OpenVINO's low-precision transformations turn FakeQuantize on a layer's input and
int8 -> Convert -> Multiply on its weights into one u8 x i8 kernel. bf16 layers run as bf16. Everything else (norms, softmax,
sums) runs in fp32, or in bf16 too if no layer is left in fp32.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from tasks.core import disk
from tasks.core.denoiser import Denoiser
from tasks.core.hooks import record
from tasks.core.recipe import Recipe
from tasks.runtime.cache import ATTRIBUTE as LIVE_CACHE
from tasks.runtime.cache import TRUNK
from tasks.runtime.checks import file_facts
from tasks.runtime.compiling import WEIGHTS, compile_graphs
from tasks.runtime.graph_index import INDEX, SINUSOIDS, Form, lowered, read_index, step_forms, sums, weight_bits
from tasks.runtime.precision import Bf16Layer, live_precision

ALIGNMENT = 64  # bytes, of a constant in the weights file, as OpenVINO's own serialiser keeps it


class _Given(nn.Module):
    """Stands in for the sinusoids of a time (diffusers' Timesteps): they are computed outside of the graph, in fp32."""

    def forward(self, _t: Tensor) -> Tensor:
        return self.value


class _Step(nn.Module):
    """One evaluation as a function of tensors: x, time, labels if there are any -> prediction, outputs of `sublayers`.

    The time is its sinusoids (N, channels), where the model has such (`sinusoids`), else t itself: a graph whose own numbers
    are bf16 would round t, so that 992 to 995 were one timestep.
    """

    def __init__(self, model: nn.Module, sublayers: Sequence[str]):
        super().__init__()
        self.model, self.sublayers = model, sublayers

    def forward(self, x: Tensor, time: Tensor, *labels: Tensor) -> tuple[Tensor, ...]:
        t = time if time.dim() < 2 else x.new_zeros(len(x))
        with record(self.model, self.sublayers) as outputs, given_time(self.model, time):
            prediction = self.model(x, timestep=t, class_labels=labels[0] if labels else None, return_dict=False)[0]
        return (prediction[:, : x.shape[1]], *outputs)


@contextlib.contextmanager
def given_time(model: nn.Module, time: Tensor) -> Iterator[None]:
    """While open, every Timesteps of the model puts `time` out, where that is sinusoids."""
    places = [(parent, leaf, child) for parent in model.modules() for leaf, child in parent.named_children()
              if isinstance(child, Timesteps)] if time.dim() == 2 else []
    given = _Given()
    given.value = time
    try:
        for parent, leaf, _ in places:
            parent._modules[leaf] = given
        yield
    finally:
        for parent, leaf, child in places:
            parent._modules[leaf] = child


def sinusoids(model: nn.Module) -> dict | None:
    """Arguments of the model's sinusoids of the time, all of one kind; None where a learned table stands for them."""
    found = [{key: getattr(module, key) for key in SINUSOIDS} for module in model.modules() if isinstance(module, Timesteps)]
    assert all(one == found[0] for one in found)
    return found[0] if found else None


def time_rows(t: Tensor, how: Mapping | None) -> Tensor:
    """t (N,) or () -> what the graph takes, (N, channels) or (1, channels) fp32; t itself without sinusoids."""
    return t if how is None else Timesteps(**how)(t.reshape(-1).float())


def export(model: nn.Module, recipe: Recipe, folder: str | Path) -> None:
    """Write the graphs of a diffusers model on which masks and precision are live and a cache is not.

    folder gets `<i>.xml` for form i of a step, `weights.bin` that all share, and `graph.json`. The batch is open until
    `open_graph`. Raises ValueError if the live precision is not the recipe's or a cache is live.
    """
    import openvino as ov
    check_live(model, recipe)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    example, plan = example_inputs(model), recipe.cache
    terms = sums(plan, recipe.timesteps) if plan else {}
    steps = step_forms(terms, recipe.nfe)
    forms = list(dict.fromkeys(steps))
    whole = trace(model, example, list(terms))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        aside = Path(partial)
        for i, form in enumerate(forms):
            ov.save_model(cut(whole, list(terms), form), aside / f"{i}.xml", compress_to_fp16=False)
        pool_weights(aside, len(forms))
        index = {"forms": [{"skipped": form.skipped, "kept": form.kept, "summed": form.summed} for form in forms],
                 "sinusoids": sinusoids(model), "labelled": len(example) == 3, "sums": terms,
                 "steps": [forms.index(form) for form in steps] if plan else None,
                 "inference_precision": rest_precision(model), "precision": lowered(recipe.precision),
                 "files": {path.name: file_facts(path) for path in sorted(aside.iterdir())}}
        put_in_place(aside, folder, index)


def put_in_place(aside: Path, folder: Path, index: dict) -> None:
    """Move files over those of the same name, which a compiled graph may be reading, and write the index last: whoever opens
    the folder meanwhile finds files that are not those of the index."""
    for path in aside.iterdir():
        os.replace(path, folder / path.name)
    for path in folder.glob("*.xml"):
        if path.name not in index["files"]:
            path.unlink()
    disk.write_whole(folder / INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")


@torch.no_grad()
def trace(model: nn.Module, example: tuple[Tensor, ...], sublayers: Sequence[str]):
    """-> openvino.Model with every axis but the batch fixed; outputs: prediction, then those of `sublayers`."""
    import openvino as ov
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes become constants: only the batch is to stay open
        traced = torch.jit.trace(_Step(model, sublayers).eval(), example, check_trace=False)  # the check traces it again
        # shared, bf16 weights that are not contiguous would be read from a copy that is gone by then
        graph = ov.convert_model(traced, example_input=example, share_weights=False)
    assert len(graph.inputs) == len(example), "the trace dropped an input"
    graph.reshape({port: [-1, *tensor.shape[1:]] for port, tensor in zip(graph.inputs, example, strict=True)})
    return graph


def cut(whole, sublayers: Sequence[str], form: Form):
    """The graph of one form: outputs of skipped sublayers become inputs, in their order, after the inputs that were there, and
    after these, where they are summed, one vector of all weights.

    whole: as `trace` returns for these `sublayers`. What only served a skipped sublayer is no longer reached, so it is gone.
    """
    import openvino as ov
    ops = ov.opset13
    graph = whole.clone()
    results = dict(zip(sublayers, graph.get_results()[1:], strict=True))
    given, count = [], sum(most for _, most in form.skipped)
    summed = form.summed and count > 0
    vector = ops.parameter([count], np.float32, "weights") if summed else None
    weights = iter(ops.variadic_split(vector, 0, [1] * count).outputs()) if summed else None
    for name, most in form.skipped:
        output = results[name].input_value(0)
        kept = [ops.parameter(output.get_partial_shape(), np.float32, f"{name}/{k}") for k in range(most)]
        terms = [ops.multiply(y, next(weights)) for y in kept] if summed else kept
        replacement = functools.reduce(ops.add, terms).output(0)
        if name == TRUNK:  # what it put out is a difference that nobody reads: what was subtracted from is
            output, entered = output.get_node().input_values()
            replacement = ops.add(entered, replacement).output(0)
        for reader in output.get_target_inputs():
            reader.replace_source_output(replacement)
        given += kept
    put_out = [graph.get_results()[0], *(results[name] for name in form.kept)]
    return ov.Model(put_out, [*graph.get_parameters(), *given, *([vector] if summed else [])])


def check_live(model: nn.Module, recipe: Recipe) -> None:
    if LIVE_CACHE in vars(model):
        raise ValueError("export: a cache is live on the model; remove_cache first, the graphs hold the plan themselves")
    wanted, live = recipe.precision, live_precision(model)
    for layer in sorted(wanted.keys() | live.keys()):
        is_now, should_be = live.get(layer, "fp32"), wanted.get(layer, "fp32")
        if is_now != should_be:
            raise ValueError(f"export: {layer} is {is_now} on the model and {should_be} in the recipe")


def rest_precision(model: nn.Module) -> str:
    """OpenVINO's inference precision: bf16 if there are bf16 layers and none in fp32, else f32 (bf16 layers stay bf16)."""
    inside = {m.layer for m in model.modules() if isinstance(m, Bf16Layer)}
    plain = any(isinstance(m, (nn.Linear, nn.Conv2d)) and m not in inside for m in model.modules())
    return "bf16" if inside and not plain else "f32"


def example_inputs(model: nn.Module) -> tuple[Tensor, ...]:
    """x, the time and, for a conditional model, labels of two samples."""
    denoiser = Denoiser(model, schedule=None)
    labels = (torch.tensor([0, 0]),) if denoiser.num_classes else ()
    return torch.zeros(2, *denoiser.sample_shape), time_rows(torch.tensor([1, 2]), sinusoids(model)), *labels


def pool_weights(folder: Path, count: int) -> None:
    """Move the constants of `0.xml` ... into one file; equal ones, most of all weights, are stored once."""
    offsets: dict[bytes, int] = {}
    with open(folder / WEIGHTS, "wb") as pool:
        for path in (folder / f"{i}.xml" for i in range(count)):
            tree, constants = ElementTree.parse(path), path.with_suffix(".bin").read_bytes()
            for data in tree.iterfind("./layers/layer[@type='Const']/data"):
                start, size = int(data.get("offset")), int(data.get("size"))
                blob = constants[start : start + size]
                key = hashlib.blake2b(blob).digest()
                if key not in offsets:
                    pool.write(bytes(-pool.tell() % ALIGNMENT))
                    offsets[key] = pool.tell()
                    pool.write(blob)
                data.set("offset", str(offsets[key]))
            path.write_text(renumbered(ElementTree.tostring(tree.getroot(), encoding="unicode")))
            path.with_suffix(".bin").unlink()


def renumbered(xml: str) -> str:
    """OpenVINO's own names (Model3, Constant_4781) count every node that the process has made; here they count from 0 in each
    file, so that the same model gives the same bytes whatever was exported before it."""
    seen: dict[str, int] = {}
    return re.sub(r'"(Model|[A-Z][A-Za-z]*_)\d+"', lambda m: f'"{m[1]}{seen.setdefault(m[0], len(seen))}"', xml)


def open_graph(folder: str | Path, batch: int, threads: int, **config: object) -> "GraphPredictor":
    """-> predict(x (batch, C, H, W) fp32, t (batch,) or scalar, labels (batch,) int64 or None, step) -> (batch, C, H, W).

    Graphs are compiled for the CPU with static shapes. Steps are taken in order from 0; a tensor kept between steps is the
    output of the graph that writes it and the input of those that read it, never copied. config: further OpenVINO properties.
    Files are compared with the hashes in `graph.json`, and in a package with those of `package.json`, before they are compiled.
    Raises ValueError for damaged files and those of an older version, for a recipe beside them that is not theirs or means
    nothing, for a graph that the compiler dies of, for another batch, a step that the cache plan does not have or that is taken
    out of order.
    """
    return GraphPredictor(Path(folder), batch, threads, config)


class GraphPredictor:
    """See `open_graph`. Form i of `graph.json` is `compiled[i]`; its one request is `requests[i]`."""

    def __init__(self, folder: Path, batch: int, threads: int, config: dict):
        self.index, self.batch = read_index(folder), batch
        # Pinned, every process takes the same first cores: two workers of one thread each ran at 40 % of their speed.
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
                      "INFERENCE_PRECISION_HINT": self.index["inference_precision"], **config}
        bits = weight_bits(self.index["precision"])
        self.compiled = compile_graphs(folder, len(self.index["forms"]), batch, bits, properties)
        self.requests = [compiled.create_infer_request() for compiled in self.compiled]
        self.given = [Given(request, form, self.index["labelled"])
                      for request, form in zip(self.requests, self.index["forms"], strict=True)]
        self.kept = Kept(self.index["sums"])
        self.times: dict[float, Tensor] = {}  # rows of times that a whole batch had

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        if len(x) != self.batch:
            raise ValueError(f"graph: opened for a batch of {self.batch}, got {len(x)}")
        steps = self.index["steps"]
        if steps is not None and not 0 <= step < len(steps):
            raise ValueError(f"graph: step {step} is not between 0 and {len(steps) - 1}, the last of the cache plan")
        place = steps[step] if steps else 0
        form, request, given = (found[place] for found in (self.index["forms"], self.requests, self.given))
        if step == 0:
            self.kept.reset()
        tensors, weights = self.kept.read(form["skipped"], step)
        given.write(x.float(), self.time(t), labels, tensors, weights)
        for i, name in enumerate(form["kept"], start=1):
            request.set_output_tensor(i, self.kept.write(name, step, request.get_output_tensor(i)))
        request.infer()
        self.kept.release(step)
        return torch.from_numpy(given.prediction.copy())


    def time(self, t: Tensor) -> Tensor:
        """A learned table has a row for each whole timestep, of which the nearest is taken."""
        how, values = self.index["sinusoids"], set(t.reshape(-1).tolist())
        if how is None:
            return t.float().round().long()
        if len(values) > 1:
            return time_rows(t, how)
        (value,) = values
        if value not in self.times:
            self.times[value] = time_rows(torch.tensor([value]), how)
        return self.times[value]


class Given:
    """What a request reads and writes, bound to it once and not at every step."""

    def __init__(self, request, form: Mapping, labelled: bool):
        """form: of `graph.json`."""
        self.request, places = request, list(range(len(request.model_inputs)))
        last = places.pop() if form["skipped"] and form["summed"] else None
        own = 3 if labelled else 2
        self.own = [request.get_input_tensor(i).data for i in places[:own]]
        self.weights = None if last is None else request.get_input_tensor(last).data
        self.reused = dict.fromkeys(places[own:])  # place -> tensor that another step's request wrote
        self.prediction = request.get_output_tensor(0).data

    def write(self, x: Tensor, t: Tensor, labels: Tensor | None, reused: Sequence, weights: Sequence[float]) -> None:
        for array, tensor in zip(self.own, (x, t, labels), strict=False):
            array[...] = tensor.numpy()
        if self.weights is not None:
            self.weights[...] = weights
        for place, tensor in zip(self.reused, reused, strict=True):
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


def live_graph(denoiser: Denoiser, recipe: Recipe, batch: int) -> "GraphPredictor":
    """`export` and `open_graph` in one, on as many threads as torch has, with nothing left on disk."""
    with tempfile.TemporaryDirectory() as folder:
        export(denoiser.model, recipe, folder)
        return open_graph(folder, batch, torch.get_num_threads())
