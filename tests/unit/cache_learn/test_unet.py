"""Resnets and attention blocks of a UNet are units of the table, the router and learned forecasts, as a DiT's sublayers are."""

import pytest
import torch

from tasks.cache_learn.errors import empty_errors, measure_errors
from tasks.cache_learn.forecast import Reference, fit, run_plan
from tasks.cache_learn.plan import plan_from_costs
from tasks.cache_learn.router import train_router
from tasks.cache_learn.table import interpolate_errors
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import build
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import initial_noise
from tasks.runtime.cache import TRUNK
from tests.unit.cache_learn.toy import CONFIG

UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8, 8],
        "norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
TIMESTEPS = (999, 666, 333, 100)
UNITS = ["down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "down_blocks.1.attentions.0", "mid_block.resnets.0",
         "mid_block.attentions.0", "mid_block.resnets.1", "up_blocks.0.resnets.0", "up_blocks.0.attentions.0",
         "up_blocks.0.resnets.1", "up_blocks.0.attentions.1", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1"]


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    made = build("UNet2DModel", UNET, CONFIG)
    made.model.eval().requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def table(denoiser):
    noise = initial_noise(denoiser.sample_shape, range(2), seed=0)
    return measure_errors(denoiser, UNITS, TIMESTEPS, noise, None, 2, empty_errors(len(UNITS), len(TIMESTEPS)))


def test_units_are_all_resnets_and_attentions_in_the_order_of_computation(denoiser):
    ran = []
    hooks = [denoiser.model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name)) for name in UNITS]
    denoiser(torch.zeros(1, 1, 8, 8), torch.tensor([5]))
    for hook in hooks:
        hook.remove()
    assert [s.name for s in denoiser.sublayers()] == ran == UNITS
    kinds = {type(denoiser.model.get_submodule(s.name)).__name__: s.kind for s in denoiser.sublayers()}
    assert kinds == {"ResnetBlock2D": "resnet", "Attention": "attention"}


def test_the_table_prices_every_unit(table):
    for start, to in [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3)]:
        assert (table[:, start, to] > 0).all(), "nothing in a UNet is reused for free"


def test_the_router_reaches_every_unit(denoiser, tmp_path):
    how = {"steps": 2, "batch": 2, "lr": 0.3, "lam": 0.0, "reduction": "mean", "label_dropout": 0.0, "seed": 0}
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def beta(steps):
        return train_router(denoiser, UNITS, images, None, TIMESTEPS, **{**how, "steps": steps},
                            checkpoint=Checkpoint(tmp_path / str(steps), "u" * 16))[0]

    assert beta(1).shape == (2, len(UNITS))
    moved = (beta(3) - beta(1)).abs()
    assert (moved.max(dim=0).values > 0).all()


def test_a_plan_of_units_learns_its_weights(denoiser, table):
    costs = interpolate_errors(table, TIMESTEPS, TIMESTEPS)
    plan = plan_from_costs(costs, UNITS, 0.25, 3)
    assert plan.sublayers == tuple(UNITS) and plan.removed_share == 0.25 and len(plan.masks) <= 3
    noise = initial_noise(denoiser.sample_shape, range(4), 0)
    reference = Reference.of(denoiser, Recipe(timesteps=TIMESTEPS), UNITS, noise, None)
    fitted, images = fit(plan, reference)
    assert torch.allclose(run_plan(fitted, reference), images, atol=1e-4)
    assert reference.distance(images) < reference.distance(run_plan(plan, reference))


def test_a_trunk_learns_its_weights(denoiser):
    """What its table measures, what it is fitted to and what it reuses are the same sum of all blocks."""
    noise = initial_noise(denoiser.sample_shape, range(4), 0)
    errors = measure_errors(denoiser, [TRUNK], TIMESTEPS, noise, None, 2, empty_errors(1, len(TIMESTEPS)))
    plan = CachePlan(sublayers=(TRUNK,), compute=((True,), (True,), (False,), (False,)))
    reference = Reference.of(denoiser, Recipe(timesteps=TIMESTEPS), plan.sublayers, noise, None)
    fitted, images = fit(plan, reference)
    assert torch.allclose(run_plan(fitted, reference), images, atol=1e-4)
    assert reference.distance(images) < reference.distance(run_plan(plan, reference))
    assert errors[0, 0, 1] > 0 and errors[0, 1, 1] == 0
