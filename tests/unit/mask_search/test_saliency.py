"""Saliencies by hand, and against least squares solved by numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from tasks.core.calibration import noised
from tasks.core.denoiser import build
from tasks.core.sparsity import grain_mask
from tasks.mask_search.grams import input_rows, input_statistics
from tasks.mask_search.saliency import DAMPING, KINDS, Statistics, reconstruct, saliency
from tasks.pretrain_load.architectures import SCHEDULE, dit, unet


def statistics_of(x: torch.Tensor) -> Statistics:
    return Statistics(x.double().T @ x.double(), len(x))


def damped(x: torch.Tensor) -> np.ndarray:
    """X with the rows below it that make X^T X the damped Hessian."""
    level = DAMPING * x.double().square().sum(0).mean()
    return torch.cat([x.double(), level.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)]).numpy()


@pytest.fixture
def problem():
    """Weight (5, 6) and 20 rows of correlated inputs."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(5, 6, generator=rng), torch.randn(20, 6, generator=rng) @ torch.randn(6, 6, generator=rng)


def test_magnitude_and_activation_by_hand():
    weight, x = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    assert saliency(weight, None, "magnitude").tolist() == [[1, 2], [0.5, 0]]
    assert saliency(weight, statistics_of(x), "activation").tolist() == [[5, 2], [2.5, 0]]


def test_second_order_is_the_least_error_without_the_weight(problem):
    weight, x = problem
    rows, found = damped(x), saliency(weight, statistics_of(x), "second_order")
    for i in range(5):
        for j in range(6):
            others = [k for k in range(6) if k != j]
            error = np.linalg.lstsq(rows[:, others], rows @ weight[i].double().numpy(), rcond=None)[1].item()
            assert found[i, j].item() == pytest.approx(error, rel=1e-5)


def test_inputs_that_tell_nothing_apart_leave_the_order_of_magnitudes():
    weight = torch.tensor([[3.0, -1.0, 2.0]])
    for gram in (4 * torch.eye(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)):
        assert saliency(weight, Statistics(gram, 4), "second_order").argsort().tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(("grain", "density"), [("fine", 0.5), ("2:3", None), ("filter", 0.4)])
def test_the_reconstruction_is_the_least_squares_solution(problem, grain, density):
    weight, x = problem
    mask, rows = grain_mask(weight.abs(), grain, density), damped(x)
    found = reconstruct(weight, mask, statistics_of(x))
    expected = torch.zeros(5, 6)
    for i, kept in enumerate(mask):
        if kept.any():
            solved = np.linalg.lstsq(rows[:, kept.numpy()], rows @ weight[i].double().numpy(), rcond=None)[0]
            expected[i, kept] = torch.from_numpy(solved).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[~mask] == 0).all() and found.dtype == weight.dtype
    error = [((x @ (weight - w).T) ** 2).sum() for w in (found, weight * mask)]
    assert error[0] < error[1] or grain == "filter"  # whole rows leave nothing to make up for


def test_nothing_masked_changes_nothing(problem):
    weight, x = problem
    assert torch.equal(reconstruct(weight, torch.ones_like(weight, dtype=torch.bool), statistics_of(x)), weight)


@pytest.mark.parametrize("layer", [
    nn.Linear(4, 3), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, (1, 3), stride=2, padding=(0, 2), dilation=2),
    nn.Conv2d(4, 3, 1)], ids=["linear", "3x3", "odd", "1x1"])
def test_input_rows_are_what_the_weight_multiplies(layer):
    x = torch.randn(2, 5, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 7, 6)
    y = layer(x).detach()
    by_rows = input_rows(layer, x) @ layer.weight.detach().flatten(1).T + layer.bias.detach()
    torch.testing.assert_close(by_rows, (y if y.ndim == 3 else y.permute(0, 2, 3, 1)).flatten(0, -2), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=["dit", "unet"])
def denoiser(request):
    torch.manual_seed(0)
    if request.param == "dit":
        made = build("DiTTransformer2DModel", dit(8, 1, 4, width=16, depth=1, heads=2, patch=4), SCHEDULE)
    else:
        made = build("UNet2DModel", unet(8, 1, width=8), SCHEDULE)
    made.model.eval().requires_grad_(False)
    return made


def calibration_of(denoiser, n=10):
    images = np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(n) % 4 if denoiser.num_classes else None
    return noised(denoiser.schedule, images, labels, n, torch.Generator().manual_seed(0))


def test_statistics_are_of_every_layers_real_inputs(denoiser):
    """Against the inputs themselves, kept whole; any layer, any saliency, any grain is then one call."""
    layers, calibration, seen = denoiser.prunable_layers(), calibration_of(denoiser), {}
    before = denoiser(calibration.x, calibration.t, calibration.labels)
    found = input_statistics(denoiser, calibration, layers)
    hooks = [layer.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append(args[0]))
             for name, layer in layers.items()]
    denoiser(calibration.x, calibration.t, calibration.labels)
    for hook in hooks:
        hook.remove()
    assert list(found) == list(layers)
    for name, layer in layers.items():
        x = torch.cat([input_rows(layer, part) for part in seen[name]]).double()
        torch.testing.assert_close(found[name].gram, x.T @ x, rtol=1e-4, atol=1e-4)
        assert found[name].rows == len(x)
        for kind in KINDS:
            important = saliency(layer.weight, found[name], kind)
            assert important.shape == layer.weight.shape and important.dtype == torch.float32
            assert (important >= 0).all() and important.isfinite().all()
            assert grain_mask(important, "fine", 0.5).shape == layer.weight.shape
    assert torch.equal(denoiser(calibration.x, calibration.t, calibration.labels), before)  # no hook stays


def test_what_cannot_be_is_said_in_one_line(denoiser):
    weight = torch.ones(2, 2)
    with pytest.raises(ValueError, match="saliency 'gradient' is none of magnitude, activation, second_order"):
        saliency(weight, None, "gradient")
    with pytest.raises(ValueError, match="saliency 'activation' needs the statistics"):
        saliency(weight, None, "activation")
    with pytest.raises(ValueError, match="conv_7 is no Linear or Conv2d of the model"):
        input_statistics(denoiser, calibration_of(denoiser), ["conv_7"])
    denoiser.model.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no calibration image reaches spare"):
        input_statistics(denoiser, calibration_of(denoiser, 2), ["spare"])
    denoiser.model.spare = nn.Conv2d(4, 4, 1, groups=2)
    with pytest.raises(ValueError, match="spare is a convolution in 2 groups"):
        input_statistics(denoiser, calibration_of(denoiser, 2), ["spare"])
    del denoiser.model.spare
