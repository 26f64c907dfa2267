"""Which time belongs to which layer, by hand and on a model whose layers sleep."""

import time

import pytest
import torch
from torch import nn

from tasks.core.cost import LayerCost
from tasks.profile.compressed import narrowed, two_of_four
from tasks.profile.probe import clocked, layer_times, modules_of, owner, pooled, role

COSTS = [LayerCost("blocks.0.attn1.to_q", "linear", 1, 1, None),
         LayerCost("blocks.0.attn1.qk", "attention_product", 1, 0, None),
         LayerCost("blocks.0.attn1.av", "attention_product", 1, 0, None), LayerCost("proj", "conv", 1, 1, None)]


def test_an_attention_module_stands_for_its_products():
    assert modules_of(COSTS) == ["blocks.0.attn1.to_q", "blocks.0.attn1", "proj"]
    times = layer_times(COSTS, {"blocks.0.attn1.to_q": 5.0, "blocks.0.attn1": 3.0, "": 9.0})
    assert times == {"blocks.0.attn1.to_q": 5.0, "blocks.0.attn1.qk": 1.5, "blocks.0.attn1.av": 1.5, "proj": 0.0}


@pytest.mark.parametrize(("node", "expected"), [
    ("__module.model.blocks.0.attn1.to_q/aten::linear/MatMul", "blocks.0.attn1.to_q"),
    ("__module.model.blocks.0.attn1.to_q/aten::fake_quantize_per_tensor_affine/FakeQuantize", "blocks.0.attn1.to_q"),
    ("__module.model.blocks.0.attn1/aten::transpose/Transpose_3", "blocks.0.attn1"),
    ("__module.model.blocks.0.attn1.to_out.0/aten::linear/MatMul", "blocks.0.attn1"),  # not listed: its attention's
    ("__module.model.blocks.0.attn10/aten::add/Add", ""),
    ("Convert_1234", "")])
def test_a_nodes_owner_is_the_innermost_module(node, expected):
    assert owner(node, modules_of(COSTS)) == expected


def test_layers_of_one_role_and_shape_share_their_median():
    times = {"blocks.0.to_q": [1.0, 1.0], "blocks.1.to_q": [3.0, 90.0], "blocks.2.to_q": [9.0], "blocks.0.to_k": [7.0]}
    shapes = {"blocks.0.to_q": (4, 4), "blocks.1.to_q": (4, 4), "blocks.2.to_q": (2, 4), "blocks.0.to_k": (4, 4)}
    assert pooled(times, shapes) == {"blocks.0.to_q": 2.0, "blocks.1.to_q": 2.0, "blocks.2.to_q": 9.0, "blocks.0.to_k": 7.0}
    assert role("blocks.10.net.0.proj") == role("blocks.2.net.1.proj")


class Sleeper(nn.Module):
    def __init__(self, ms, inner=None):
        super().__init__()
        self.ms, self.inner = ms, inner

    def forward(self, x):
        time.sleep(self.ms / 1e3)
        return x if self.inner is None else self.inner(self.inner(x))


def test_time_of_inner_modules_is_taken_off():
    """20 ms outside, two calls of 10 ms inside."""
    model = Sleeper(0, Sleeper(20, Sleeper(10)))
    with clocked(model, ["inner", "inner.inner"]) as spent:
        model.inner(torch.zeros(1))
    assert spent["inner"] >= 20e3 and spent["inner.inner"] >= 20e3
    assert not model.inner._forward_hooks and not model.inner._forward_pre_hooks


def test_two_of_four_leaves_shapes_and_half_of_the_weights():
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2))
    small, density = two_of_four(model)
    assert density == {"0": 0.5}  # 3 inputs are no multiple of 4
    assert (small[0].weight == 0).sum() == 12 and torch.equal(small[1].weight, model[1].weight)
    assert (model[0].weight != 0).all()


class FeedForwardModel(nn.Module):
    """The attribute names that diffusers' feed-forward has."""

    def __init__(self, width, hidden):
        super().__init__()
        self.ff = nn.Module()
        first = nn.Module()
        first.proj = nn.Linear(width, hidden)
        self.ff.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, width)])


def test_narrowing_removes_hidden_units_from_a_copy():
    model = FeedForwardModel(4, 16)
    small, density = narrowed(model, 0.25)
    assert density == {"ff.net.0.proj": 0.25, "ff.net.2": 0.25}
    assert small.ff.net[0].proj.weight.shape == (4, 4) and model.ff.net[0].proj.weight.shape == (16, 4)
    assert narrowed(model, 0.01)[0].ff.net[2].in_features == 1
