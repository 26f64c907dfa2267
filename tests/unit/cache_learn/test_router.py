"""The Learning-to-Cache router: its loss by hand, what it learns on a toy, resume."""

import pytest
import torch

from tasks.cache_learn.plan import plan_from_costs
from tasks.cache_learn.router import (
    distance,
    interpolated,
    pair_distance,
    pair_of_round,
    router_costs,
    router_loss,
    step_pairs,
    threshold_plan,
    train_router,
)
from tasks.core.checkpoint import Checkpoint
from tasks.runtime.solver import solver_steps
from tests.unit.cache_learn.toy import CONFIG, Constant, Scale, ToyDenoiser, names, toy

TIMESTEPS = (999, 799, 599, 399, 199)
HOW = {"steps": 80, "batch": 8, "lr": 0.3, "lam": 1e-3, "reduction": "mean", "label_dropout": 0.5, "seed": 0}


def images(n=32):
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1


class Dying(ToyDenoiser):
    """Dies in its 42nd training step, of three calls each."""

    calls = 0

    def __call__(self, x, t, labels=None):
        self.calls += 1
        if self.calls > 3 * 41:
            raise InterruptedError
        return super().__call__(x, t, labels)


def trained(denoiser, folder, labels=None, key="k" * 16, every_s=1e9, **changed):
    return train_router(denoiser, names(denoiser), images(), labels, TIMESTEPS, **{**HOW, **changed},
                        checkpoint=Checkpoint(folder, key, every_s))


def test_a_sublayer_that_is_constant_in_time_is_cached(tmp_path):
    denoiser = toy(Constant(), Scale(-0.6))
    beta, curve = trained(denoiser, tmp_path)
    assert beta.shape == (2, 2)
    assert (beta[:, 0] < 0.1).all(), "constant: reused"
    assert (beta[:, 1] > 0.5).all(), "follows its input: computed"
    plan = threshold_plan(beta, 0.1, len(TIMESTEPS), names(denoiser))
    assert plan.compute == ((True, True), (False, True)) * 2 + ((True, True),)
    assert curve[-1][0] == HOW["steps"]


def test_the_loss_by_hand():
    """One Scale(w): teacher x_m + w x_m, student x_m + beta w x_m + (1 - beta) w x_s."""
    denoiser, x_s = toy(Scale(0.5)), torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    step = solver_steps(CONFIG, (500, 300), "ddim")[0]
    x_m = step.a * x_s + step.b[0] * (step.p * x_s + step.q * 1.5 * x_s)
    beta = torch.sigmoid(torch.tensor(0.7))
    by_hand = ((1 - beta) * 0.5 * (x_m - x_s)).square().mean() + 0.01 * beta
    loss = router_loss(denoiser, names(denoiser), torch.tensor([0.7]), step, 300, x_s, None, 0.01, "mean")
    torch.testing.assert_close(loss, by_hand)
    summed = router_loss(denoiser, names(denoiser), torch.tensor([0.7]), step, 300, x_s, None, 0.0, "sum")
    torch.testing.assert_close(summed, (by_hand - 0.01 * beta) * 16)


def test_beta_one_is_the_uncached_network_and_beta_zero_is_reuse():
    denoiser, x, kept = toy(Scale(1.0), Scale(2.0)), torch.ones(1), [torch.tensor([5.0]), torch.tensor([7.0])]
    with interpolated(denoiser.model, names(denoiser), torch.ones(2), kept):
        assert denoiser(x, None).item() == 6
    with interpolated(denoiser.model, names(denoiser), torch.zeros(2), kept):
        assert denoiser(x, None).item() == 13
    with interpolated(denoiser.model, names(denoiser), torch.tensor([0.5, 1.0]), kept):
        assert denoiser(x, None).item() == 12  # 1 + (1 + 5) / 2 = 4, 4 + 8 = 12


def test_reductions():
    a, b = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 2.0)
    assert (distance(a, b, "mean").item(), distance(a, b, "sum").item()) == (4.0, 16.0)


def test_all_three_forwards_see_the_same_dropped_labels(tmp_path):
    denoiser = toy(Scale(0.5), num_classes=3)
    denoiser.seen = []
    trained(denoiser, tmp_path, labels=torch.arange(32) % 3, steps=4)
    rounds = [denoiser.seen[i: i + 3] for i in range(0, 12, 3)]
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in rounds)
    drawn = torch.cat([a for a, _, _ in rounds])
    assert (drawn == denoiser.null_label).any() and (drawn < 3).any()


def test_a_resumed_training_ends_as_an_undisturbed_one(tmp_path):
    denoiser = toy(Constant(), Scale(-0.6))
    whole, curve = trained(denoiser, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        trained(Dying(denoiser.model, denoiser.schedule), tmp_path / "cut", every_s=0)
    resumed, again = trained(denoiser, tmp_path / "cut", every_s=0)
    assert torch.equal(resumed, whole) and again == curve


def test_logits_stay_within_the_clamp(tmp_path):
    beta, _ = trained(toy(Constant(), Scale(0.5)), tmp_path, lr=5.0, lam=10.0)
    assert beta.min() >= torch.sigmoid(torch.tensor(-5.0)) and beta.max() <= torch.sigmoid(torch.tensor(5.0))


def test_pairs():
    assert step_pairs(6) == [(0, 1), (2, 3), (4, 5)]
    assert step_pairs(5) == [(0, 1), (2, 3)], "the last of an odd number is computed in full"


def test_every_round_visits_every_pair_once():
    visits = [pair_of_round(i, 5, seed=3) for i in range(50)]
    assert all(sorted(visits[i: i + 5]) == list(range(5)) for i in range(0, 50, 5))
    assert visits[:5] != visits[5:10] or visits[5:10] != visits[10:15]


def test_router_costs_allow_reuse_from_full_to_cache_steps_alone():
    costs = router_costs(torch.tensor([[0.1, 0.9], [0.2, 0.3]]), 4)
    assert costs[0, 0, 1] == pytest.approx(0.1) and costs[1, 2, 3] == pytest.approx(0.3)
    off_diagonal = costs[:, ~torch.eye(4, dtype=torch.bool).numpy()]
    assert (off_diagonal < 1).sum() == 4
    plan = plan_from_costs(costs, ["a", "b"], 3 / 8, 4)
    assert plan.compute == ((True, True), (False, True), (True, True), (False, False))


def test_a_gates_gradient_by_hand():
    """One Scale(w): student x_m + g w x_m + (1 - g) w x_s; at g = 0 the loss (w (x_m - x_s))^2 falls at twice its size."""
    denoiser, x_s = toy(Scale(0.5)), torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    gates = torch.zeros(1, requires_grad=True)
    loss = pair_distance(denoiser, names(denoiser), gates, solver_steps(CONFIG, (500, 300), "ddim")[0], 300, x_s, None, "mean")
    loss.backward()
    assert gates.grad.item() == pytest.approx(-2 * loss.item()) and loss > 0
