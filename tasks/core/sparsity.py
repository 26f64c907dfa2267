"""What rooms share about masks: the N:M pattern, and how much of each layer a set of masks keeps."""

import copy
from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from tasks.runtime.masks import shrink_units


def parse_pattern(grain: str) -> tuple[int, int]:
    """`2:4` -> (2, 4)."""
    n, _, m = grain.partition(":")
    if not (n.isdigit() and m.isdigit() and 0 < int(n) <= int(m)):
        raise ValueError(f"grain {grain!r} is not N:M with 0 < N <= M")
    return int(n), int(m)


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Keep the n largest |w| of every m consecutive weights along dim 1, what a product sums over; ties go to the earlier.

    weight: Linear (out, in) or Conv2d (out, in, kh, kw): a convolution's groups run along its input channels, tap by tap,
    as the NHWC kernels of semi-structured sparsity read them. Raises ValueError if dim 1 is no multiple of m.
    """
    if weight.shape[1] % m:
        raise ValueError(f"dim 1 of a weight of shape {tuple(weight.shape)} is no multiple of {m}")
    magnitude = weight.detach().abs().movedim(1, -1)
    member = magnitude.reshape(-1, m).unbind(1)
    rank = [torch.zeros_like(member[0], dtype=torch.uint8)] * m  # how many of its group come before it
    for i, j in combinations(range(m), 2):
        # comparing pairs is several times faster than sorting groups of four, and distillation does it every step
        later = (member[j] > member[i]).view(torch.uint8)
        rank[i], rank[j] = rank[i] + later, rank[j] + (1 - later)
    return torch.stack([r < n for r in rank], 1).view(magnitude.shape).movedim(-1, 1).contiguous()


def layer_density(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Layer path -> kept share of its weight, for the masked Linear and Conv2d layers."""
    return {name.removesuffix(".weight"): mask.float().mean().item() for name, mask in masks.items()
            if name.endswith(".weight") and mask.ndim > 1}


def mask_density(masks: Mapping[str, Tensor]) -> float:
    """Kept share of all masked weights together."""
    return sum(mask.sum().item() for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def kept_shares(dense: nn.Module, grain: str | None, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of each pruned layer's weights that is stored and computed, by layer path: a recipe's `density`.

    For whole units it is a ratio of shapes: a unit that goes takes the columns of the layer that reads it along.
    """
    if grain != "unit":
        return layer_density(masks)
    small = copy.deepcopy(dense)
    shrink_units(small, masks)
    before = {name: p.numel() for name, p in dense.named_parameters() if name.endswith(".weight")}
    after = {name: p.numel() for name, p in small.named_parameters() if name in before}
    return {name.removesuffix(".weight"): after[name] / before[name] for name in before if after[name] < before[name]}
