"""Copies of the teacher as compression would leave them, for timing: quality does not matter, shapes and zeros do."""

import copy

import torch
from torch import Tensor, nn

from tasks.core.sparsity import nm_mask, shape_shares
from tasks.runtime.masks import HiddenUnits, apply_masks, hidden_units, shrink_units


def two_of_four(model: nn.Module) -> tuple[nn.Module, dict[str, float]]:
    """Zeros in the pattern 2:4 wherever it fits; shapes stay. -> a copy, kept share of each layer that lost weights."""
    small = copy.deepcopy(model)
    weights = {name: m.weight for name, m in layers_of(small).items() if m.weight.shape[1] % 4 == 0}
    apply_masks(small, {f"{name}.weight": nm_mask(weight, 2, 4) for name, weight in weights.items()})
    return small, dict.fromkeys(weights, 0.5)


def narrowed(model: nn.Module, kept: float) -> tuple[nn.Module, dict[str, float]]:
    """A share `kept` of the units of every feed-forward, attention and resnet, in whole granules and at least one.

    -> a copy, kept share of each layer that lost weights and of each attention product that lost heads.
    """
    small = copy.deepcopy(model)
    shrink_units(small, {f"{units.consumer}.weight": first_units(small, units, kept) for units in hidden_units(model)})
    return small, shape_shares(model, small)


def first_units(model: nn.Module, units: HiddenUnits, kept: float) -> Tensor:
    """Mask of the consumer's weight that reads only the first units; bool (out, count, ...)."""
    mask = torch.zeros_like(model.get_submodule(units.consumer).weight, dtype=torch.bool)
    mask[:, : max(1, round(units.count * kept / units.granule)) * units.granule] = True
    return mask


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv2d by path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
