"""Reuse of sublayer outputs, on arithmetic done by hand and on live diffusers models."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from tasks.core.denoiser import build
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, network, sample
from tasks.runtime.cache import ATTRIBUTE, TRUNK, apply_cache, remove_cache, sources, trunk


class Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, x):
        self.calls += 1
        return self.factor * x


class Toy(nn.Module):
    """x -> x + 2 x, then y -> y + 10 y: both sublayers add to a residual stream."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Scale(2.0), Scale(10.0)

    def forward(self, x):
        x = x + self.a(x)
        return x + self.b(x)


SCHEDULE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "prediction_type": "v_prediction"}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_type": "ada_norm_zero",
       "norm_elementwise_affine": False}
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8, 8],
        "norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}


@pytest.fixture(scope="module", params=["dit", "unet"])
def denoiser(request):
    torch.manual_seed(0)
    made = build("DiTTransformer2DModel", DIT, SCHEDULE) if request.param == "dit" else build("UNet2DModel", UNET, SCHEDULE)
    made.model.eval().requires_grad_(False)
    return made


def rollout(denoiser, handle=None, steps=3, batch=2, seed=0):
    """Predictions at `steps` unrelated inputs."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(batch) % 3 if denoiser.num_classes else None
    out = []
    for step in range(steps):
        if handle is not None:
            handle.step = step
        x = torch.randn(batch, *denoiser.sample_shape, generator=rng)
        out.append(denoiser(x, torch.full((batch,), 900 - 300 * step), labels))
    return torch.stack(out)


def names(denoiser):
    return [s.name for s in denoiser.sublayers()]


def test_reuse_by_hand():
    model = Toy()
    handle = apply_cache(model, ["a", "b"], [[True, True], [False, True], [False, False], [True, False]])
    seen = []
    for step, x in enumerate([1.0, 2.0, 3.0, 4.0]):
        handle.step = step
        seen.append(model(torch.tensor([x])).item())
    # step 0: a = 2, y = 3, b = 30 -> 33; step 1: a kept 2, y = 4, b = 40 -> 44
    # step 2: a kept 2, y = 5, b kept 40 -> 45; step 3: a = 8, y = 12, b kept 40 -> 52
    assert seen == [33.0, 44.0, 45.0, 52.0]
    assert (model.a.calls, model.b.calls) == (2, 2), "skipped sublayers do no work"


def test_computing_everything_is_bit_identical_and_touches_nothing(denoiser):
    before = rollout(denoiser)
    handle = apply_cache(denoiser.model, names(denoiser), [[True] * len(names(denoiser))] * 3)
    assert torch.equal(rollout(denoiser, handle), before)
    assert not any("forward" in vars(m) for m in denoiser.model.modules())
    remove_cache(denoiser.model)


def test_apply_apply_remove_leaves_no_trace(denoiser):
    before, sublayers = rollout(denoiser), names(denoiser)
    attributes = {name: set(vars(m)) for name, m in denoiser.model.named_modules()}
    compute = [[True] * len(sublayers), *[[False] * len(sublayers)] * 2]
    apply_cache(denoiser.model, sublayers, compute)
    once = rollout(denoiser, getattr(denoiser.model, ATTRIBUTE))
    twice = rollout(denoiser, apply_cache(denoiser.model, sublayers, compute))
    assert torch.equal(once, twice) and not torch.equal(once, before)
    remove_cache(denoiser.model)
    remove_cache(denoiser.model)
    assert {name: set(vars(m)) for name, m in denoiser.model.named_modules()} == attributes
    assert torch.equal(rollout(denoiser), before)


class Blocks(nn.Module):
    """x -> 3 x -> 33 x, as blocks of a DiT."""

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Scale(3.0), Scale(11.0)])

    def forward(self, x):
        for block in self.transformer_blocks:
            x = block(x)
        return 2 * x


def test_a_skipped_trunk_by_hand():
    model = Blocks()
    handle = apply_cache(model, [TRUNK], [[True], [True], [False], [False]], "learned",
                         weights=[[()], [()], [(0.5, 0.25)], [(1.0, -1.0)]])
    seen = []
    for step, x in enumerate([1.0, 2.0, 3.0, 4.0]):
        handle.step = step
        seen.append(model(torch.tensor([x])).item())
    # the trunk adds 32, then 64; step 2: 3 + 32 + 8 = 43; step 3: 4 + 64 - 32 = 36
    assert seen == [66.0, 132.0, 86.0, 72.0]
    assert [block.calls for block in model.transformer_blocks] == [2, 2], "skipped blocks do no work"
    remove_cache(model)
    assert not any("forward" in vars(m) for m in model.modules()) and model(torch.ones(1)).item() == 66


def test_a_trunk_is_all_blocks(denoiser):
    """Reused for the input it was computed for, it gives what was computed; nothing inside runs."""
    blocks, ran = trunk(denoiser.model), []
    hooks = [m.register_forward_hook(lambda m, args, out: ran.append(m)) for block in blocks for m in block.modules()
             if isinstance(m, (nn.Linear, nn.Conv2d))]
    handle = apply_cache(denoiser.model, [TRUNK], [[True], [False]])
    x, labels = torch.randn(2, *denoiser.sample_shape), torch.arange(2) % 3 if denoiser.num_classes else None
    t = torch.full((2,), 500)
    computed = denoiser(x, t, labels)
    handle.step, inside = 1, len(ran)
    reused = denoiser(x, t, labels)
    embedding = 2 if denoiser.num_classes else 0  # of the output layer of a DiT, whose first block holds it
    assert len(ran) - inside == embedding < inside
    torch.testing.assert_close(reused, computed, rtol=1e-4, atol=1e-5)
    remove_cache(denoiser.model)
    for hook in hooks:
        hook.remove()
    assert torch.equal(denoiser(x, t, labels), computed)


def test_a_trunk_of_one_block_and_a_copy_of_it():
    model = Blocks()
    del model.transformer_blocks[1]
    handle = apply_cache(model, [TRUNK], [[True], [False]])
    twin = copy.deepcopy(model)
    assert model(torch.ones(1)).item() == 6
    handle.step = 1
    assert model(torch.ones(1)).item() == 6  # 1 + (3 - 1), twice
    assert (model.transformer_blocks[0].calls, twin.transformer_blocks[0].calls) == (1, 0)
    assert twin(torch.ones(1)).item() == 6 and twin.transformer_blocks[0].calls == 1


def test_blocks_that_hand_on_more_than_one_tensor_are_no_trunk():
    model = UNet2DModel(**{**UNET, "down_block_types": ["SkipDownBlock2D"] * 2, "up_block_types": ["SkipUpBlock2D"] * 2})
    with pytest.raises(ValueError, match="SkipDownBlock2D hands on an image beside its output.*plan for sublayers"):
        apply_cache(model, [TRUNK], [[True], [False]])


def test_a_trunk_is_cached_alone():
    with pytest.raises(ValueError, match="trunk holds all other sublayers, it is cached alone"):
        apply_cache(Blocks(), ["transformer_blocks.0", TRUNK], [[True, True]])


def test_state_dict_is_not_changed(denoiser):
    keys = list(denoiser.model.state_dict())
    sublayers = names(denoiser)
    apply_cache(denoiser.model, sublayers, [[True] * len(sublayers), [False] * len(sublayers)])
    assert list(denoiser.model.state_dict()) == keys
    remove_cache(denoiser.model)


def test_repeated_trajectories_and_other_batches_start_afresh(denoiser):
    sublayers = names(denoiser)
    handle = apply_cache(denoiser.model, sublayers, [[True] * len(sublayers), *[[False] * len(sublayers)] * 2])
    first = rollout(denoiser, handle)
    other = rollout(denoiser, handle, batch=3, seed=1)
    assert torch.equal(rollout(denoiser, handle), first)
    assert torch.equal(rollout(denoiser, handle, batch=3, seed=1), other)
    remove_cache(denoiser.model)


def test_guidance_halves_in_one_batch_are_cached_apart(denoiser):
    """Conditional and unconditional rows of one batch give what each gives alone."""
    if not denoiser.num_classes:
        pytest.skip("unconditional")
    sublayers, x, t = names(denoiser), torch.randn(2, *denoiser.sample_shape), torch.full((2,), 500)
    labels, null = torch.tensor([0, 1]), torch.full((2,), denoiser.null_label)
    handle = apply_cache(denoiser.model, sublayers, [[True] * len(sublayers), [False] * len(sublayers)])

    def run(x, t, y):
        for step in (0, 1):
            handle.step = step
            out = denoiser(x * (step + 1), t - step, y)
        return out

    both = run(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null]))
    torch.testing.assert_close(both, torch.cat([run(x, t, labels), run(x, t, null)]))
    remove_cache(denoiser.model)


FORECASTS = pytest.mark.parametrize("forecast", ["none", "taylor"])
TIMESTEPS = (900, 700, 600, 200)


def cached(denoiser, handle):
    def predict(x, t, labels, step):
        handle.step = step
        return denoiser(x, t, labels)
    return predict


@FORECASTS
def test_guided_images_are_those_of_two_runs_cached_apart(denoiser, forecast):
    """Scale 1.5: both halves in one batch through the sampler, against one model with a cache of its own for each half."""
    if not denoiser.num_classes:
        pytest.skip("unconditional")
    compute = [[(step + i) % 3 == 0 or step < 1 for i in range(len(names(denoiser)))] for step in range(len(TIMESTEPS))]
    twins = [copy.copy(denoiser), copy.copy(denoiser)]
    for twin in twins:
        twin.model = copy.deepcopy(denoiser.model)
    apart = [cached(twin, apply_cache(twin.model, names(twin), compute, forecast, TIMESTEPS)) for twin in twins]

    def two_runs(x, t, labels, step):
        conditional = apart[0](x, t, labels, step)
        unconditional = apart[1](x, t, torch.full_like(labels, denoiser.null_label), step)
        return unconditional + 1.5 * (conditional - unconditional)

    noise, labels = initial_noise(denoiser.sample_shape, range(3), seed=0), torch.tensor([0, 1, 2])
    recipe = Recipe(timesteps=TIMESTEPS)
    together = cached(denoiser, apply_cache(denoiser.model, names(denoiser), compute, forecast, TIMESTEPS))
    images = sample(together, denoiser.schedule, recipe, noise, labels, 1.5, denoiser.null_label)
    remove_cache(denoiser.model)
    torch.testing.assert_close(images, sample(two_runs, denoiser.schedule, recipe, noise, labels))
    plain = sample(network(denoiser), denoiser.schedule, recipe, noise, labels, 1.5, denoiser.null_label)
    assert not torch.allclose(images, plain), "the cache was live"


@pytest.mark.parametrize("solver", ["ddim", "dpm2m"])
def test_the_plans_step_is_the_networks_evaluation(denoiser, solver):
    """One evaluation for each row of the plan, at its timestep, at either order: there is nothing to shift."""
    seen = []

    def predict(x, t, labels, step):
        seen.append((step, *t.unique().tolist()))
        return denoiser(x, t, labels)

    labels = torch.zeros(2, dtype=torch.int64) if denoiser.num_classes else None
    recipe = Recipe(timesteps=TIMESTEPS, solver=solver)
    sample(predict, denoiser.schedule, recipe, initial_noise(denoiser.sample_shape, range(2), 0), labels)
    assert seen == list(enumerate(TIMESTEPS)) and len(seen) == recipe.nfe


@FORECASTS
def test_nothing_inside_a_skipped_sublayer_runs(denoiser, forecast):
    """Projections, norms and, in a UNet's resnet, the embedding of the timestep: every module below a sublayer is counted."""
    sublayers, ran = names(denoiser), []
    hooks = [module.register_forward_hook(lambda *_, name=name: ran.append(name))
             for name, module in denoiser.model.named_modules() if any(name.startswith(f"{s}.") for s in sublayers)]
    skipped = [name for i, name in enumerate(sublayers) if i % 2]
    compute = [[True] * len(sublayers)] * 2 + [[i % 2 == 0 for i in range(len(sublayers))]]
    handle = apply_cache(denoiser.model, sublayers, compute, forecast, TIMESTEPS[:3])
    counts = []
    for step in range(3):
        ran.clear()
        handle.step = step
        denoiser(torch.zeros(2, *denoiser.sample_shape), torch.full((2,), TIMESTEPS[step]),
                 torch.zeros(2, dtype=torch.int64) if denoiser.num_classes else None)
        counts.append([sum(name.startswith(f"{sublayer}.") for name in ran) for sublayer in sublayers])
    for hook in hooks:
        hook.remove()
    remove_cache(denoiser.model)
    assert all(counts[0]) and counts[1] == counts[0]
    assert counts[2] == [0 if name in skipped else count for name, count in zip(sublayers, counts[0], strict=True)]
    assert any("time_emb_proj" in name or "to_q" in name for name in ran), "what is counted includes projections"


def test_a_forecast_by_hand():
    """y = 2 x: first order through the last two computed, in timesteps; plain reuse where only one was computed."""
    model = Toy()
    handle = apply_cache(model, ["a"], [[True], [False], [True], [False], [False], [True], [False]], "taylor",
                         (1000, 900, 800, 700, 400, 300, 0))
    seen = []
    for step, x in enumerate([1.0, 2.0, 4.0, 7.0, 7.0, 3.0, 0.0]):
        handle.step = step
        seen.append(model(torch.tensor([x])).item() / 11 - x)  # what `a` added
    # computed: 2 at 1000, 8 at 800, 6 at 300. At 900: 2. At 700: 8 + 100 (6 / 200). At 400: 8 + 400 (6 / 200).
    # At 0: 6 + 300 (6 - 8) / 500.
    assert seen == pytest.approx([2, 2, 8, 11, 20, 6, 4.8], rel=1e-5)
    assert model.a.calls == 3


def test_learned_weights_by_hand():
    """y = 2 x; a weight for each of the last three outputs, fewer at first."""
    model = Toy()
    weights = [[()], [(3.0,)], [()], [(0.5, 1.0)], [()], [(1.0, -1.0, 2.0)]]
    handle = apply_cache(model, ["a"], [[True], [False]] * 3, "learned", weights=weights)
    seen = []
    for step, x in enumerate([1.0, 5.0, 2.0, 5.0, 4.0, 5.0]):
        handle.step = step
        seen.append(model(torch.tensor([x])).item() / 11 - x)  # what `a` added
    # computed: 2, 4, 8. Then 3 x 2; 0.5 x 4 + 2; 8 - 4 + 2 x 2.
    assert seen == pytest.approx([2, 6, 4, 4, 8, 8], rel=1e-5)


def test_sources_by_hand():
    compute = [True, False, True, False, False, True, False]
    assert sources(compute, "none") == [(), (0,), (), (2,), (2,), (), (5,)]
    assert sources(compute, "taylor") == [(), (0,), (), (2, 0), (2, 0), (), (5, 2)]
    assert sources(compute, "learned") == [(), (0,), (), (2, 0), (2, 0), (), (5, 2, 0)]


def test_no_more_is_kept_than_later_steps_need():
    model = Toy()
    handle = apply_cache(model, ["a"], [[True], [True], [True], [False], [True]], "taylor", (900, 700, 500, 300, 100))
    kept = []
    for step in range(5):
        handle.step = step
        model(torch.ones(1))
        kept.append(sorted(handle.units["a"].kept))
    assert kept == [[], [1], [1, 2], [1, 2], []]


def test_forecasts_start_afresh_with_every_trajectory_and_batch(denoiser):
    sublayers = names(denoiser)
    compute = [[True] * len(sublayers)] * 2 + [[False] * len(sublayers)]
    handle = apply_cache(denoiser.model, sublayers, compute, "taylor", TIMESTEPS[:3])
    first = rollout(denoiser, handle)
    other = rollout(denoiser, handle, batch=3, seed=1)
    assert torch.equal(rollout(denoiser, handle), first)
    assert torch.equal(rollout(denoiser, handle, batch=3, seed=1), other)
    reused = rollout(denoiser, apply_cache(denoiser.model, sublayers, compute))
    assert torch.equal(first[:2], reused[:2]) and not torch.equal(first[2], reused[2])
    remove_cache(denoiser.model)


def test_a_forecast_from_another_batch_is_refused():
    model = Toy()
    handle = apply_cache(model, ["a"], [[True], [True], [False]], "taylor", (2, 1, 0))
    for step, batch in enumerate((4, 3)):
        handle.step = step
        model(torch.ones(batch))
    handle.step = 2
    with pytest.raises(ValueError, match="a: step 2 got 3 float32 on cpu, but would reuse the output for 4 float32"):
        model(torch.ones(3))


@pytest.mark.parametrize(("forecast", "timesteps", "message"), [
    ("euler", (1, 0), "forecast 'euler' is not one of none, taylor, learned"),
    ("taylor", None, "forecast taylor needs the timesteps of the 2 steps"),
    ("taylor", (3, 2, 1), "3 timesteps for 2 steps"),
    ("learned", None, "forecast learned has no weights"),
])
def test_a_wrong_forecast_is_refused(forecast, timesteps, message):
    with pytest.raises(ValueError, match=message):
        apply_cache(Toy(), ["a"], [[True], [False]], forecast, timesteps)


def test_another_batch_size_at_a_skipped_step_is_refused():
    model = Toy()
    handle = apply_cache(model, ["a"], [[True], [False]])
    model(torch.ones(4, 2))
    handle.step = 1
    with pytest.raises(ValueError, match=r"a: step 1 got 3x2 float32 on cpu, but would reuse the output for 4x2"):
        model(torch.ones(3, 2))


def test_a_skipped_step_without_a_computed_one_is_refused():
    model = Toy()
    handle = apply_cache(model, ["a"], [[True], [False]])
    model(torch.ones(1))
    handle.reset()
    handle.step = 1
    with pytest.raises(ValueError, match="a: step 1 reuses the output of step 0, but none is kept"):
        model(torch.ones(1))


def test_step_zero_forgets():
    model = Toy()
    handle = apply_cache(model, ["a"], [[True], [False]])
    model(torch.ones(1))
    assert list(handle.units["a"].kept) == [0]
    handle.step = 0
    assert not handle.units["a"].kept


def test_a_copy_of_the_model_has_a_cache_of_its_own():
    model = Toy()
    apply_cache(model, ["a"], [[True], [False]])
    twin = copy.deepcopy(model)
    model(torch.ones(1))
    assert (model.a.calls, twin.a.calls) == (1, 0)
    twin(torch.ones(1))
    assert (model.a.calls, twin.a.calls) == (1, 1)
    remove_cache(twin)
    assert "forward" not in vars(twin.a) and "forward" in vars(model.a)


def test_a_wrapper_that_was_there_before_is_put_back():
    model = Toy()
    model.a.forward = wrapper = lambda x: 5 * x
    apply_cache(model, ["a"], [[True], [False]])
    remove_cache(model)
    assert model.a.forward is wrapper


@pytest.mark.parametrize(("sublayers", "compute", "message"), [
    (["c"], [[True]], "no sublayer 'c'"),
    (["a", "b"], [[True]], "step 0 has 1 entries for 2 sublayers"),
    (["a"], [[False]], "step 0 computes every sublayer"),
    (["a"], [], "step 0 computes every sublayer"),
])
def test_a_wrong_plan_is_refused(sublayers, compute, message):
    with pytest.raises(ValueError, match=message):
        apply_cache(Toy(), sublayers, compute)


def test_a_step_beyond_the_plan_is_refused():
    handle = apply_cache(Toy(), ["a"], [[True], [False]])
    with pytest.raises(ValueError, match="step 2 is not between 0 and 1"):
        handle.step = 2
