"""Integer kernels against whole numbers in fp64, where all sums are exact, and in a live model."""

import copy

import pytest
import torch
from torch import nn

from tasks.runtime.integer import INTEGER, available, integers
from tasks.runtime.precision import apply_precision, calibrate_ranges, input_affine, quantize_weight, remove_precision

pytestmark = pytest.mark.skipif(not available(), reason="a CPU without VNNI computes these layers in fp32")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [3, 8])
def test_integers_are_torchs_fake_quantisation(bits):
    x = 2 * randn(1000)
    scale, zero = affine = input_affine((-1.5, 3.0), bits)
    q = integers(x, affine, bits)
    assert q.dtype == torch.uint8 and q.max() == 2**bits - 1 and q.min() == 0
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 2**bits - 1)
    assert torch.equal((q.float() - zero) * scale, expected)


def exact(layer, x, affine, weight_bits, input_bits):
    """The product of whole numbers in fp64, then its scale."""
    weight, scale = quantize_weight(layer.weight, weight_bits)
    whole = integers(x, affine, input_bits).double() - affine[1]
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(whole, weight.double()) * scale.double() * affine[0] + layer.bias.double()
    product = nn.functional.conv2d(whole, weight.double(), None, layer.stride, layer.padding)
    return product * (scale.double() * affine[0]).view(-1, 1, 1) + layer.bias.double().view(-1, 1, 1)


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(512, 96), (3, 49, 512)), (nn.Linear(7, 5), (4, 7)),
    (nn.Conv2d(24, 16, 3, padding=1), (2, 24, 9, 9)), (nn.Conv2d(1, 8, 4, stride=4), (2, 1, 28, 28))])
@pytest.mark.parametrize("token, bits", [("w8a8", (8, 8)), ("w3a5", (3, 5))])
def test_layers_are_exact_products(layer, shape, token, bits):
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(layer)).requires_grad_(False)
    x, ranges = randn(*shape), {"0": (-2.0, 3.0)}
    expected = exact(model[0], x, input_affine(ranges["0"], bits[1]), *bits)
    apply_precision(model, {"0": token}, ranges, INTEGER)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_sums_do_not_saturate():
    """255 x 127 twice is more than 16 bits hold."""
    model = nn.Sequential(nn.Linear(64, 2, bias=False)).requires_grad_(False)
    model[0].weight.fill_(1.27)
    apply_precision(model, {"0": "w8a8"}, {"0": (0.0, 2.55)}, INTEGER)
    torch.testing.assert_close(model(torch.full((1, 64), 2.55)), torch.full((1, 2), 64 * 1.27 * 2.55))


def test_parts_of_an_input_have_scales_of_their_own():
    model = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1)).requires_grad_(False)
    x = torch.cat([randn(2, 2, 5, 5), 100 * randn(2, 4, 5, 5, seed=1)], 1)
    wide, narrow = (-300.0, 300.0), (-3.0, 3.0)
    ranges = {"0": {"channels": [2, 4], "parts": [narrow, wide]}}
    reference = copy.deepcopy(model)
    apply_precision(model, {"0": "w8a8"}, ranges)
    simulated = model(x)
    apply_precision(model, {"0": "w8a8"}, ranges, INTEGER)
    torch.testing.assert_close(model(x), simulated, rtol=1e-5, atol=1e-4)
    only_narrow = torch.cat([x[:, :2], torch.zeros(2, 4, 5, 5)], 1)
    split = (model(only_narrow) - reference(only_narrow)).norm()
    apply_precision(model, {"0": "w8a8"}, {"0": wide}, INTEGER)
    assert split < 0.1 * (model(only_narrow) - reference(only_narrow)).norm()


def test_a_live_model_is_near_its_simulation(tiny_denoiser, tiny_states):
    inputs = tiny_states(tiny_denoiser, 4, 0)
    ranges = calibrate_ranges(tiny_denoiser.model, [tiny_states(tiny_denoiser, 32, 1)], tiny_denoiser.joins())
    plan, whole = dict.fromkeys(ranges, "w8a8"), tiny_denoiser(*inputs)
    apply_precision(tiny_denoiser.model, plan, ranges)
    simulated = tiny_denoiser(*inputs)
    apply_precision(tiny_denoiser.model, plan, ranges, INTEGER)
    found = tiny_denoiser(*inputs)
    remove_precision(tiny_denoiser.model)
    assert (found - simulated).norm() < 0.2 * (simulated - whole).norm()
