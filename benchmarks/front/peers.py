"""Other people's tools under our sampling loop: a peer prunes or calls the network; solver, list and noise are ours.

Those that cache are the study of caches' (`benchmarks.cache.packages`). The packages are imported inside: only the peers'
environment has them all.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cache.arms import SUBLAYERS
from benchmarks.cache.packages import PACKAGES, dbcache
from benchmarks.front.lab import CALIBRATION, Lab
from tasks.core.denoiser import Denoiser
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, network, trajectory
from tasks.runtime.conditioning import MODULATION, TIME, row_parts, suitable_cut
from tasks.runtime.graph_export import trace_step
from tasks.runtime.masks import hidden_units
from tasks.runtime.solver import Predict, recipe_steps

STATES = 300  # that nncf calibrates on, its own default


# ---- nncf and OpenVINO ----

def nncf(lab: Lab, denoiser: Denoiser, recipe: Recipe, batch: int) -> Predict:
    """nncf's static int8 of the exported graph, for a transformer where it is one; compiled as OpenVINO does by default, so
    what is left runs in bf16 where the CPU has it."""
    import nncf as tool
    import openvino as ov
    graph, _ = trace_step(denoiser.model, suitable_cut(denoiser.model), [])
    dataset = tool.Dataset(list(states(denoiser, recipe)))
    kind = {"model_type": tool.ModelType.TRANSFORMER} if denoiser.architecture == "dit" else {}
    quantised = tool.quantize(graph, dataset, subset_size=STATES, **kind)
    quantised.reshape({port: [batch, *list(port.partial_shape)[1:]] for port in quantised.inputs})
    compiled = ov.Core().compile_model(quantised, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(),
                                                          "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False})
    request, rows = compiled.create_infer_request(), {}  # of a step and its labels, as ours look them up

    def predict(x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        key = float(t.reshape(-1)[0]), None if labels is None else tuple(labels.tolist())
        if key not in rows:
            rows[key] = given(denoiser.model, t.expand(len(x)), labels)
        return torch.from_numpy(request.infer([x.numpy(), *rows[key]], share_inputs=True)[0].copy())

    return predict


@torch.no_grad()
def given(model: nn.Module, t: Tensor, labels: Tensor | None) -> list[np.ndarray]:
    """What the graph takes beside x: rows that time and label decide, and labels where the rows are of the time alone."""
    cut = suitable_cut(model)
    rows = torch.cat(row_parts(model, cut, t.float(), labels if cut == MODULATION else None), 1)
    return [rows.numpy(), *([labels.numpy()] if cut == TIME and labels is not None else [])]


def states(denoiser: Denoiser, recipe: Recipe) -> Iterator[list[np.ndarray]]:
    """One at a time, along the recipe's own trajectories."""
    images = range(-(-STATES // recipe.nfe))
    noise, labels = initial_noise(denoiser.sample_shape, images, CALIBRATION), labels_for(images, denoiser.num_classes)
    times = [row.t for row in recipe_steps(denoiser.schedule.config, recipe)]
    for step, x, _ in trajectory(network(denoiser), denoiser.schedule, recipe, noise, labels):
        for i in range(len(x)):
            label = None if labels is None else labels[i:i + 1]
            yield [x[i:i + 1].numpy(), *given(denoiser.model, torch.tensor([times[step]]), label)]


# ---- eager torch ----

def torchao(lab: Lab, denoiser: Denoiser, recipe: Recipe, batch: int, *, compiled: bool = False) -> Predict:
    """int8 weights, activations rounded as they come; its kernels are made for torch.compile."""
    quantise_by_torchao(denoiser)
    if compiled:
        denoiser.model.forward = torch.compile(denoiser.model.forward, dynamic=False)
    return network(denoiser)


def quantise_by_torchao(denoiser: Denoiser) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    quantize_(denoiser.model, Int8DynamicActivationInt8WeightConfig())


def cached(name: str, lab: Lab, denoiser: Denoiser, recipe: Recipe, batch: int, **settings) -> Predict:
    chosen = {"sublayers": SUBLAYERS[lab.name]} if name == "taylorseer" else {}
    return PACKAGES[name](denoiser, recipe, **settings, **chosen)


def dbcache_torchao(lab: Lab, denoiser: Denoiser, recipe: Recipe, batch: int, **settings) -> Predict:
    """cache-dit over torchao's layers, as cache-dit's own documentation combines them."""
    quantise_by_torchao(denoiser)
    return dbcache(denoiser, recipe, **settings)


CALLERS: dict[str, Callable[..., Predict]] = {"nncf": nncf, "torchao": torchao, "dbcache_torchao": dbcache_torchao,
                                              **{name: partial(cached, name) for name in PACKAGES}}


# ---- pruning ----

def cut_by_torch_pruning(denoiser: Denoiser, share: float) -> Denoiser:
    """A share of the units of every feed-forward, or of the channels inside a UNet's resnets, by their weights' magnitude."""
    import torch_pruning as tp
    model = denoiser.model.requires_grad_(True)  # its graph is built from gradients
    labels = torch.zeros(2, dtype=torch.int64) if denoiser.num_classes else None
    inputs = {"sample": torch.randn(2, *denoiser.sample_shape), "timestep": torch.ones(2, dtype=torch.int64),
              "class_labels": labels, "return_dict": False}
    if denoiser.architecture == "dit":
        inputs["hidden_states"] = inputs.pop("sample")
    roots = {units.producers[0] for units in hidden_units(model) if not units.products}
    kept = [module for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and name not in roots]
    pruner = tp.pruner.MagnitudePruner(model, example_inputs=inputs, importance=tp.importance.MagnitudeImportance(p=2),
                                       pruning_ratio=share, ignored_layers=kept, round_to=8)
    pruner.step()
    return Denoiser(model.eval().requires_grad_(False), denoiser.schedule)


def masked_by_modelopt(denoiser: Denoiser) -> Denoiser:
    """ModelOpt's 2:4 masks by magnitude: masks alone, of which no kernel of a CPU is faster."""
    import modelopt.torch.sparsity as mts
    model = mts.export(mts.sparsify(copy.deepcopy(denoiser.model), mode="sparse_magnitude"))
    return Denoiser(model.eval().requires_grad_(False), denoiser.schedule)
