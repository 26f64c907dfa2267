"""Learned rounding: which way each weight is rounded so that its layer's output, not the weight, keeps near to what it was.

AdaRound (Nagel et al., arXiv 2004.10568): of every weight over its scale the floor or the integer above it, chosen by a soft
variable h in [0, 1] that a regulariser drives to 0 or 1 (eq. 21 to 25). Layers follow one another in the order of computation:
a layer's inputs come from the layers before it as these were rounded, the outputs to be met from the weights as they were
(asymmetric reconstruction, eq. 25). Activations stay in fp32 meanwhile, since their bits are searched later.

The squared error of a linear map's outputs is a quadratic form of its weights, so two Gram matrices of the calibration inputs
hold all there is to learn from: each step of the optimiser sees all of them. The paper draws minibatches, and looks through the
ReLU behind a layer; these networks have none.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.core.params import check_range
from tasks.runtime.precision import Integers, dequantize, quantize_weight, remove_precision

GAMMA, ZETA = -0.1, 1.1  # how far the sigmoid reaches beyond [0, 1] before it is clipped (eq. 23)
Batch = tuple[Tensor, Tensor, Tensor | None]  # x, t, labels


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How `learn_rounding` learns."""

    steps: int                # of Adam for each layer; 0: all weights go to the nearest integer
    lr: float = 0.02
    regulariser: float = 1.0  # weight of eq. 24, where rounding to nearest has an error of 1 a weight
    warmup: float = 0.2       # share of the steps without it

    def __post_init__(self):
        check_range("rounding.steps", self.steps, 0, 100_000)
        check_range("rounding.lr", self.lr, 1e-6, 10)
        check_range("rounding.regulariser", self.regulariser, 0, 1e6)
        check_range("rounding.warmup", self.warmup, 0, 1)

    def beta(self, step: int) -> float | None:
        """The exponent of eq. 24, from 20 to 2 by a cosine, as in their code; None during the warm-up."""
        start = self.warmup * self.steps
        if step < start:
            return None
        done = (step - start) / max(1.0, self.steps - start)
        return 2 + 9 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())


def learn_rounding(model: nn.Module, bits: int, batches: Sequence[Batch], how: Rounding) -> dict[str, Tensor]:
    """Layer -> int8 weights on the grid of `quantize_weight` at this width, of every Linear and every Conv2d of one group.

    batches: states of trajectories, as for `calibrate_ranges`. A zero stays zero. The model is left without any precision.
    """
    remove_precision(model)
    rounded, learned = copy.deepcopy(model), {}
    for name in layers_in_order(model, batches[0]):
        wanted, layer = model.get_submodule(name), rounded.get_submodule(name)
        inputs = zip(*(recorded_inputs(each, name, batches) for each in (rounded, model)), strict=True)
        learned[name], scale = round_layer(wanted, bits, *grams(wanted, inputs), how)
        layer.weight = nn.Parameter(dequantize(learned[name], scale), requires_grad=False)
    return learned


@torch.no_grad()
def layers_in_order(model: nn.Module, batch: Batch) -> list[str]:
    """Paths of the layers that can be rounded, as they are computed."""
    order: dict[str, None] = {}
    hooks = [m.register_forward_pre_hook(lambda _, args, name=name: order.setdefault(name)) for name, m in model.named_modules()
             if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)]
    run(model, [batch], hooks)
    return list(order)


@torch.no_grad()
def recorded_inputs(model: nn.Module, layer: str, batches: Iterable[Batch]) -> list[Tensor]:
    """Of every call of the layer."""
    found: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: found.append(args[0].detach().float()))
    run(model, batches, [hook])
    return found


def run(model: nn.Module, batches: Iterable[Batch], hooks: Sequence) -> None:
    """All batches, then the hooks are gone."""
    try:
        for x, t, labels in batches:
            model(x, timestep=t, class_labels=labels, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()


def grams(layer: nn.Module, inputs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """inputs: (of the rounded network, of the whole one) -> X~ X~^T, X~ X^T and X X^T, each (in, in) fp32, summed over all."""
    sums = [torch.zeros(()) for _ in range(3)]
    for pair in inputs:
        found, whole = (columns(layer, x) for x in pair)
        products = found @ found.T, found @ whole.T, whole @ whole.T
        sums = [total + product for total, product in zip(sums, products, strict=True)]
    return tuple(sums)


def columns(layer: nn.Module, x: Tensor) -> Tensor:
    """The vectors that the layer's weights, as a matrix, are multiplied with: (in, n)."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2).T
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (N, in, places)
    return patches.transpose(0, 1).flatten(1)


def round_layer(layer: nn.Module, bits: int, found: Tensor, cross: Tensor, whole: Tensor,
                how: Rounding) -> tuple[Tensor, Tensor]:
    """-> int8 of the weight's shape, its scale (out,). found, cross, whole: see `grams`."""
    nearest, scale = quantize_weight(layer.weight, bits)
    weight, top = layer.weight.detach().float().flatten(1), 2 ** (bits - 1) - 1
    steps = (weight / scale[:, None]).clamp(-top, top)
    floor = steps.floor()

    def error(integers: Tensor) -> Tensor:
        """Sum of squares of W X - W~ X~ (eq. 25)."""
        w = integers * scale[:, None]
        return ((w @ found) * w).sum() - 2 * ((w @ cross) * weight).sum() + ((weight @ whole) * weight).sum()

    unit = error(nearest.flatten(1).float()) / steps.numel()
    if how.steps == 0 or unit <= 0:
        return nearest, scale
    free = (steps != floor) & (floor < top)  # whole numbers stay, zeros of a mask among them
    soft = inverse_sigmoid((steps - floor).clamp(1e-4, 1 - 1e-4)).requires_grad_()
    optimiser = torch.optim.Adam([soft], lr=how.lr)
    for step in range(how.steps):
        h = rectified_sigmoid(soft) * free
        beta, loss = how.beta(step), error(floor + h) / unit
        if beta is not None:
            loss = loss + how.regulariser * (1 - (2 * h - 1).abs() ** beta)[free].sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    integers = floor + (rectified_sigmoid(soft.detach()) > 0.5) * free
    better = error(integers) < error(nearest.flatten(1).float())
    return (integers.to(torch.int8).view(nearest.shape) if better else nearest), scale


def write_integers(integers: Integers, path: Path) -> None:
    """A safetensors file of them."""
    save_file({f"{layer} {bits}": q for (layer, bits), q in integers.items()}, path)


def read_integers(path: Path) -> Integers:
    """What `write_integers` wrote; none where there is no file."""
    found = load_file(path) if path.exists() else {}
    return {(key.split()[0], int(key.split()[1])): q for key, q in found.items()}


def rectified_sigmoid(soft: Tensor) -> Tensor:
    """Eq. 23."""
    return (soft.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_sigmoid(h: Tensor) -> Tensor:
    """The soft variable of which `rectified_sigmoid` makes h."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))
