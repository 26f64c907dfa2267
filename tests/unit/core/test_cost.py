"""MACs, BitOPs and bytes of a DiT small enough to count by hand."""

import pytest
import torch

from tasks.core.cost import bitops, evaluations, layer_costs, macs, size_bytes
from tasks.core.denoiser import build
from tasks.core.recipe import CachePlan, Recipe
from tasks.pretrain_load.architectures import SCHEDULE, dit, unet
from tasks.runtime.cache import TRUNK

TOKENS, WIDTH = 4, 8  # 4 x 4 pixels in patches of 2


@pytest.fixture(scope="module")
def costs():
    torch.manual_seed(0)
    denoiser = build("DiTTransformer2DModel", dit(4, 1, 3, width=WIDTH, depth=2, heads=2, patch=2), SCHEDULE)
    return {c.name: c for c in layer_costs(denoiser)}


def test_layers_by_hand(costs):
    block = "transformer_blocks.1"
    assert costs[f"{block}.attn1.to_q"].macs == TOKENS * WIDTH * WIDTH
    assert costs[f"{block}.attn1.qk"].macs == costs[f"{block}.attn1.av"].macs == TOKENS * TOKENS * WIDTH
    assert costs[f"{block}.ff.net.0.proj"].macs == TOKENS * WIDTH * 4 * WIDTH
    assert costs[f"{block}.ff.net.0.proj"].weights == WIDTH * 4 * WIDTH + 4 * WIDTH
    assert costs[f"{block}.norm1.linear"].macs == WIDTH * 6 * WIDTH  # once per image, not per token
    assert costs["pos_embed.proj"].macs == TOKENS * WIDTH * 1 * 2 * 2
    assert costs[f"{block}.ff.net.2"].sublayer == f"{block}.ff" and costs[f"{block}.norm1.linear"].sublayer is None


def test_the_first_blocks_embedding_runs_twice_and_is_stored_once(costs):
    """diffusers' DiT conditions its output on block 0's timestep embedding, computed a second time."""
    first, second = (costs[f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1"] for i in (0, 1))
    assert first.macs == 2 * second.macs and first.weights == second.weights


def test_cache_density_and_bits_by_hand(costs):
    layers = [costs["transformer_blocks.0.attn1.to_q"], costs["transformer_blocks.0.attn1.qk"], costs["proj_out_2"]]
    plan = CachePlan(sublayers=("transformer_blocks.0.attn1",), compute=((True,), (False,), (True,)))
    recipe = Recipe(timesteps=(9, 5, 1), cache=plan, precision={"transformer_blocks.0.attn1.to_q": "w4a8"},
                    sparsity={"grain": "2:4", "density": {"transformer_blocks.0.attn1.to_q": 0.5}})
    q, qk, out = 4 * 8 * 8, 4 * 4 * 8, 4 * 8 * 4
    assert macs(layers, recipe) == 2 * q // 2 + 2 * qk + 3 * out
    assert bitops(layers, recipe) == 2 * q // 2 * 4 * 8 + 2 * qk * 32 * 32 + 3 * out * 32 * 32


def test_a_skipped_trunk_leaves_out_all_blocks(costs):
    recipe = Recipe(timesteps=(9, 5, 1), cache=CachePlan(sublayers=(TRUNK,), compute=((True,), (False,), (True,))))
    ran = {cost.name: evaluations(cost, recipe) for cost in costs.values()}
    assert ran["transformer_blocks.0.norm1.linear"] == ran["transformer_blocks.1.attn1.qk"] == 2
    assert ran["proj_out_2"] == ran["pos_embed.proj"] == 3
    assert ran["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"] == 3, "the output layer's embedding"


def test_size_by_hand(costs):
    layers = [costs["transformer_blocks.0.attn1.to_q"], costs["transformer_blocks.0.attn1.qk"]]
    assert size_bytes(layers, {layers[0].name: "w4a8"}, {layers[0].name: 0.5}, other=10) == 72 * 0.5 * 4 / 8 + 40


def test_sublayers_of_a_unet_are_in_the_order_of_computation():
    denoiser = build("UNet2DModel", unet(8, 1, width=8), SCHEDULE)
    names = [s.name for s in denoiser.sublayers()]
    order = []
    hooks = [denoiser.model.get_submodule(n).register_forward_hook(lambda *_, n=n: order.append(n)) for n in names]
    denoiser(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
    assert order == names
    assert all(hook is not None for hook in hooks)
    convs = {c.name: c for c in layer_costs(denoiser)}
    assert convs["conv_in"].macs == 8 * 8 * 8 * 9
    assert convs["mid_block.attentions.0.qk"].macs == 4 * 4 * 16
