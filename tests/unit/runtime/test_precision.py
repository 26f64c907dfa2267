"""Quantisation worked out by hand and against torch's own, the switch of a live model, bit packing."""

import copy
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tasks.runtime.precision import (
    WIDTHS,
    QuantConv2d,
    QuantLinear,
    apply_precision,
    calibrate_ranges,
    dequantize,
    input_affine,
    live_precision,
    pack,
    quantize_weight,
    remove_precision,
    unpack,
    widths,
)


@pytest.fixture
def pair():
    """Linear -> Linear, and ranges of both inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).requires_grad_(False)
    return model, {"0": (-3.0, 3.0), "2": (-0.2, 3.0)}


def test_tokens():
    assert widths("w4a8") == (4, 8) and widths("w3a5") == (3, 5)
    assert widths("fp32") is None and widths("bf16") is None
    for wrong in ("w2a8", "w8a9", "int8", "w8a8 ", "W8A8"):
        with pytest.raises(ValueError, match="is not fp32, bf16 or w<3..8>a<3..8>"):
            widths(wrong)


def test_weights_by_hand():
    """8 bits: the largest of the row becomes 127. The row of zeros keeps scale 1."""
    integers, scale = quantize_weight(torch.tensor([[2.54, -1.27, 0.0, 0.011], [0.0, 0.0, 0.0, 0.0]]), 8)
    assert integers.tolist() == [[127, -64, 0, 1], [0, 0, 0, 0]]  # -1.27 / 0.02 = -63.5, rounded to the even neighbour
    assert scale.tolist() == pytest.approx([0.02, 1.0])


def test_clipping_gives_up_one_outlier_for_the_rest():
    """3 bits, integers -3 .. 3: a scale of 1/3 holds 1.0 but rounds the fifty 0.2 to 1/3; half of it costs less."""
    row = torch.tensor([[1.0] + [0.2] * 50])
    integers, scale = quantize_weight(row, 3)
    assert scale.item() < 1 / 3 and integers[0, 0] == 3
    full = torch.fake_quantize_per_tensor_affine(row, 1 / 3, 0, -3, 3)
    assert (dequantize(integers, scale) - row).square().sum() < (full - row).square().sum() / 2


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_stay_within_their_width_and_zeros_stay_zero(bits):
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(bits))
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    integers, scale = quantize_weight(weight, bits)
    assert integers.dtype == torch.int8 and integers.abs().max() <= 2 ** (bits - 1) - 1
    assert (dequantize(integers, scale)[weight == 0] == 0).all()


def test_input_scale_by_hand():
    assert input_affine((-1.0, 3.0), 3) == (pytest.approx(4 / 7), 2)  # 1 / (4 / 7) = 1.75
    assert input_affine((0.5, 2.55), 8) == (pytest.approx(0.01), 0)  # widened to hold 0
    assert input_affine((-1.0, -0.5), 4) == (pytest.approx(1 / 15), 15)
    assert input_affine((0.0, 0.0), 8) == (1.0, 0)
    by_width = [(-float(bits), 0.0) for bits in WIDTHS]
    assert input_affine(by_width, 5)[0] == pytest.approx(5 / 31)


def test_a_quantised_layer_is_torchs_fake_quantisation(pair):
    model, ranges = pair
    layer, x = copy.deepcopy(model[0]), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    apply_precision(model, {"0": "w8a4"}, ranges)
    scale, zero = input_affine(ranges["0"], 4)
    row_scale = layer.weight.abs().amax(1) / 127
    weight = torch.fake_quantize_per_channel_affine(layer.weight, row_scale, torch.zeros(16).int(), 0, -127, 127)
    expected = nn.functional.linear(torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 15), weight, layer.bias)
    torch.testing.assert_close(model[0](x), expected)


def test_convolution_keeps_its_geometry():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=2)).requires_grad_(False)
    x = torch.randn(2, 4, 9, 9)
    before = model(x)
    apply_precision(model, {"0": "w8a8"}, {"0": (x.min().item(), x.max().item())})
    assert isinstance(model[0], QuantConv2d) and model(x).shape == before.shape
    assert (model(x) - before).norm() / before.norm() < 0.02


def test_removal_is_bit_identical(tiny_denoiser, tiny_states):
    inputs = tiny_states(tiny_denoiser, 3, 0)
    before, weights = tiny_denoiser(*inputs), copy.deepcopy(tiny_denoiser.model.state_dict())
    ranges = calibrate_ranges(tiny_denoiser.model, [tiny_states(tiny_denoiser, 16, 1)])
    for token in ("w8a8", "bf16", "w3a5"):
        apply_precision(tiny_denoiser.model, dict.fromkeys(ranges, token), ranges)
        assert not torch.equal(tiny_denoiser(*inputs), before)
    remove_precision(tiny_denoiser.model)
    remove_precision(tiny_denoiser.model)
    assert torch.equal(tiny_denoiser(*inputs), before)
    assert all(torch.equal(weights[k], v) for k, v in tiny_denoiser.model.state_dict().items())
    assert not live_precision(tiny_denoiser.model)


def test_a_second_plan_replaces_the_first(pair):
    model, ranges = pair
    x = torch.randn(5, 8)
    before = model(x)
    apply_precision(model, {"0": "w4a8", "2": "w8a8"}, ranges)
    once = model(x)
    apply_precision(model, {"0": "w4a8", "2": "w8a8"}, ranges)
    assert torch.equal(model(x), once)
    apply_precision(model, {"2": "bf16"}, ranges)
    assert live_precision(model) == {"0": "fp32", "2": "bf16"}
    apply_precision(model, {"0": "w4a8", "2": "w8a8"}, ranges)
    assert torch.equal(model(x), once)
    apply_precision(model, {}, ranges)
    assert torch.equal(model(x), before)


def test_a_state_dict_brings_its_integers(pair):
    """What a package does: another model's integers are loaded over those made from random weights."""
    model, ranges = pair
    other = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).requires_grad_(False)
    plan, x = {"0": "w4a8", "2": "w8a8"}, torch.randn(5, 8)
    apply_precision(model, plan, ranges)
    apply_precision(other, plan, ranges)
    assert set(model.state_dict()) == {f"{i}.{part}" for i in (0, 2) for part in ("weight_int", "weight_scale", "bias")}
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_bf16_is_torchs_bf16(pair):
    model, _ = pair
    layer, x = copy.deepcopy(model[0]).to(torch.bfloat16), torch.randn(5, 8)
    apply_precision(model, {"0": "bf16"}, {})
    assert torch.equal(model[0](x), layer(x.to(torch.bfloat16)).float())


@pytest.mark.parametrize("which", ["first", "all"])
def test_bf16_layers_do_not_change_the_type_of_the_rest(which, tiny_denoiser, tiny_states):
    """A UNet casts its time embedding to the type of its first parameter, which is that of its first layer."""
    layers = [name for name, m in tiny_denoiser.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    states = tiny_states(tiny_denoiser, 2, 0)
    before = tiny_denoiser(*states)
    apply_precision(tiny_denoiser.model, dict.fromkeys(layers[:1] if which == "first" else layers, "bf16"), {})
    after = tiny_denoiser(*states)
    remove_precision(tiny_denoiser.model)
    assert after.dtype == torch.float32 and 0 < (after - before).abs().max() < 0.1 * before.abs().max()


@pytest.mark.parametrize(("plan", "message"), [
    ({"0": "w8a8", "9": "w8a8"}, "the model has no layer '9'"), ({"1": "w8a8"}, "is a GELU, not a Linear or Conv2d"),
    ({"0": "w8a2"}, "'w8a2' is not"), ({"2": "w8a8"}, "'2' is w8a8 but has no activation range")])
def test_a_refused_plan_changes_nothing(pair, plan, message):
    model, ranges = pair
    x, before = torch.randn(5, 8), copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        apply_precision(model, plan, {"0": ranges["0"]})
    assert torch.equal(model(x), before(x))


def test_switching_a_whole_model_takes_less_than_a_millisecond(tiny_denoiser, tiny_states):
    ranges = calibrate_ranges(tiny_denoiser.model, [tiny_states(tiny_denoiser, 16, 1)])
    plans = [dict.fromkeys(ranges, token) for token in ("w8a8", "w4a8", "bf16", "fp32")]
    elapsed = []
    for plan in plans * 10:
        started = time.thread_time()
        apply_precision(tiny_denoiser.model, plan, ranges)
        elapsed.append(time.thread_time() - started)
    remove_precision(tiny_denoiser.model)
    assert np.median(elapsed[len(plans):]) < 1e-3


def test_ranges_follow_the_width():
    """A normal sample: few bits clip its tails, eight hold nearly all of it (the optimum for 4 bits is near 2.6 sigma)."""
    model = OneLayer()
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ranges = calibrate_ranges(model, [(x[:32], None, None), (x[32:], None, None)])["layer"]
    highs = [hi for _, hi in ranges]
    assert len(ranges) == len(WIDTHS) and highs == sorted(highs)
    assert 1.2 < highs[0] < 2.6 and 2.0 < highs[1] < 3.0 and highs[-1] > 0.8 * x.max()
    assert all(lo == pytest.approx(-hi, rel=0.3) for lo, hi in ranges)


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, timestep, class_labels, return_dict):
        return (self.layer(x),)


def test_eight_bits_are_close_and_fewer_are_worse(tiny_denoiser, tiny_states):
    ranges = calibrate_ranges(tiny_denoiser.model, [tiny_states(tiny_denoiser, 64, 1), tiny_states(tiny_denoiser, 64, 2)])
    inputs = tiny_states(tiny_denoiser, 8, 3)
    reference, errors = tiny_denoiser(*inputs), {}
    for token in ("w8a8", "w6a6", "w4a4"):
        apply_precision(tiny_denoiser.model, dict.fromkeys(ranges, token), ranges)
        errors[token] = ((tiny_denoiser(*inputs) - reference).norm() / reference.norm()).item()
    remove_precision(tiny_denoiser.model)
    assert errors["w8a8"] < 0.05 and errors["w8a8"] < errors["w6a6"] < errors["w4a4"]


def test_kinds_of_layers_in_a_live_model(tiny_denoiser, tiny_states):
    ranges = calibrate_ranges(tiny_denoiser.model, [tiny_states(tiny_denoiser, 16, 1)])
    apply_precision(tiny_denoiser.model, dict.fromkeys(ranges, "w8a8"), ranges)
    left = [m for m in tiny_denoiser.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    made = [m for m in tiny_denoiser.model.modules() if isinstance(m, (QuantLinear, QuantConv2d))]
    remove_precision(tiny_denoiser.model)
    assert not left and len(made) == len(ranges)


def test_packing_by_hand():
    """3 bits, lowest first: 1 = 100, -1 = 111, 3 = 110 in this order: 10011111 0 -> bytes 0b11111001, 0b0."""
    assert pack(torch.tensor([1, -1, 3], dtype=torch.int8), 3).tolist() == [0b11111001, 0b0]
    assert unpack(torch.tensor([0b11111001, 0b0], dtype=torch.uint8), 3, 3).tolist() == [1, -1, 3]


@given(st.sampled_from(WIDTHS).flatmap(lambda bits: st.tuples(
    st.just(bits), st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), max_size=40))))
@settings(max_examples=100, deadline=None)
def test_packing_is_reversible_and_dense(case):
    bits, numbers = case
    values = torch.tensor(numbers, dtype=torch.int8)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(numbers) * bits // 8)
    assert torch.equal(unpack(packed, bits, len(numbers)), values)


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"values from -5 to 1 do not fit 3 bits \(-4..3\)"):
        pack(torch.tensor([1, -5], dtype=torch.int8), 3)
    with pytest.raises(ValueError, match="2 bytes, expected 3 for 5 values of 4 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)


def test_parts_of_a_concatenation_have_ranges_of_their_own(tiny_denoiser, tiny_states):
    joins = tiny_denoiser.joins()
    ranges = calibrate_ranges(tiny_denoiser.model, [tiny_states(tiny_denoiser, 16, 1)], joins)
    for layer, channels in joins.items():
        assert sum(channels) == tiny_denoiser.model.get_submodule(layer).in_channels
        assert ranges[layer]["channels"] == list(channels) and len(ranges[layer]["parts"]) == 2
        assert all(len(part) == len(WIDTHS) for part in ranges[layer]["parts"])
    assert (len(joins) > 0) == (tiny_denoiser.architecture == "unet")
    assert all(isinstance(found, list) for layer, found in ranges.items() if layer not in joins)


def test_a_quiet_part_beside_a_loud_one_keeps_its_values():
    """Of two channels, one a hundred times the other, in 4 bits: one range for both leaves nothing of the small one."""
    model = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False)).requires_grad_(False)
    model[0].weight.fill_(1.0)
    x = torch.tensor([0.7, 0.0]).view(1, 2, 1, 1)
    apply_precision(model, {"0": "w8a4"}, {"0": (-100.0, 100.0)})
    assert model(x).item() == 0
    apply_precision(model, {"0": "w8a4"}, {"0": {"channels": [1, 1], "parts": [(-1.0, 1.0), (-100.0, 100.0)]}})
    assert model(x).item() == pytest.approx(0.7, abs=1 / 15)


def test_given_integers_are_used_as_they_are(pair):
    model, ranges = pair
    weight = model[0].weight.clone()
    nearest, scale = quantize_weight(weight, 4)
    other = (nearest - nearest.sign()).to(torch.int8)
    apply_precision(model, {"0": "w4a8"}, ranges, integers={("0", 4): other})
    assert torch.equal(model[0].weight_int, other) and torch.equal(model[0].table, dequantize(other, scale))
    apply_precision(model, {"0": "w5a8"}, ranges, integers={("0", 4): other})
    assert torch.equal(model[0].weight_int, quantize_weight(weight, 5)[0]), "another width has none"
