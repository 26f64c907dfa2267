"""Times of single layers inside the running model, where fusion, caches and memory are those of real use.

A probe makes one evaluation of the network and says what each layer took. Eager: hooks around the modules. OpenVINO: its own
counters of executed nodes (whole microseconds). An attention product's time is all that its module does outside its layers,
softmax included, half for each product; the rounding of an integer layer's input counts as that layer's. What OpenVINO's nodes
do outside all layers is REST.
"""

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from tasks.core.cost import LayerCost
from tasks.runtime.graph import GraphPredictor

Probe = Callable[[], dict[str, float]]  # -> microseconds by layer and attention product, and of the REST
REST = ""
PRODUCTS = (".qk", ".av")  # of an attention module, as `core.cost` names them


def modules_of(costs: Sequence[LayerCost]) -> list[str]:
    """Paths of the layers and of the attention modules that hold the products."""
    return list(dict.fromkeys(c.name.removesuffix(".qk").removesuffix(".av") for c in costs))


def layer_times(costs: Sequence[LayerCost], by_module: Mapping[str, float]) -> dict[str, float]:
    """Microseconds by module path -> by layer and attention product."""
    return {c.name: by_module.get(c.name[:-3], 0.0) / 2 if c.name.endswith(PRODUCTS) else by_module.get(c.name, 0.0)
            for c in costs}


def eager_probe(model: nn.Module, costs: Sequence[LayerCost], evaluate: Callable[[], None]) -> Probe:
    """evaluate: one forward of `model`. costs: of its layers."""
    def probe() -> dict[str, float]:
        with clocked(model, modules_of(costs)) as spent:
            evaluate()
        return layer_times(costs, spent)
    return probe


@contextmanager
def clocked(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, float]]:
    """Yields a dict that is filled with each module's own microseconds, those of modules inside it taken off."""
    spent: dict[str, float] = defaultdict(float)
    open_calls: list[list[float]] = []  # of each call under way: its start, the seconds spent in calls inside it

    def enter(module: nn.Module, args: tuple) -> None:
        open_calls.append([time.perf_counter(), 0.0])

    def leave(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            started, inside = open_calls.pop()
            elapsed = time.perf_counter() - started
            spent[name] += 1e6 * (elapsed - inside)
            if open_calls:
                open_calls[-1][1] += elapsed
        return hook

    found = {name: model.get_submodule(name) for name in modules}
    hooks = [h for name, m in found.items() for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave(name)))]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def graph_probe(predict: GraphPredictor, costs: Sequence[LayerCost], inputs: tuple[Tensor, Tensor, Tensor | None]) -> Probe:
    """predict: opened with PERF_COUNT on. costs: of its layers. inputs: x, t, labels."""
    modules = modules_of(costs)

    def probe() -> dict[str, float]:
        predict(*inputs, 0)
        spent: dict[str, float] = defaultdict(float)
        for node in predict.requests[0].profiling_info:
            spent[owner(node.node_name, modules)] += 1e6 * node.real_time.total_seconds()
        return {**layer_times(costs, spent), REST: spent[REST]}
    return probe


def owner(node_name: str, modules: Sequence[str]) -> str:
    """The innermost of `modules` that a traced node came from; REST for none.

    `__module.model.transformer_blocks.0.attn1.to_q/aten::linear/MatMul` came from transformer_blocks.0.attn1.to_q.
    """
    path = node_name.partition("/")[0].removeprefix("__module.model.")
    return max((m for m in modules if path == m or path.startswith(f"{m}.")), key=len, default=REST)


def role(layer: str) -> str:
    """What equal blocks share: the path without its numbers."""
    return re.sub(r"\d+", "*", layer)


def pooled(samples: Mapping[str, Sequence[float]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Each layer's median time, over its own samples and those of the layers of its role and shape: they do the same work.

    shapes: of the layers' weights; a product has none.
    """
    groups: dict[tuple, list[float]] = defaultdict(list)
    for layer, times in samples.items():
        groups[role(layer), shapes.get(layer)].extend(times)
    return {layer: statistics.median(groups[role(layer), shapes.get(layer)]) for layer in samples}
