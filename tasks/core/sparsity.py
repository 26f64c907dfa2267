"""What rooms share about masks: the grains, the masks that a saliency gives, and how much of each layer a set of masks keeps.

Grains, from single weights to whole rows (Mao et al., arXiv 1705.08922, section 3; N:M: arXiv 2102.04010). Beside the shape is
what one grain is in a Conv2d (out, in, kh, kw); a Linear and a 1 x 1 convolution have no kernel, there it is a tile (out, in):

  fine      1 weight
  N:M       the N of M consecutive weights along the inputs that stay; 2:4, 1:4, 4:8 ...
  vector    a row of the kernel (1, 1, 1, kw)             1 x 8
  kernel    a kernel (1, 1, kh, kw)                       8 x 8
  filter    all that one output reads (1, in, kh, kw)     1 x in
  unit      a hidden unit, an attention head or a group of channels, taken out of all layers that make or read it
            (`tasks.runtime.masks`): the layers get smaller
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod

import torch
from torch import Tensor, nn

from tasks.runtime.masks import hidden_units, shrink_units

GRAINS = ("fine", "vector", "kernel", "filter")  # of one weight; besides them N:M and unit
INDEX_BITS = 4  # of a grain's relative index
TILE = 8  # weights along each side of a Linear's vector and kernel: one AVX-512 register holds 2 x 8 floats


def grain_shape(weight: Sequence[int], grain: str) -> tuple[int, ...]:
    """Extent of one grain in a weight of that shape. Raises ValueError for an unknown grain."""
    if grain not in GRAINS:
        raise ValueError(f"grain {grain!r} is none of {', '.join(GRAINS)}")
    convolves = prod(weight[2:]) > 1
    last = (1,) * len(weight[2:])
    return {"fine": (1, 1, *last),
            "vector": (1, 1, *last[:-1], weight[-1]) if convolves else (1, TILE, *last),
            "kernel": (1, 1, *weight[2:]) if convolves else (TILE, TILE, *last),
            "filter": (1, *weight[1:])}[grain]


def grain_mask(saliency: Tensor, grain: str, density: float | None = None) -> Tensor:
    """Bool of the saliency's shape, True where a weight stays: the share `density` of the grains with the largest sums.

    saliency: >= 0, of a Linear's or Conv2d's weight, such as |w|. grain: N:M, whose density is N / M, or one of GRAINS.
    Ties go to the earlier grain, and at least one stays. Raises ValueError where a grain does not divide the shape.
    """
    if ":" in grain:
        return nm_mask(saliency, *parse_pattern(grain))
    if density is None or not 0 < density <= 1:
        raise ValueError(f"density of {grain}: {density} is not in (0, 1]")
    sums = grain_sums(saliency.detach(), grain)
    keep = torch.zeros(sums.numel(), dtype=torch.bool, device=saliency.device)
    keep[sums.flatten().argsort(descending=True, stable=True)[: max(1, round(density * sums.numel()))]] = True
    mask = keep.view(sums.shape)
    for dim, part in enumerate(grain_shape(saliency.shape, grain)):
        mask = mask.repeat_interleave(part, dim)
    return mask


def grain_sums(values: Tensor, grain: str) -> Tensor:
    """Sum over each grain, one dim for each of the weight's. Raises ValueError where a grain does not divide the shape."""
    extent = grain_shape(values.shape, grain)
    odd = [f"{size} by {part}" for size, part in zip(values.shape, extent, strict=True) if size % part]
    if odd:
        raise ValueError(f"grain {grain} does not divide a weight of shape {tuple(values.shape)}: {', '.join(odd)}")
    tiles = values.reshape([n for size, part in zip(values.shape, extent, strict=True) for n in (size // part, part)])
    return tiles.sum(dim=list(range(1, tiles.ndim, 2)))


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
        # comparing pairs is faster than sorting groups of four, and distillation does it every step
        later = (member[j] > member[i]).view(torch.uint8)
        rank[i], rank[j] = rank[i] + later, rank[j] + (1 - later)
    return torch.stack([r < n for r in rank], 1).view(magnitude.shape).movedim(-1, 1).contiguous()


def stored_bits(mask: Tensor, grain: str, weight_bits: int) -> int:
    """Bits of one masked weight with its index, as Mao et al. count them: the values that are kept, and

    of GRAINS: 4 bits a kept grain, how many grains went since the last one kept, in the order of memory. Where that is more
    than 15, a grain of zeros is stored at the sixteenth place and counting begins anew (relative index, EIE 1602.01528).
    N:M: the place inside the group, log2(M) bits rounded up, a kept weight. unit: no index, the layer is smaller.
    """
    if ":" in grain:
        index = (parse_pattern(grain)[1] - 1).bit_length()
        return int(mask.sum()) * (weight_bits + index)
    if grain == "unit":
        return int(mask.sum()) * weight_bits
    places = grain_sums(mask.to(torch.int64), grain).flatten().nonzero().flatten()
    gone = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    entries = len(places) + int((gone // 2**INDEX_BITS).sum())
    return entries * (prod(grain_shape(mask.shape, grain)) * weight_bits + INDEX_BITS)


def layer_density(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Layer path -> kept share of its weight, for the masked Linear and Conv2d layers."""
    return {name.removesuffix(".weight"): mask.float().mean().item() for name, mask in masks.items()
            if name.endswith(".weight") and mask.ndim > 1}


def mask_density(masks: Mapping[str, Tensor]) -> float:
    """Kept share of all masked weights together."""
    return sum(mask.sum().item() for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def kept_shares(dense: nn.Module, grain: str | None, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of each pruned layer's weights that is stored and computed, by layer path: a recipe's `density`.

    For whole units it is a ratio of shapes: a unit that goes takes the columns of the layer that reads it along, and a head
    its share of the attention products.
    """
    if grain != "unit":
        return layer_density(masks)
    small = copy.deepcopy(dense)
    shrink_units(small, masks)
    return shape_shares(dense, small)


def shape_shares(dense: nn.Module, small: nn.Module) -> dict[str, float]:
    """Share of its weights that each smaller layer of `small` kept, by layer path, and of the heads, by attention product."""
    after = dict(small.named_parameters())
    shares = {name.removesuffix(".weight"): after[name].numel() / p.numel() for name, p in dense.named_parameters()
              if name.endswith(".weight")}
    for before, left in zip(hidden_units(dense), hidden_units(small), strict=True):
        shares |= dict.fromkeys(before.products, left.count / before.count)
    return {name: share for name, share in shares.items() if share < 1}
