"""Masks and gradients of one weight, by hand."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from tasks.distill.masking import (
    Target,
    flip_rate,
    mask_of,
    pass_gradients,
    pruned_part,
    recomputed,
    shared_copy,
    shrink_pruned,
    targets,
    write_masked,
)

MASK = {"weight": torch.tensor([[True, False]])}


def pair(weight: list[float]) -> tuple[nn.Linear, nn.Linear]:
    """A dense layer of one output, and the one that computes under the mask."""
    dense = nn.Linear(2, 1)
    dense.weight.data = torch.tensor([weight])
    live = shared_copy(dense, MASK)
    write_masked(live, dense, MASK)
    return dense, live


def test_the_live_model_computes_masked_and_shares_the_rest():
    dense, live = pair([2.0, -3.0])
    assert live.weight.tolist() == [[2, 0]] and dense.weight.tolist() == [[2, -3]]
    assert live.bias is dense.bias and live.weight is not dense.weight


@pytest.mark.parametrize("cut, decay, expected", [
    (False, 0.1, [5, 7 + 0.1 * -3]),  # SR-STE: the kept weight does not decay
    (False, 0.0, [5, 7]),             # straight through
    (True, 0.1, [5, 0]),              # fixed
])
def test_gradient_of_a_pruned_weight(cut, decay, expected):
    dense, live = pair([2.0, -3.0])
    live(torch.tensor([[5.0, 7.0]])).sum().backward()
    pass_gradients(live, dense, MASK, frozenset(MASK if cut else ()), decay)
    assert dense.weight.grad.tolist() == [pytest.approx(expected)]
    assert live.weight.grad is None and dense.bias.grad.tolist() == [1]


def test_decoupled_decay_shrinks_pruned_weights_alone():
    dense, live = pair([2.0, -3.0])
    shrink_pruned(live, dense, ["weight"], 0.1)
    assert dense.weight.tolist() == [pytest.approx([2, -2.7])]


def test_flip_rate_and_recomputation():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[4.0, 3.0, 2.0, -1.0]])
    before = {"weight": torch.tensor([[True, False, True, False]])}
    assert recomputed(layer, before, targets(before, "unit"))["weight"].tolist() == [[True, False, True, False]]
    for grain in ("2:4", "fine"):
        after = recomputed(layer, before, targets(before, grain))
        assert after["weight"].tolist() == [[True, True, False, False]]
    assert flip_rate(before, after) == 0.5
    assert flip_rate({}, {}) == 0


def test_targets_of_mixed_grains():
    masks = {"a": torch.tensor([True, False]), "b": torch.tensor([True, True, True, False])}
    assert targets(masks, {"a": "fine", "b": "filter"}) == {"a": Target("fine", 0.5), "b": Target("filter", 0.75)}
    with pytest.raises(ValueError, match="grain: b has a mask and no grain"):
        targets(masks, {"a": "fine"})


def test_parts_of_the_schedule():
    assert [pruned_part(i, 8, (0.25, 0.5)) for i in (0, 1, 2, 3, 4, 7)] == [Fraction(k, 3) for k in (1, 1, 2, 2, 3, 3)]
    assert pruned_part(0, 8, ()) == 1


@pytest.mark.parametrize("grain, density, kept", [
    ("2:4", 0.5, [12, 8, 8]),    # 3:4, 2:4, 2:4: of 16
    ("1:4", 0.25, [12, 8, 4]),   # 3:4, 2:4, 1:4
    ("fine", 0.25, [12, 8, 4]),
    ("filter", 0.25, [12, 8, 4]),
])
def test_what_each_part_keeps(grain, density, kept):
    weight = torch.arange(1.0, 17).view(4, 4)
    masks = [mask_of(weight, Target(grain, density), Fraction(k, 3)) for k in (1, 2, 3)]
    assert [mask.sum().item() for mask in masks] == kept
    if grain == "1:4":
        assert masks[0].tolist() == [[False, True, True, True]] * 4
