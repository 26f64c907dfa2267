"""Which weights stay: N:M masks (SparseDM, arXiv 2404.10445) and masks of whole hidden units (Mao et al., 1705.08922).

Masks are bool tensors of the parameter's shape, True where the weight stays, keyed by parameter name.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from math import lcm

import torch
from torch import Tensor, nn

from tasks.core.sparsity import grain_shape, parse_pattern
from tasks.runtime.masks import HiddenUnits, hidden_units


def covered(layers: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """Layer paths that a pattern covers (shell wildcards, `*` crosses dots). A pattern may be for another architecture."""
    found = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not found:
        raise ValueError(f"mask_search.cover: none of {', '.join(patterns)} matches a layer of the model")
    return found


def misfits(layers: Mapping[str, nn.Module], grain: str) -> dict[str, str]:
    """Layer -> why the grain does not divide its weight, for those where it does not."""
    reasons = {name: misfit(tuple(layer.weight.shape), grain) for name, layer in layers.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def misfit(shape: tuple[int, ...], grain: str) -> str | None:
    if ":" in grain:
        _, m = parse_pattern(grain)
        return f"{shape[1]} inputs are no multiple of {m}" if shape[1] % m else None
    extent = grain_shape(shape, grain)
    fits = all(size % part == 0 for size, part in zip(shape, extent, strict=True))
    return None if fits else f"a weight of {shape} is not divided by grains of {extent}"


def unit_saliency(model: nn.Module, units: HiddenUnits) -> Tensor:
    """(count,) sum of |w| over the rows that make a unit and the columns that read it, of the large matrices alone:
    the L1 norm of the grain (Mao et al., section 3)."""
    consumer = model.get_submodule(units.consumer).weight.detach()
    saliency = consumer.abs().transpose(0, 1).flatten(1).sum(1)
    for path in units.producers:
        weight = model.get_submodule(path).weight.detach()
        if weight.ndim == consumer.ndim:
            saliency = saliency + weight.abs().flatten(1).sum(1).view(-1, units.count).sum(0)
    return saliency


def kept_count(units: HiddenUnits, density: float, multiple: int) -> int:
    """The number of units nearest to the density, in whole granules and in `multiple`s where the width allows it; never 0."""
    together = granule(units, multiple)
    return max(1, round(density * units.count / together)) * together


def granule(units: HiddenUnits, multiple: int) -> int:
    """Units that come and go together: in `multiple`s where the width allows it."""
    together = lcm(units.granule, multiple)
    return units.granule if units.count % together else together


def salient_units(saliency: Tensor, granule: int, count: int) -> Tensor:
    """(units,) bool: the `count` units of the most salient granules; ties go to the earlier."""
    order = saliency.view(-1, granule).sum(1).argsort(descending=True, stable=True)
    keep = torch.zeros(len(order), dtype=torch.bool)
    keep[order[: count // granule]] = True
    return keep.repeat_interleave(granule)


def along(keep: Tensor, parameter: Tensor, dim: int) -> Tensor:
    """The mask of a parameter whose dim `dim` is the units, in one or more copies."""
    shape = [1] * parameter.ndim
    shape[dim] = -1
    return keep.repeat(parameter.shape[dim] // len(keep)).view(shape).expand(parameter.shape).contiguous()


def unit_mask(model: nn.Module, units: HiddenUnits, density: float, multiple: int = 1) -> dict[str, Tensor]:
    """Masks that zero all that makes or reads the least salient units of one block; none if all units stay."""
    count = kept_count(units, density, multiple)
    if count == units.count:
        return {}
    keep = salient_units(unit_saliency(model, units).cpu(), units.granule, count)
    made = {f"{path}.{kind}": parameter for path in units.producers
            for kind, parameter in model.get_submodule(path).named_parameters()}
    consumer = f"{units.consumer}.weight"
    return {name: along(keep, parameter, 0) for name, parameter in made.items()} | {
        consumer: along(keep, model.get_parameter(consumer), 1)}


def unit_masks(model: nn.Module, density: Mapping[str, float], multiple: int = 1) -> dict[str, Tensor]:
    """density: block path (a feed-forward, attention or resnet) -> kept share in (0, 1]; blocks not named stay dense."""
    blocks = {units.block: units for units in hidden_units(model)}
    unknown = density.keys() - blocks.keys()
    if unknown:
        raise ValueError(f"density: {', '.join(sorted(unknown))} is no feed-forward, attention or resnet of the model")
    masks = {}
    for block, share in density.items():
        if not 0 < share <= 1:
            raise ValueError(f"density of {block}: {share} is not in (0, 1]")
        masks |= unit_mask(model, blocks[block], share, multiple)
    return masks
