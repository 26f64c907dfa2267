"""Layers that compute as a package will, rounded weights and inputs, and still learn: gradients pass straight through.

Straight-through estimation (Bengio et al., arXiv 1308.3432; for quantised networks Jacob et al., arXiv 1712.05877). Scales of
inputs are learned, too (LSQ, arXiv 1902.08153, eq. 3); zero points stay. Parameters keep their names, so that a state dict fits
before and after, but for the scales' own, `numbers`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from tasks.core.unroll import NUMBERS
from tasks.runtime.precision import Ranges, input_parts, quantize_weight, widths

PEAK_BITS = 7  # from so many on a scale covers the largest weight; below, it is chosen once, at the start


class RoundedProduct(torch.autograd.Function):
    """A Linear or Conv2d of x on the grid scale * (q - zero), 0 <= q <= top, as fake quantisation has it, with a gradient for
    the scale. For the gradient x is rounded once more: queries, keys and values that read one x keep one tensor and not four.

    geometry: of a convolution, None of a Linear.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, zero: int, top: int,
                geometry: Mapping | None) -> Tensor:
        ctx.save_for_backward(x, scale, weight)
        ctx.zero, ctx.top, ctx.geometry = zero, top, geometry
        return product(torch.fake_quantize_per_tensor_affine(x, scale.item(), zero, 0, top), weight, bias, geometry)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        rounded = torch.fake_quantize_per_tensor_affine(x, scale.item(), ctx.zero, 0, ctx.top)
        of_rounded, of_weight = product_gradients(gradient, rounded, weight, ctx.geometry)
        of_bias = gradient.transpose(1, -1).flatten(0, -2).sum(0) if ctx.geometry else gradient.flatten(0, -2).sum(0)
        place = (x / scale).round_() + ctx.zero
        inside = (place >= 0) & (place <= ctx.top)
        of_scale = (of_rounded * torch.where(inside, rounded - x, rounded)).sum() / scale
        return of_rounded.mul_(inside), of_scale, of_weight, of_bias if ctx.needs_input_grad[3] else None, None, None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Mapping | None) -> Tensor:
    return F.linear(x, weight, bias) if geometry is None else F.conv2d(x, weight, bias, **geometry)


def product_gradients(gradient: Tensor, x: Tensor, weight: Tensor, geometry: Mapping | None) -> tuple[Tensor, Tensor]:
    """-> of x, of weight."""
    if geometry is None:
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2)
    return (conv2d_input(x.shape, weight, gradient, **geometry), conv2d_weight(x, weight.shape, gradient, **geometry))


class Rounded(nn.Module):
    """A Linear or Conv2d at a precision token. ranges: of its input, for integer widths alone.

    numbers: for each part of the input the logarithm of its scale over the one it started with.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, token: str, ranges):
        super().__init__()
        self.weight, self.bias, self.token, self.bits = base.weight, base.bias, token, widths(token)
        self.spans = [(0, None)]
        if self.bits is not None:
            self.spans = list(input_parts(ranges, self.bits[1]))
            self.register_parameter(NUMBERS, nn.Parameter(torch.zeros(len(self.spans), dtype=torch.float64)))
            self.register_buffer("scale", quantize_weight(base.weight, self.bits[0])[1], persistent=False)
        self.geometry = None
        if isinstance(base, nn.Conv2d):
            self.geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation, "groups": base.groups}

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None:
            half = torch.bfloat16
            bias = None if self.bias is None else self.bias.to(half)
            return product(x.to(half), self.weight.to(half), bias, self.geometry).to(x.dtype)
        weight, found, start = self.rounded_weight(), None, 0
        for i, (channels, (scale, zero)) in enumerate(self.spans):
            span = slice(start, start + channels) if channels else slice(None)
            start += channels
            inputs, columns = (x, weight) if not channels else (x[:, span], weight[:, span])
            part = RoundedProduct.apply(inputs.float(), scale * self.numbers[i].exp(), columns, None if i else self.bias, zero,
                                        2 ** self.bits[1] - 1, self.geometry)
            found = part if found is None else found + part
        return found.to(x.dtype)

    def input_ranges(self) -> list | dict:
        """As `calibrate_ranges` gives them, of the scales as they are."""
        top = 2 ** self.bits[1] - 1
        parts = [[-zero * scale * factor, (top - zero) * scale * factor]
                 for (_, (scale, zero)), factor in zip(self.spans, self.numbers.exp().tolist(), strict=True)]
        channels = [n for n, _ in self.spans]
        return {"channels": channels, "parts": parts} if channels[0] else parts[0]

    def rounded_weight(self) -> Tensor:
        top = 2 ** (self.bits[0] - 1) - 1
        scale = self.scale
        if self.bits[0] >= PEAK_BITS:
            peak = self.weight.detach().flatten(1).abs().amax(1)
            scale = torch.where(peak > 0, peak / top, 1.0)
        zeros = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        return torch.fake_quantize_per_channel_affine(self.weight, scale, zeros, 0, -top, top)


def install(model: nn.Module, precision: Mapping[str, str], ranges: Ranges) -> None:
    """Replace the layers of `precision` that are not fp32, in place and for good."""
    for layer, token in precision.items():
        if token != "fp32":
            parent, _, leaf = layer.rpartition(".")
            base = model.get_submodule(layer)
            setattr(model.get_submodule(parent), leaf, Rounded(base, token, ranges.get(layer)))


def learned_ranges(model: nn.Module) -> dict[str, list | dict]:
    """Of all layers that `install` made and that round their inputs."""
    return {name: layer.input_ranges() for name, layer in model.named_modules() if isinstance(layer, Rounded) and layer.bits}
