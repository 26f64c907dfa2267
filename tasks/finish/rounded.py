"""Layers that compute as a package will, rounded weights and inputs, and still learn: gradients pass straight through.

Straight-through estimation (Bengio et al., arXiv 1308.3432; for quantised networks Jacob et al., arXiv 1712.05877). Parameters
keep their names, so that a state dict fits before and after.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.runtime.precision import Ranges, input_parts, quantize_weight, widths

PEAK_BITS = 7  # from so many on a scale covers the largest weight; below, it is chosen once, at the start


class Rounded(nn.Module):
    """A Linear or Conv2d at a precision token. ranges: of its input, for integer widths alone."""

    def __init__(self, base: nn.Linear | nn.Conv2d, token: str, ranges):
        super().__init__()
        self.weight, self.bias, self.token, self.bits = base.weight, base.bias, token, widths(token)
        self.spans = [(0, None)]
        if self.bits is not None:
            self.spans = list(input_parts(ranges, self.bits[1]))
            self.register_buffer("scale", quantize_weight(base.weight, self.bits[0])[1], persistent=False)
        self.geometry = None
        if isinstance(base, nn.Conv2d):
            self.geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation, "groups": base.groups}

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None:
            half = torch.bfloat16
            bias = None if self.bias is None else self.bias.to(half)
            return self.product(x.to(half), self.weight.to(half), bias).to(x.dtype)
        weight, found, start = self.rounded_weight(), None, 0
        for i, (channels, (scale, zero)) in enumerate(self.spans):
            part = slice(start, start + channels) if channels else slice(None)
            start += channels
            inputs, columns = (x, weight) if not channels else (x[:, part], weight[:, part])
            inputs = torch.fake_quantize_per_tensor_affine(inputs.float(), scale, zero, 0, 2 ** self.bits[1] - 1)
            product = self.product(inputs, columns, None if i else self.bias)
            found = product if found is None else found + product
        return found.to(x.dtype)

    def rounded_weight(self) -> Tensor:
        top = 2 ** (self.bits[0] - 1) - 1
        scale = self.scale
        if self.bits[0] >= PEAK_BITS:
            peak = self.weight.detach().flatten(1).abs().amax(1)
            scale = torch.where(peak > 0, peak / top, 1.0)
        zeros = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        return torch.fake_quantize_per_channel_affine(self.weight, scale, zeros, 0, -top, top)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias) if self.geometry is None else F.conv2d(x, weight, bias, **self.geometry)


def install(model: nn.Module, precision: Mapping[str, str], ranges: Ranges) -> None:
    """Replace the layers of `precision` that are not fp32, in place and for good."""
    for layer, token in precision.items():
        if token != "fp32":
            parent, _, leaf = layer.rpartition(".")
            base = model.get_submodule(layer)
            setattr(model.get_submodule(parent), leaf, Rounded(base, token, ranges.get(layer)))
