"""Learned rounding on layers whose best rounding is known, and on live models."""

import itertools

import pytest
import torch
from torch import nn

from tasks.runtime.precision import apply_precision, calibrate_ranges, dequantize, quantize_weight, remove_precision
from tasks.runtime.rounding import (
    Rounding,
    columns,
    grams,
    inverse_sigmoid,
    layers_in_order,
    learn_rounding,
    rectified_sigmoid,
    round_layer,
)

HOW = Rounding(steps=300)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(layer, bits, x, how=HOW):
    return round_layer(layer, bits, *grams(layer, [(x, x)]), how)


def test_gram_matrices_hold_the_output_error():
    layer, x, other = nn.Conv2d(3, 4, 3, padding=1, stride=2), randn(2, 3, 7, 7), randn(2, 3, 7, 7, seed=1)
    found, cross, whole = grams(layer, [(x, other)])
    w, v = layer.weight.detach().flatten(1), randn(4, 27, seed=2)
    expected = (nn.functional.conv2d(other, layer.weight, None, 2, 1)
                - nn.functional.conv2d(x, v.view(4, 3, 3, 3), None, 2, 1)).square().sum()
    error = ((v @ found) * v).sum() - 2 * ((v @ cross) * w).sum() + ((w @ whole) * w).sum()
    torch.testing.assert_close(error, expected, rtol=1e-4, atol=1e-4)
    assert columns(nn.Linear(3, 2), randn(2, 5, 3)).shape == (3, 10)


def test_the_best_of_all_roundings_is_found():
    """Correlated inputs: what one weight is rounded up by, others make good. 2^6 roundings of a row of six can all be tried."""
    layer = nn.Linear(6, 1, bias=False)
    layer.weight.data = torch.tensor([[0.45, 0.45, 0.45, 0.45, -0.45, 7.0]])  # the last one makes the scale 1
    x = randn(200, 1) + 0.1 * randn(200, 6, seed=1)
    integers, scale = rounded(layer, 4, x)
    nearest, _ = quantize_weight(layer.weight, 4)

    def error(w):
        return (x @ (w * scale - layer.weight.detach()[0])).square().sum()

    floor = (layer.weight.detach()[0] / scale).floor()
    best = min(error((floor + torch.tensor(up)).clamp(-7, 7)) for up in itertools.product((0.0, 1.0), repeat=6))
    assert error(integers[0].float()) <= 1.01 * best < 0.5 * error(nearest[0].float())


@pytest.mark.parametrize("bits", [3, 6, 8])
def test_zeros_stay_zero_and_weights_on_their_grid(bits):
    layer = nn.Linear(32, 16)
    layer.weight.data[:, ::2] = 0
    layer.weight.data[3] = 0
    integers, scale = rounded(layer, bits, randn(100, 32) + randn(100, 1, seed=1))
    nearest, same = quantize_weight(layer.weight, bits)
    assert torch.equal(scale, same) and integers.dtype == torch.int8
    assert (integers[layer.weight == 0] == 0).all() and integers.abs().max() <= 2 ** (bits - 1) - 1
    assert (integers.int() - nearest.int()).abs().max() == 1, "each is the floor or the one above"


def test_no_steps_is_the_nearest():
    layer = nn.Linear(8, 8)
    assert torch.equal(rounded(layer, 4, randn(50, 8), Rounding(steps=0))[0], quantize_weight(layer.weight, 4)[0])


def test_the_soft_variable_and_its_exponent():
    h = torch.tensor([0.0, 0.3, 1.0])
    torch.testing.assert_close(rectified_sigmoid(inverse_sigmoid(h)), h)
    how = Rounding(steps=100, warmup=0.2)
    assert how.beta(19) is None and how.beta(20) == pytest.approx(20) and how.beta(60) == pytest.approx(11)
    with pytest.raises(ValueError, match="rounding.steps: -1 is not between 0 and 100000"):
        Rounding(steps=-1)


def test_a_live_model_comes_nearer(tiny_denoiser, tiny_states):
    batches = [tiny_states(tiny_denoiser, 32, seed) for seed in (1, 2)]
    model, ranges = tiny_denoiser.model, calibrate_ranges(tiny_denoiser.model, batches)
    weights = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    learned = learn_rounding(model, 3, batches, Rounding(steps=100))
    assert list(learned) == layers_in_order(model, batches[0])
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.state_dict().items())
    inputs, errors = tiny_states(tiny_denoiser, 32, 3), {}
    reference = tiny_denoiser(*inputs)
    for name, integers in {"nearest": {}, "learned": {(layer, 3): q for layer, q in learned.items()}}.items():
        apply_precision(model, dict.fromkeys(ranges, "w3a8"), ranges, integers=integers)
        errors[name] = (tiny_denoiser(*inputs) - reference).norm()
        live = model.get_submodule(list(learned)[-1])
        assert torch.equal(live.table, dequantize(live.weight_int, live.weight_scale))
        remove_precision(model)
    assert errors["learned"] < 0.9 * errors["nearest"]
