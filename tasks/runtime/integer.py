"""Quantised layers computed in integers on a CPU with VNNI: oneDNN's u8 x s8 kernels, as torch's own PT2E backend calls them.

The sums of products are exact, so they are the same in any order; what a package's OpenVINO form computes, from the same
integers, is this. Not shipped inside packages.

    apply_precision(model, plan, ranges, INTEGER if available() else SIMULATED)
"""

import functools
import warnings

import torch
from torch import Tensor, nn

from tasks.runtime.precision import Affine, Kinds, QuantConv2d, QuantLinear

PLAIN = (1.0, 0, torch.float32, "none", [], "")  # an fp32 output of scale 1, nothing fused behind


@functools.cache
def available() -> bool:
    """Without VNNI the products of a pair are added in 16 bits, which saturate."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    with warnings.catch_warnings():  # torch says once in each process that its quint8 is to go
        warnings.simplefilter("ignore", UserWarning)
        return integers(torch.ones(1), (0.5, 1), 8).tolist() == [3]


def integers(x: Tensor, affine: Affine, bits: int) -> Tensor:
    """fp32 -> uint8 of the same shape and strides, 0 <= q < 2^bits.

    The bytes of a quint8 tensor are read where they lie: its int_repr() takes eight times as long as the rounding.
    """
    rounded = torch.quantize_per_tensor(x, *affine, torch.quint8)
    q = torch.empty(0, dtype=torch.uint8).set_(rounded.untyped_storage(), 0, rounded.shape, rounded.stride())
    return q.clamp_(max=2**bits - 1) if bits < 8 else q


class IntegerLinear(QuantLinear):
    """x (..., in) -> (..., out)."""

    @staticmethod
    def prepared(weight_int: Tensor, weight_scale: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_prepack(weight_int, None)

    def forward(self, x: Tensor) -> Tensor:
        affine = self.spans[0][1]
        zeros = torch.zeros_like(self.weight_scale, dtype=torch.int64)
        return torch.ops.onednn.qlinear_pointwise(integers(x.float(), affine, self.input_bits), *affine, self.table,
                                                  self.weight_scale, zeros, self.bias, *PLAIN).to(x.dtype)


class IntegerConv2d(QuantConv2d):
    """x (N, in, H, W) -> (N, out, H', W')."""

    def __init__(self, base: nn.Conv2d, *args):
        super().__init__(base, *args)
        where = self.geometry
        self.how = ([*where["stride"]], [*where["padding"]], [*where["dilation"]], where["groups"])
        self.packed: dict[int, Tensor] = {}  # part of the input -> its weights as the kernel wants them

    @staticmethod
    def prepared(weight_int: Tensor, weight_scale: Tensor) -> Tensor:
        return weight_int

    def forward(self, x: Tensor) -> Tensor:
        products = [self.kernel(i, x if span is None else x[:, span], affine) for i, (span, affine) in enumerate(self.spans)]
        return sum(products[1:], products[0]).to(x.dtype)

    def kernel(self, i: int, x: Tensor, affine: Affine) -> Tensor:
        q = integers(x.float(), affine, self.input_bits)
        if i not in self.packed:
            span = self.spans[i][0]
            weight = self.table if span is None else self.table[:, span].contiguous()
            self.packed[i] = torch.ops.onednn.qconv_prepack(weight, self.weight_scale, *affine, *self.how, [*q.shape])
        zeros = torch.zeros_like(self.weight_scale, dtype=torch.int64)
        return torch.ops.onednn.qconv_pointwise(q, *affine, self.packed[i], self.weight_scale, zeros, None if i else self.bias,
                                                *self.how, *PLAIN)


INTEGER: Kinds = (IntegerLinear, IntegerConv2d)
