"""What a recipe costs on paper: MACs, BitOPs, bytes. Per image, over all steps, attention products included.

A MAC is one multiply-accumulate of a Linear, a Conv2d or an attention product (Q K^T and A V); normalisation, activation and
embedding lookups are not counted. BitOPs = sum of MACs x weight bits x activation bits (for a product: the bits of both sides).
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tasks.core.denoiser import Denoiser
from tasks.core.recipe import TOKENS, Recipe, bits
from tasks.runtime.cache import TRUNK

TRUNK_BLOCKS = ("transformer_blocks.", "down_blocks.", "mid_block.", "up_blocks.")


@dataclass(frozen=True)
class LayerCost:
    name: str             # module path; <attention path>.qk and .av for the products
    kind: str             # linear | conv | attention_product
    macs: int             # per image and evaluation of the network, dense
    weights: int          # parameters, bias included; 0 for products
    sublayer: str | None  # the cacheable sublayer that holds it


@torch.inference_mode()
def layer_costs(denoiser: Denoiser) -> list[LayerCost]:
    """One forward of one image, in the order of computation."""
    sublayers = [s.name for s in denoiser.sublayers()]
    found: list[LayerCost] = []

    def owner(name: str) -> str | None:
        return next((s for s in sublayers if name == s or name.startswith(s + ".")), None)

    def record(name: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            found.extend(module_costs(name, module, output, owner(name)))
        return hook

    hooks = [m.register_forward_hook(record(n)) for n, m in denoiser.model.named_modules() if is_counted(m)]
    try:
        with next(denoiser.model.parameters()).device:
            labels = torch.zeros(1, dtype=torch.int64) if denoiser.num_classes else None
            denoiser(torch.zeros(1, *denoiser.sample_shape), torch.zeros(1, dtype=torch.int64), labels)
    finally:
        for hook in hooks:
            hook.remove()
    return merge(found)


def is_counted(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Attention"


def module_costs(name: str, module: nn.Module, y: torch.Tensor, sublayer: str | None) -> list[LayerCost]:
    if isinstance(module, nn.Linear):
        macs = y.numel() * module.in_features
        return [LayerCost(name, "linear", macs, sum(p.numel() for p in module.parameters()), sublayer)]
    if isinstance(module, nn.Conv2d):
        kernel = module.weight[0].numel()  # in_channels / groups x height x width
        return [LayerCost(name, "conv", y.numel() * kernel, sum(p.numel() for p in module.parameters()), sublayer)]
    tokens = y.shape[1] if y.ndim == 3 else y.shape[-2] * y.shape[-1]
    product = tokens * tokens * module.to_q.out_features
    return [LayerCost(f"{name}.{part}", "attention_product", product, 0, sublayer) for part in ("qk", "av")]


def merge(costs: list[LayerCost]) -> list[LayerCost]:
    """A layer that runs twice in one evaluation (a shared embedding) has its MACs added and its weights counted once."""
    merged: dict[str, LayerCost] = {}
    for c in costs:
        before = merged.get(c.name)
        merged[c.name] = LayerCost(c.name, c.kind, c.macs + (before.macs if before else 0), c.weights, c.sublayer)
    return list(merged.values())


def evaluations(cost: LayerCost, recipe: Recipe) -> int:
    """How many of the recipe's steps compute this layer."""
    plan = recipe.cache
    if plan is None:
        return recipe.nfe
    unit = TRUNK if TRUNK in plan.sublayers and in_trunk(cost.name) else cost.sublayer
    if unit not in plan.sublayers:
        return recipe.nfe
    column = plan.sublayers.index(unit)
    return sum(row[column] for row in plan.compute)


def in_trunk(layer: str) -> bool:
    """Whether a skipped trunk leaves this layer out. A DiT's first block holds the timestep embedding of its output layer."""
    return layer.startswith(TRUNK_BLOCKS) and not layer.startswith("transformer_blocks.0.norm1.emb.")


def density(cost: LayerCost, recipe: Recipe) -> float:
    """Kept share of the layer's weights."""
    return densities_of(recipe).get(cost.name, 1.0)


def densities_of(recipe: Recipe) -> Mapping[str, float]:
    return (recipe.sparsity or {}).get("density") or {}


def kept_share(costs: Sequence[LayerCost], kept: Mapping[str, float], counted: str) -> float:
    """Of the dense model's `macs` or `weights`, dense layers counted. kept: share by layer, where it is not all."""
    return sum(getattr(c, counted) * kept.get(c.name, 1.0) for c in costs) / sum(getattr(c, counted) for c in costs)


def macs(costs: list[LayerCost], recipe: Recipe) -> int:
    """Per image, over all steps."""
    return round(sum(c.macs * evaluations(c, recipe) * density(c, recipe) for c in costs))


def bitops(costs: Sequence[LayerCost], recipe: Recipe) -> int:
    """Per image, over all steps (TMPQ-DM's definition, with every term at the same batch and all steps added)."""
    return bitops_counter(costs)(recipe)


def bitops_counter(costs: Sequence[LayerCost]) -> Callable[[Recipe], int]:
    """`bitops` of one network. A search asks for it a dozen times a candidate: what no recipe changes is looked up once."""
    names = [c.name for c in costs]
    of_token = [{token: c.macs * bitops_per_mac(token, c.kind) for token in TOKENS} for c in costs]

    def count(recipe: Recipe) -> int:
        kept, tokens = densities_of(recipe), map(recipe.precision.get, names, itertools.repeat("fp32"))
        once = map(dict.__getitem__, of_token, tokens)
        if kept or recipe.cache:
            return round(sum(n * evaluations(c, recipe) * kept.get(c.name, 1.0) for n, c in zip(once, costs, strict=True)))
        return recipe.nfe * sum(once)

    return count


@functools.cache
def bitops_per_mac(token: str, kind: str) -> int:
    weight, activation = bits(token)
    return activation * (activation if kind == "attention_product" else weight)


def size_bytes(costs: list[LayerCost], precision: Mapping[str, str], densities: Mapping[str, float], other: int = 0) -> int:
    """Bytes of the counted layers' weights at their stored bits, plus `other` parameters at 4 bytes (embeddings, norms)."""
    stored = sum(c.weights * densities.get(c.name, 1.0) * bits(precision.get(c.name, "fp32"))[0] / 8 for c in costs)
    return round(stored + 4 * other)
