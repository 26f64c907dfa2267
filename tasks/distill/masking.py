"""Which weights of a student compute at a step, and what its pruned weights learn: five methods, one argument.

  method       masks                                        gradient of pruned weights
  dense        none: the baseline trained as long           -
  fixed        the given ones from the first step (ASP)     none
  ste          recomputed from the weights at every step    straight through
  sr_ste       the same                                     straight through, and a decay (SR-STE, arXiv 2102.04010, eq. 9)
  progressive  the same, keeping less and less              the same

Weights whose grain is `unit` keep their masks under every method: which units go was chosen block by block.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor, nn

from tasks.core.sparsity import grain_mask, parse_pattern

RECOMPUTES = ("ste", "sr_ste", "progressive")
DECAYS_PRUNED = ("sr_ste", "progressive")


@dataclass(frozen=True)
class Target:
    """What the masks of one parameter keep in the end."""

    grain: str      # N:M, unit, or one of tasks.core.sparsity.GRAINS
    density: float  # kept share in (0, 1]; N:M says it itself


def targets(masks: Mapping[str, Tensor], grain: str | Mapping[str, str]) -> dict[str, Target]:
    """Parameter name -> target. grain: of all parameters, or of each by name; the density is that of the given mask."""
    if not isinstance(grain, str) and (missing := masks.keys() - grain.keys()):
        raise ValueError(f"grain: {', '.join(sorted(missing))} has a mask and no grain")
    return {name: Target(grain if isinstance(grain, str) else grain[name], mask.float().mean().item())
            for name, mask in masks.items()}


def pruned_part(step: int, steps: int, prune_at: Sequence[float]) -> Fraction:
    """Part of the final pruning that is in force at a step: equal parts, the first at once, the next at shares of the steps."""
    return Fraction(1 + sum(step >= share * steps for share in prune_at), 1 + len(prune_at))


def mask_of(weight: Tensor, target: Target, part: Fraction = Fraction(1)) -> Tensor:
    """Bool mask of the largest grains when `part` of the pruning is done: M-1:M .. N:M, or a falling density."""
    saliency = weight.detach().abs()
    if ":" in target.grain:
        n, m = parse_pattern(target.grain)
        return grain_mask(saliency, f"{m - ceil((m - n) * part)}:{m}")
    return grain_mask(saliency, target.grain, 1 - (1 - target.density) * float(part))


def recomputed(model: nn.Module, masks: Mapping[str, Tensor], aims: Mapping[str, Target],
               part: Fraction = Fraction(1)) -> dict[str, Tensor]:
    """The masks of the model's present weights; those of units stay as given."""
    return {name: mask if aims[name].grain == "unit" else mask_of(model.get_parameter(name), aims[name], part)
            for name, mask in masks.items()}


def shared_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy with masked parameters of its own; all others are the model's."""
    return copy.deepcopy(model, {id(parameter): parameter for name, parameter in model.named_parameters() if name not in masks})


@torch.no_grad()
def write_masked(live: nn.Module, dense: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """What the masks leave of the dense weights, into the model that computes."""
    for name, mask in masks.items():
        torch.mul(dense.get_parameter(name), mask, out=live.get_parameter(name))


@torch.no_grad()
def pass_gradients(live: nn.Module, dense: nn.Module, masks: Mapping[str, Tensor], cut: frozenset[str], decay: float) -> None:
    """Move the gradients of the masked weights to the dense ones: dL/dw = dL/d(w m) + decay (1 - m) w (SR-STE, eq. 9).

    cut: names whose pruned weights get none at all.
    """
    for name, mask in masks.items():
        used, weight = live.get_parameter(name), dense.get_parameter(name)
        weight.grad, used.grad = used.grad, None
        if name in cut:
            weight.grad.mul_(mask)
        elif decay:
            weight.grad.add_(weight - used, alpha=decay)  # used is w m, so this is (1 - m) w


@torch.no_grad()
def shrink_pruned(live: nn.Module, dense: nn.Module, names: Sequence[str], decay: float) -> None:
    """w -= decay (1 - m) w: past Adam's normalisation, which makes a decay inside the gradient as large as the gradient is
    small (why SR-STE falls behind with Adam: STEP, arXiv 2302.01172)."""
    for name in names:
        weight = dense.get_parameter(name)
        weight.sub_(weight - live.get_parameter(name), alpha=decay)


def flip_rate(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Share of mask bits that changed (SR-STE's sparse architecture divergence, per bit); 0 without masks."""
    changed = sum((before[name] != mask).sum().item() for name, mask in after.items())
    return changed / max(1, sum(mask.numel() for mask in after.values()))
