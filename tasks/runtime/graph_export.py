"""Writes a compressed model as OpenVINO graphs: one or two for each distinct step mask of the cache plan, and one that computes
what timestep and label decide. Not shipped inside packages.

A network's graphs do not know the time: they are given its rows (`conditioning.py`). In bf16 a graph would round the timestep
itself, so that 992 to 995 gave one prediction, and would compute at every step what a list of timesteps fixes once and for all.

Integer layers run as integers: OpenVINO's low-precision transformations turn FakeQuantize on a layer's input and
int8 -> Convert -> Multiply on its weights into one u8 x i8 kernel. bf16 layers run as bf16. Everything else (norms, softmax,
sums) runs in fp32, or in bf16 too if no layer is left in fp32.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tasks.core import disk
from tasks.core.denoiser import Denoiser
from tasks.core.hooks import record
from tasks.core.recipe import Recipe
from tasks.runtime.cache import ATTRIBUTE as LIVE_CACHE
from tasks.runtime.cache import TRUNK
from tasks.runtime.checks import file_facts
from tasks.runtime.compiling import WEIGHTS
from tasks.runtime.conditioning import (
    MODULATION,
    TIME,
    Given,
    give_rows,
    label_rows,
    row_parts,
    suitable_cut,
    take_rows_away,
    widths,
)
from tasks.runtime.graph_index import CONDITIONING, INDEX, Form, graph_files, lowered, step_forms, sums
from tasks.runtime.precision import Bf16Layer, live_precision

ALIGNMENT = 64  # bytes, of a constant in the weights file, as OpenVINO's own serialiser keeps it


class _Step(nn.Module):
    """One evaluation as a function of tensors: x, rows and labels if it takes any -> prediction, outputs of `sublayers`."""

    def __init__(self, model: nn.Module, given: Given, sublayers: Sequence[str], stand_in: Tensor | None):
        """given: what is live on the model. stand_in: for labels that are in the rows."""
        super().__init__()
        self.model, self.given, self.sublayers, self.stand_in = model, given, sublayers, stand_in

    def forward(self, x: Tensor, rows: Tensor, *labels: Tensor) -> tuple[Tensor, ...]:
        self.given.set_rows(rows)
        with record(self.model, self.sublayers) as outputs:
            prediction = self.model(x, timestep=torch.zeros(1), class_labels=labels[0] if labels else self.stand_in,
                                    return_dict=False)[0]
        return (prediction[:, : x.shape[1]], *outputs)


class _Conditioning(nn.Module):
    """t and, of modulations, labels -> rows."""

    def __init__(self, model: nn.Module, cut: str):
        super().__init__()
        self.model, self.cut = model, cut

    def forward(self, t: Tensor, *labels: Tensor) -> Tensor:
        return torch.cat(row_parts(self.model, self.cut, t, labels[0] if labels else None), 1)


def export(model: nn.Module, recipe: Recipe, folder: str | Path) -> None:
    """Write the graphs of a diffusers model on which masks and precision are live and a cache is not.

    folder gets `<i>.xml` for form i of a step, `conditioning.xml`, `weights.bin` that all share, and `graph.json`. The batch
    is open until `open_graph`. Raises ValueError if the live precision is not the recipe's or a cache is live.
    """
    import openvino as ov
    check_live(model, recipe)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan, cut, labels = recipe.cache, suitable_cut(model), label_rows(model)
    terms = sums(plan, recipe.timesteps) if plan else {}
    steps = step_forms(terms, recipe.nfe)
    forms = list(dict.fromkeys(steps))
    conditioning = trace_conditioning(model, cut)
    whole, rest = trace_step(model, cut, list(terms))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        aside = Path(partial)
        for i, form in enumerate(forms):
            ov.save_model(without_skipped(whole, list(terms), form), aside / f"{i}.xml", compress_to_fp16=False)
        ov.save_model(conditioning, aside / CONDITIONING, compress_to_fp16=False)
        pool_weights(aside, graph_files(len(forms)))
        index = {"forms": [{"skipped": form.skipped, "kept": form.kept, "summed": form.summed} for form in forms],
                 "labelled": cut == TIME and labels > 0, "rows": {"labels": labels if cut == MODULATION else 0,
                                                                  "width": sum(widths(model, cut))},
                 "steps": [forms.index(form) for form in steps] if plan else None, "sums": terms,
                 "inference_precision": rest, "precision": lowered(recipe.precision),
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


def trace_step(model: nn.Module, cut: str, sublayers: Sequence[str]):
    """-> openvino.Model of an evaluation: x, rows, labels if they are not in the rows -> prediction, outputs of `sublayers`;
    the precision of what is in none of its layers."""
    labels = torch.tensor([0, 0]) if label_rows(model) else None
    x = torch.zeros(2, *Denoiser(model, schedule=None).sample_shape)
    given = give_rows(model, cut)
    try:
        inputs = x, torch.zeros(2, given.width), *((labels,) if cut == TIME and labels is not None else ())
        return trace(_Step(model, given, sublayers, labels), inputs), rest_precision(model)
    finally:
        take_rows_away(model)


def trace_conditioning(model: nn.Module, cut: str):
    """-> openvino.Model of what decides the rows: t, labels if they are in the rows -> rows."""
    labels = (torch.tensor([0, 0]),) if cut == MODULATION and label_rows(model) else ()
    return trace(_Conditioning(model, cut), (torch.tensor([1.0, 2.0]), *labels))


@torch.no_grad()
def trace(module: nn.Module, example: tuple[Tensor, ...]):
    """-> openvino.Model with every axis but the batch fixed."""
    import openvino as ov
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes become constants: only the batch is to stay open
        traced = torch.jit.trace(module.eval(), example, check_trace=False)  # the check traces it again
        # shared, bf16 weights that are not contiguous would be read from a copy that is gone by then
        graph = ov.convert_model(traced, example_input=example, share_weights=False)
    assert len(graph.inputs) == len(example), "the trace dropped an input"
    graph.reshape({port: [-1, *tensor.shape[1:]] for port, tensor in zip(graph.inputs, example, strict=True)})
    return graph


def without_skipped(whole, sublayers: Sequence[str], form: Form):
    """The graph of one form: outputs of skipped sublayers become inputs, in their order, after the inputs that were there, and
    after these, where they are summed, one vector of all weights.

    whole: as `trace_step` makes it for these `sublayers`. What only served a skipped sublayer is no longer reached, so it is
    gone.
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


def pool_weights(folder: Path, names: Sequence[str]) -> None:
    """Move the constants of graphs into one file; equal ones, most of all weights, are stored once."""
    offsets: dict[bytes, int] = {}
    with open(folder / WEIGHTS, "wb") as pool:
        for path in (folder / name for name in names):
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
