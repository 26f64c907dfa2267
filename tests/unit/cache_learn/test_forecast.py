"""Weights of a learned forecast: least squares by hand, a model on which they are exact, the gradient, what training keeps."""

from dataclasses import replace

import pytest
import torch

from tasks.cache_learn.forecast import Reference, backward, cut_to, fit, least_squares, padded, run_plan, train
from tasks.core.checkpoint import Checkpoint
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import initial_noise
from tests.unit.cache_learn.toy import Scale, names, toy

RECIPE = Recipe(timesteps=(999, 799, 599, 399, 199), solver="dpm2m")
COMPUTE = ((True, True), (False, True), (True, False), (True, True), (False, False))


def plan_of(denoiser) -> CachePlan:
    return CachePlan(sublayers=tuple(names(denoiser)), compute=COMPUTE)


def reference_of(denoiser, images=6) -> Reference:
    noise = initial_noise(denoiser.sample_shape, range(images), 0) * 0.1  # small: x0 is not clipped, all stays linear
    return Reference.of(denoiser, RECIPE, names(denoiser), noise, None)


def test_least_squares_by_hand():
    rng = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(4, 5, generator=rng) for _ in range(3))
    assert least_squares([a, b, c], 2 * a - 0.5 * b + 0.25 * c) == pytest.approx((2, -0.5, 0.25), abs=1e-4)
    assert least_squares([a], 3 * a) == pytest.approx((3,), abs=1e-4)


def test_outputs_that_agree_are_reused():
    """Any weights of sum 1 are as good: the last output alone is taken."""
    y = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    weights = least_squares([y, y, y], y)
    assert weights == pytest.approx((1, 0, 0), abs=1e-3)
    assert least_squares([torch.zeros(3)], torch.zeros(3)) == (1.0,)


def test_where_outputs_only_change_in_size_the_fit_is_exact():
    """A linear model without clipping: states and outputs are multiples of the noise, so a weight makes up for any gap."""
    denoiser = toy(Scale(0.3), Scale(-0.6))
    reference = reference_of(denoiser)
    fitted, images = fit(plan_of(denoiser), reference)
    scale = reference.images.abs().max()
    assert (images - reference.images).abs().max() < 1e-4 * scale
    assert torch.allclose(run_plan(fitted, reference), images, atol=1e-5), "the weights are what the fit ran with"
    assert (run_plan(plan_of(denoiser), reference) - reference.images).abs().max() > 0.05 * scale, "reuse alone is far off"
    assert fitted.forecast == "learned" and [len(w) for w in (fitted.weights[1][0], fitted.weights[4][0])] == [1, 3]


def test_the_model_is_left_as_it_was_and_the_twin_shares_its_weights():
    denoiser = toy(Scale(0.3), Scale(-0.6))
    reference = reference_of(denoiser)
    attributes = {name: set(vars(m)) for name, m in denoiser.model.named_modules()}
    run_plan(fit(plan_of(denoiser), reference)[0], reference)
    assert {name: set(vars(m)) for name, m in denoiser.model.named_modules()} == attributes
    ours, other = denoiser.model.parts[0], reference.uncached.model.parts[0]
    assert ours is not other and ours.factor is other.factor


def test_beyond_what_is_kept_a_step_is_computed_once_while_it_is_asked_for(monkeypatch):
    denoiser = toy(Scale(0.3), Scale(-0.6))
    kept, anew = reference_of(denoiser), reference_of(denoiser)
    whole = fit(plan_of(denoiser), kept)
    monkeypatch.setattr("tasks.cache_learn.forecast.KEEP", 0)
    anew.uncached.seen = []
    assert fit(plan_of(denoiser), anew)[0] == whole[0]
    assert len(anew.uncached.seen) == 3, "steps 1, 2 and 4 skip something, the last one twice"
    assert list(kept.kept) == [1, 2, 4] and list(anew.kept) == [4]


@pytest.mark.parametrize("window", [5, 2])
def test_the_gradient_is_that_of_finite_differences(window):
    """Of what a window sees: the last loss alone depends on weights of the last window."""
    denoiser = toy(Scale(0.3), Scale(-0.6))
    reference = reference_of(denoiser)
    plan = replace(plan_of(denoiser), forecast="learned", weights=cut_to(plan_of(denoiser), torch.full((5, 2, 3), 0.4)))
    weights, everyone = torch.nn.Parameter(padded(plan)), torch.arange(6)
    backward(plan, reference, weights, everyone, window)
    assert weights.grad[0].abs().sum() == 0, "nothing is skipped there"
    for place in ((4, 0, 0), (4, 1, 2), *([(1, 0, 0)] if window == 5 else [])):
        losses = []
        for change in (1e-2, -1e-2):
            moved = weights.detach().clone()
            moved[place] += change
            losses.append(backward(plan, reference, moved, everyone, 5))
        assert weights.grad[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2)


def test_training_comes_nearer_and_keeps_what_was_better(tmp_path):
    denoiser = toy(Scale(0.3), Scale(-0.6))
    reference = reference_of(denoiser)
    start = replace(plan_of(denoiser), forecast="learned", weights=cut_to(plan_of(denoiser), torch.full((5, 2, 3), 0.4)))
    before = reference.distance(run_plan(start, reference))
    found, curve = train(start, reference, steps=60, batch=4, lr=0.05, window=5, checkpoint=Checkpoint(tmp_path, "a" * 16))
    assert reference.distance(run_plan(found, reference)) < 0.5 * before and curve[-1][0] == 60
    exact = fit(plan_of(denoiser), reference)[0]
    thrown, _ = train(exact, reference, steps=1, batch=4, lr=5.0, window=5, checkpoint=Checkpoint(tmp_path, "b" * 16))
    assert thrown == exact
