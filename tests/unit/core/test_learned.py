"""Learned solvers: they start as the rows they are given, unrolling equals integrating, and training never makes it worse."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from tasks.core import learned
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser, build
from tasks.core.learned import LearnedSolver, falling, opened, opening_images, timesteps_of
from tasks.core.pairs import Pairs
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, network, sample, spaced_timesteps
from tasks.core.unroll import How, PictureLoss, Training, Weights, moments_apart, predicting, train_along, unroll
from tasks.runtime.solver import Opening, SolverStep, recipe_steps, solver_steps

DIT = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 1, "out_channels": 1, "num_layers": 1,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_type": "ada_norm_zero",
       "norm_elementwise_affine": False}
SCHEDULES = [
    {"num_train_timesteps": 100, "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    {"num_train_timesteps": 50, "prediction_type": "epsilon", "beta_schedule": "linear", "clip_sample": False},
    {"num_train_timesteps": 100, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample_range": 2.0},
    {"num_train_timesteps": 100, "prediction_type": "sample"}]
LOSS = Weights(maps=1.0, pixels=4.0, moments=1.0)
HOW = How(steps=6, batch=4, lr=1e-3, images_lr=1e-3, solver_lr=0.02, warmup=1, ema_decay=0.5, judge_every=2, bf16=False, seed=0,
          loss=LOSS)


class Net(nn.Module):
    """As a feature net of the stage data, in small."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU()), nn.MaxPool2d(2))
        self.embed = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net().requires_grad_(False)


def denoiser(schedule: dict = SCHEDULES[0], **config) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = build("DiTTransformer2DModel", {**DIT, **config}, schedule)
        for parameter in found.model.parameters():  # a fresh DiT predicts next to nothing
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return Denoiser(found.model.eval().requires_grad_(False), found.schedule)


def classical(teacher: Denoiser, nfe: int, opening: bool) -> list[SolverStep]:
    rows = solver_steps(teacher.schedule.config, spaced_timesteps(teacher.schedule, nfe + opening), "dpm2m")
    return opened(teacher.schedule, rows, opening_images(teacher, 4, 1)[0]) if opening else rows


def start(n: int = 4):
    return initial_noise((1, 8, 8), range(n), 3), labels_for(range(n), 3)


def shaken(solver: LearnedSolver) -> LearnedSolver:
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for numbers in solver.numbers():
            numbers.add_(0.02 * torch.randn(numbers.shape, generator=rng, dtype=torch.float64))
    return solver


@pytest.mark.parametrize("opening", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["prediction_type"])
def test_it_starts_as_the_solver_it_is_given_and_unrolls_as_its_rows_integrate(schedule, opening):
    teacher, (noise, labels) = denoiser(schedule), start()
    solver = LearnedSolver(teacher.schedule, classical(teacher, 4, opening))
    clip = schedule.get("clip_sample_range", 1.0) if schedule.get("clip_sample", True) else None
    given = classical(teacher, 4, opening)
    for row, wanted in zip(solver.rows(), given, strict=True):
        assert (row.t, row.p, row.q, row.a) == pytest.approx((wanted.t, wanted.p, wanted.q, wanted.a), abs=1e-9)
        assert row.b[:len(wanted.b)] == pytest.approx(wanted.b, abs=1e-9) and not any(row.b[len(wanted.b):])
    for one in (solver, shaken(solver)):
        rows = one.rows()
        recipe = Recipe(timesteps=timesteps_of(rows), solver="learned", rows=rows)
        with torch.no_grad():
            found = unroll(predicting(teacher, False), one, noise, labels, clip)
        wanted = sample(network(teacher), teacher.schedule, recipe, noise, labels)
        assert torch.allclose(found, wanted, atol=1e-4)
        assert Recipe.from_json(recipe.to_json()) == recipe


def test_learning_goes_on_from_the_rows_that_were_learned():
    teacher, (noise, labels) = denoiser(), start()
    first = shaken(LearnedSolver(teacher.schedule, classical(teacher, 3, True)))
    again = LearnedSolver(teacher.schedule, first.rows())
    with torch.no_grad():
        assert torch.equal(*(unroll(predicting(teacher, False), one, noise, labels, 1.0) for one in (first, again)))


def test_recomputing_changes_no_gradient_and_holds_one_evaluation_at_a_time():
    teacher, (noise, labels) = denoiser(), start()
    solver, weight = shaken(LearnedSolver(teacher.schedule, classical(teacher, 3, True))), next(teacher.model.parameters())
    weight.requires_grad_()
    calls, found = [], []
    plain = predicting(teacher, False)

    def counted(x, t, labels, step):
        calls.append(step)
        return plain(x, t, labels, step)

    for recompute in (False, True):
        image = unroll(counted, solver, noise, labels, 1.0, recompute)
        found.append(torch.autograd.grad(image.square().sum(), [weight, solver.stick, solver.b]))
    assert calls == [0, 1, 2, 0, 1, 2, 1, 0] and all(map(torch.equal, *found))


def test_every_number_that_can_matter_has_a_gradient():
    teacher, (noise, labels) = denoiser(), start()
    solver = shaken(LearnedSolver(teacher.schedule, classical(teacher, 3, True)))
    unroll(predicting(teacher, False), solver, noise, labels, None).square().sum().backward()
    assert solver.stick.grad.ne(0).all() and solver.shift.grad.ne(0).all() and solver.first.grad.ne(0).all()
    assert solver.a.grad.ne(0).all() and solver.images.grad.ne(0).any()
    used = torch.ones(3, 4).tril(1).bool()
    assert solver.b.grad[used].ne(0).all() and solver.b.grad[~used].eq(0).all()


def test_the_times_move_the_coefficients_as_the_theory_says():
    """Moved times and no correction: the rows of DPM-Solver++(2M) at these times, as `solver_steps` has them."""
    teacher = denoiser()
    solver = LearnedSolver(teacher.schedule, solver_steps(teacher.schedule.config, (99, 66, 33), "dpm2m"))
    with torch.no_grad():
        solver.stick.copy_((torch.tensor([39.0, 40.0, 20.0]).double() / 99).log() - solver.gaps)
    for row, wanted in zip(solver.rows(), solver_steps(teacher.schedule.config, (99, 60, 20), "dpm2m"), strict=True):
        assert (row.t, row.p, row.q, row.a) == pytest.approx((wanted.t, wanted.p, wanted.q, wanted.a), abs=1e-9)
        assert row.b[:len(wanted.b)] == pytest.approx(wanted.b, abs=1e-9)


def test_an_opening_is_the_first_ddim_step_of_a_network_that_knows_the_mean_alone():
    images = torch.rand(3, 1, 2, 2).half().float()
    opening, (noise, labels) = Opening.of(0.6, 0.8, images), (torch.randn(4, 1, 2, 2), torch.tensor([2, 0, 1, 2]))
    assert torch.equal(opening.known(noise, labels), images[labels])
    assert torch.allclose(opening(noise, labels), 0.6 * noise + 0.8 * images[labels])
    unlabelled = Opening.of(0.6, 0.8, images[:1])
    assert torch.equal(unlabelled.known(noise, None), images[:1].expand(4, -1, -1, -1))


def test_an_opening_knows_no_label_and_is_guided_as_predictions_are():
    images = torch.rand(3, 1, 2, 2).half().float()
    opening, labels = Opening.of(0.6, 0.8, images), torch.tensor([3, 1])
    found = opening.known(torch.zeros(2, 1, 2, 2), labels)
    assert torch.allclose(found[0], images.mean(0)) and torch.equal(found[1], images[1])
    guided = opening.guided(2.0, 1.0).known(torch.zeros(2, 1, 2, 2), labels)
    assert torch.allclose(guided[1], (2 * images[1] - images.mean(0)).clamp(-1, 1), atol=1e-3)
    assert torch.allclose(guided[0], guided_mean(images, 2.0), atol=1e-3)


def guided_mean(images, scale):
    return (images.mean(0) + scale * (images - images.mean(0))).clamp(-1, 1).mean(0)


def test_guided_sampling_begins_with_a_guided_opening():
    teacher, (noise, labels) = denoiser(), start()
    rows = tuple(classical(teacher, 2, True))
    recipe = Recipe(timesteps=timesteps_of(rows), solver="learned", rows=rows)
    first = dataclasses.replace(rows[0], opening=rows[0].opening.guided(3.0, 1.0))
    by_hand = Recipe(timesteps=recipe.timesteps, solver="learned", rows=(first, rows[1]))

    def predict(x, t, labels, step):
        null = torch.full_like(labels, 3)
        return teacher(x, t, null) + 3.0 * (teacher(x, t, labels) - teacher(x, t, null))

    wanted = sample(predict, teacher.schedule, by_hand, noise, labels)
    assert torch.allclose(sample(network(teacher), teacher.schedule, recipe, noise, labels, 3.0, 3), wanted, atol=1e-4)


def test_opening_images_are_the_mean_of_what_the_network_says_at_the_noisiest_timestep(monkeypatch):
    teacher, batches = denoiser(), []
    monkeypatch.setattr(learned, "chunk_of", lambda shape: 5)
    teacher.model.register_forward_pre_hook(lambda model, given: batches.append(len(given[0])))
    mean, spread = opening_images(teacher, 4, 1)
    assert batches == [5, 5, 2]
    noise, labels = initial_noise((1, 8, 8), range(12), 1), labels_for(range(12), 3)
    bar = teacher.schedule.alphas_cumprod.double()[-1].item()
    with torch.no_grad():
        x0 = (bar**0.5 * noise - (1 - bar) ** 0.5 * teacher(noise, torch.full((12,), 99.0), labels)).clamp(-1, 1)
    by_label = torch.stack([x0[labels == label] for label in range(3)])
    assert torch.allclose(mean, by_label.mean(1), atol=1e-6)
    assert spread == pytest.approx((by_label.var(1, correction=0).mean() / mean.var()).item(), rel=1e-4)


def test_falling():
    found = [falling(torch.tensor(times).double()).tolist() for times in ([9.0, 9.5, 3.0], [1.0, 0.0, 0.0])]
    assert found[0] == pytest.approx([9.0, 9.0 - 1e-3, 3.0]) and found[1] == pytest.approx([1.0, 1e-3, 0.0])


def test_times_that_a_training_shifts_past_one_another_are_judged_as_they_ship():
    teacher, (noise, labels) = denoiser(), start()
    solver = LearnedSolver(teacher.schedule, classical(teacher, 3, True))
    with torch.no_grad():
        solver.shift.copy_(torch.tensor([-1.2, 0.0, 0.0]))  # the first time is told below the second one
        assert solver.times()[0] - 60 < solver.times()[1]
        found = unroll(predicting(teacher, False), solver, noise, labels, 1.0)
    rows = solver.rows()
    recipe = Recipe(timesteps=timesteps_of(rows), solver="learned", rows=rows)
    assert torch.allclose(found, sample(network(teacher), teacher.schedule, recipe, noise, labels), atol=1e-4)


@pytest.mark.parametrize("timesteps", [(99, 50, 1, 0), (99, 3, 2, 1)])
def test_a_start_of_times_next_to_one_another_stays_as_it_is(timesteps):
    schedule = denoiser().schedule
    first = LearnedSolver(schedule, solver_steps(schedule.config, timesteps, "ddim"))
    assert [row.t for row in first.rows()] == pytest.approx(timesteps, abs=1e-9)
    with torch.no_grad():
        first.shift[1] = -1.0  # the second time is told where the third one is
    rows = first.rows()
    assert [row.t for row in LearnedSolver(schedule, rows).rows()] == pytest.approx([row.t for row in rows], abs=1e-9)


def test_moments_by_hand():
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert moments_apart(x, y).item() == 4 * 1.0 + (2.0 - 8.0) ** 2
    assert moments_apart(x[:1], y[:1]).item() == 0


# ---- training ----

def pairs(teacher: Denoiser, n: int = 16) -> Pairs:
    images = np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    return Pairs(images, 5, teacher.num_classes)


def learn(net, tmp_path, how=HOW, masks=None, steps_before_a_kill=None):
    teacher = denoiser()
    for name, mask in (masks or {}).items():
        teacher.model.get_parameter(name).mul_(mask)
    solver = LearnedSolver(teacher.schedule, classical(teacher, 2, True))
    some, held = pairs(teacher).split(4)
    checkpoint = Checkpoint(tmp_path, "key", every_s=0.0)
    if steps_before_a_kill:
        killed = Training(teacher, solver, some, held, net, how, masks or {}, None)
        for i in range(steps_before_a_kill):
            killed.step(i)
        checkpoint.save({"state": killed.state(), "curve": [], "step": steps_before_a_kill, "losses": []})
        teacher = denoiser()
        solver = LearnedSolver(teacher.schedule, classical(teacher, 2, True))
    return train_along(teacher, solver, some, held, net, how, checkpoint, "test", masks)


def test_training_lowers_the_loss_on_held_pairs_and_keeps_the_best(net, tmp_path):
    found = learn(net, tmp_path, dataclasses.replace(HOW, steps=30))
    assert found.loss < found.start_loss and found.loss == min(loss for _, loss in found.held)
    assert not found.kept_start and dict(found.held)[found.at] == found.loss


def test_a_loss_that_is_no_number_is_said_and_the_start_kept(net, tmp_path, capsys):
    found = learn(net, tmp_path, dataclasses.replace(HOW, steps=4, lr=1e30, solver_lr=0.0))
    assert found.kept_start and found.loss == found.start_loss and not math.isfinite(found.held[-1][1])
    assert all(value.isfinite().all() for value in found.weights.values())
    assert "the loss was no number by step 4: rates too high?" in capsys.readouterr().out


def test_what_is_not_better_is_not_kept(net, tmp_path):
    found = learn(net, tmp_path, dataclasses.replace(HOW, steps=2, lr=1.0, solver_lr=1.0, ema_decay=0.0))
    fresh = denoiser()
    assert found.kept_start and found.loss == found.start_loss
    assert all(torch.equal(value, found.weights[name]) for name, value in fresh.model.state_dict().items())
    rows = LearnedSolver(fresh.schedule, classical(fresh, 2, True)).rows()
    assert found.solver.rows() == rows


def test_a_killed_training_ends_as_one_that_was_not(net, tmp_path):
    whole, killed = learn(net, tmp_path / "a"), learn(net, tmp_path / "b", steps_before_a_kill=3)
    assert whole.held == killed.held and whole.solver.rows() == killed.solver.rows()
    assert all(torch.equal(value, killed.weights[name]) for name, value in whole.weights.items())


def test_masks_stay(net, tmp_path):
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    mask = torch.rand(denoiser().model.get_parameter(name).shape) > 0.5
    found = learn(net, tmp_path, dataclasses.replace(HOW, steps=8), {name: mask})
    start = denoiser().model.get_parameter(name)
    assert not found.kept_start and (found.weights[name][~mask] == 0).all() and (found.weights[name] != start)[mask].any()


def test_frozen_weights_stay(net, tmp_path):
    found = learn(net, tmp_path, dataclasses.replace(HOW, lr=0.0))
    assert all(torch.equal(value, found.weights[name]) for name, value in denoiser().model.state_dict().items())


def test_pairs_know_their_noises():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    some, held = Pairs(images, 5, 3, first=10).split(2)
    noise, labels, wanted = held.take([1])
    assert torch.equal(noise, initial_noise((1, 1, 1), [15], 5)) and labels.tolist() == [15 % 3]
    assert wanted.item() == pytest.approx(5 / 127.5 - 1) and len(some) == 4
    with pytest.raises(ValueError, match="6 pairs of noise and image cannot hold out 6"):
        Pairs(images, 5, 3).split(6)


def test_the_loss_is_nothing_for_equal_images_and_sees_each_part(net):
    x = torch.rand(6, 1, 8, 8) * 2 - 1
    loss = PictureLoss(net, LOSS)
    assert loss(x, x).item() == 0
    blurred = x.mean(0, keepdim=True).expand_as(x)
    parts = [PictureLoss(net, Weights(**{**dict.fromkeys(("maps", "pixels", "moments"), 0.0), one: 1.0}))(blurred, x).item()
             for one in ("maps", "pixels", "moments")]
    alone = PictureLoss(net, Weights(maps=0, pixels=0, moments=0))(blurred, x).item()
    assert all(part > alone for part in parts)


def test_rows_of_a_recipe_carry_the_opening_everywhere():
    teacher = denoiser()
    rows = tuple(classical(teacher, 2, True))
    recipe = Recipe(timesteps=timesteps_of(rows), solver="learned", rows=rows)
    again = recipe_steps(teacher.schedule.config, Recipe.from_json(recipe.to_json()).to_json())
    assert again[0].opening == rows[0].opening and again[1].opening is None
