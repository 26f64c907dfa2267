"""A plain evaluation, without a supernet: a fresh model for every candidate, weights quantised on the fly, no shared steps.

It computes what the search's own evaluation computes, the same integers in exact sums, and holds them in fp32, where sums of
whole numbers are exact below 2^24.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tasks.core.quality import features
from tasks.core.recipe import Recipe
from tasks.core.sampler import sample_in_chunks
from tasks.evolve.fitness import Protocol, live, open_weights
from tasks.evolve.weights import Weights
from tasks.runtime.integer import IntegerLinear, available, integers
from tasks.runtime.precision import Affine, Kinds, QuantConv2d, QuantLinear, Ranges, quantize_weight


@functools.cache
def scales_first() -> bool:
    """Whether this machine's integer kernels multiply the scales of input and weight by each other before they multiply the
    sums: those for AMX do, those for VNNI do not. The last bit of a product decides to which side the next layer rounds it."""
    if not available():
        return False
    generator, affine = torch.Generator().manual_seed(0), (0.0123, 31)
    weight, x = (torch.randn(64, 128, generator=generator) for _ in range(2))
    weight_int, scale = quantize_weight(weight, 6)
    layer = IntegerLinear(nn.Linear(128, 64, bias=False), weight_int, scale, IntegerLinear.prepared(weight_int, scale),
                          ((0, affine),), (6, 6))
    sums = (integers(x, affine, 6).float() - affine[1]) @ weight_int.float().T
    return torch.equal(layer(x), sums * (scale * affine[0]))


class OnTheFly:
    """Rounds its weights at every call, on the scale that was found when the model was made, and keeps none."""

    def __init__(self, base: nn.Module, *args):
        super().__init__(base, *args)
        self.whole = [base.weight]  # in a list: no parameter of this module

    @staticmethod
    def prepared(weight_int: Tensor, weight_scale: Tensor) -> Tensor:
        return torch.empty(0)

    def weight(self, span: slice | None) -> Tensor:
        """Whole numbers in fp32."""
        weight, top = self.whole[0], 2 ** (self.weight_bits - 1) - 1
        rounded = (weight / self.weight_scale.view(-1, *[1] * (weight.dim() - 1))).round_().clamp_(-top, top)
        return rounded if span is None else rounded[:, span]

    def rounded(self, x: Tensor, affine: Affine) -> Tensor:
        """q - zero, whole numbers in fp32."""
        scale, zero = affine
        inverse = (1 / torch.tensor(scale)).item()  # in fp32, as the kernels have it
        whole = torch.add(torch.tensor(float(zero)), x, alpha=inverse).round_()
        return whole.clamp_(0, 2**self.input_bits - 1).sub_(zero)

    def forward(self, x: Tensor) -> Tensor:
        products = []
        for i, (span, affine) in enumerate(self.spans):
            whole = self.product(self.rounded((x if span is None else x[:, span]).float(), affine), self.weight(span), None)
            products.append(self.scaled(whole, affine[0], None if i else self.bias))
        return sum(products[1:], products[0]).to(x.dtype)

    def scaled(self, whole: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        shape = [-1, *[1] * (self.weight_int.dim() - 2)]  # channels are the last axis of a Linear, the second of a Conv2d
        weight_scale = self.weight_scale.view(shape)
        product = whole * (weight_scale * scale) if scales_first() else (whole * scale).mul_(weight_scale)
        return product if bias is None else product + bias.view(shape)


class OnTheFlyLinear(OnTheFly, QuantLinear):
    pass


class OnTheFlyConv2d(OnTheFly, QuantConv2d):
    pass


ON_THE_FLY: Kinds = (OnTheFlyLinear, OnTheFlyConv2d)


def plain_evaluator(teacher: Path, distill: Path, weights: Mapping[str, Weights], ranges: Mapping[str, Ranges], net: nn.Module,
                    protocol: Protocol) -> Callable[[tuple[str, Recipe]], np.ndarray]:
    """(weights, recipe) -> features. teacher: its diffusers folder; distill: holds the files of `weights`. Activation ranges
    and net are given: to measure the ranges anew for each candidate would only make this slower."""

    def evaluate(item: tuple[str, Recipe]) -> np.ndarray:
        name, recipe = item
        denoiser = open_weights(teacher, distill, {name: weights[name]})[name]
        with live(denoiser, recipe, ranges[name], ON_THE_FLY) as predict:
            chunks = sample_in_chunks(predict, denoiser.schedule, recipe, denoiser.sample_shape, protocol.images, protocol.seed,
                                      denoiser.num_classes, protocol.chunk)
            return np.concatenate([features(net, images) for images in chunks])

    return evaluate
