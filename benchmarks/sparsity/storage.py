"""What masks cost to store and to run through, counted and not measured (Mao et al., arXiv 1705.08922, sections 4 and 5)."""

from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor

from tasks.core.cost import LayerCost
from tasks.core.sparsity import GRAINS, grain_shape, parse_pattern, stored_bits

WEIGHT_BITS = 8  # as in the paper


def storage_share(layers: Sequence[LayerCost], masks: Mapping[str, Tensor], grain: str, kept: Mapping[str, float]) -> float:
    """Bits of all layers' weights, index included, over those of the dense model. kept: of each masked layer, by path."""
    bits = 0.0
    for layer in layers:
        mask = masks.get(f"{layer.name}.weight")
        if mask is None or grain == "unit":  # a unit leaves a smaller dense layer
            bits += layer.weights * kept.get(layer.name, 1.0) * WEIGHT_BITS
        else:
            rest = layer.weights - mask.numel()  # the bias
            bits += stored_bits(mask, pattern_of(mask, grain), WEIGHT_BITS) + rest * WEIGHT_BITS
    return bits / (WEIGHT_BITS * sum(layer.weights for layer in layers))


def pattern_of(mask: Tensor, grain: str) -> str:
    """Of N:M only M is taken from the grain: where layers are chosen one by one, N is the layer's own."""
    if ":" not in grain:
        return grain
    _, m = parse_pattern(grain)
    return f"{round(mask.float().mean().item() * m)}:{m}"


def reference_share(layers: Sequence[LayerCost], masks: Mapping[str, Tensor], grain: str) -> float:
    """References to partial sums by the masked layers, over one reference a product of the dense layers.

    An accelerator that walks through the kept weights adds each product to its output in memory (SCNN, arXiv 1708.04485); the
    products of one grain that belong to one output are added up first, and referenced once.
    """
    masked = {layer.name: layer for layer in layers if f"{layer.name}.weight" in masks}
    references = 0.0
    for name, layer in masked.items():
        mask = masks[f"{name}.weight"]
        references += layer.macs * mask.float().mean().item() / run_length(mask.shape, pattern_of(mask, grain))
    return references / sum(layer.macs for layer in masked.values())


def run_length(weight: Sequence[int], grain: str) -> int:
    """Kept weights of one grain that belong to the same output."""
    if ":" in grain:
        return parse_pattern(grain)[0]
    return prod(grain_shape(weight, grain if grain in GRAINS else "filter")[1:])  # a smaller dense layer walks by rows
