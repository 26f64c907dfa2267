"""What a trajectory really computed: calls of the layers themselves, whatever a cache says that it skips."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

import torch
from torch import nn

from tasks.core.cost import LayerCost, layer_costs
from tasks.core.denoiser import Denoiser


@contextlib.contextmanager
def counted_calls(layers: Mapping[str, nn.Module]) -> Iterator[Counter]:
    """Yields calls by layer. layers: Linear and Conv2d by path, as they were before anything wrapped the modules around them.

    A cache takes the place of the `forward` of a sublayer or a block, so a hook there would count skipped ones, too.
    """
    calls: Counter = Counter()

    def hook(name: str):
        def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            calls[name] += 1
        return count

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()


class Meter:
    """Calls -> shares of the uncached run's work."""

    def __init__(self, denoiser: Denoiser):
        """denoiser: with nothing live on it."""
        self.costs: Sequence[LayerCost] = layer_costs(denoiser)
        with counted_calls(denoiser.prunable_layers()) as calls, torch.inference_mode():
            labels = torch.zeros(1, dtype=torch.int64) if denoiser.num_classes else None
            denoiser(torch.zeros(1, *denoiser.sample_shape), torch.zeros(1, dtype=torch.int64), labels)
        self.once = dict(calls)  # some layers run twice in one evaluation: a DiT's first timestep embedding

    def shares(self, calls: Mapping[str, int], evaluations: int) -> dict[str, float]:
        """evaluations: of the network in the uncached run. -> computed_share of its sublayer evaluations, macs_share.

        A sublayer of which only some layers ran counts as their mean. An attention product ran as often as its sublayer.
        """
        layers = {name: calls.get(name, 0) / (once * evaluations) for name, once in self.once.items()}
        parts = defaultdict(list)
        for cost in self.costs:
            if cost.sublayer and cost.name in layers:
                parts[cost.sublayer].append(layers[cost.name])
        sublayers = {name: mean(ran) for name, ran in parts.items()}
        ran = {cost.name: layers.get(cost.name, sublayers.get(cost.sublayer)) for cost in self.costs}
        return {"computed_share": mean(sublayers.values()),
                "macs_share": sum(cost.macs * ran[cost.name] for cost in self.costs) / sum(cost.macs for cost in self.costs)}
