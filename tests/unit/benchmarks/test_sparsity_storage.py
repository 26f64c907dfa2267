"""Bits and references of two layers worked by hand."""

import pytest
import torch

from benchmarks.sparsity.storage import reference_share, run_length, storage_share
from tasks.core.cost import LayerCost

# 4 outputs of 8 inputs and a bias, half of its weights kept, read at 10 places; and a layer without a mask
LAYERS = [LayerCost("masked", "linear", 320, 36, None), LayerCost("dense", "linear", 96, 92, None)]
HALF = torch.tensor([True, True, False, False] * 8).view(4, 8)
ROWS = torch.tensor([True, False, True, False]).repeat_interleave(8).view(4, 8)


@pytest.mark.parametrize(("mask", "grain", "bits"), [
    (HALF, "2:4", 16 * (8 + 2)), (HALF, "fine", 16 * (8 + 4)), (ROWS, "vector", 2 * (64 + 4)), (ROWS, "filter", 2 * (64 + 4)),
    (ROWS, "unit", 18 * 8 - 4 * 8)])
def test_an_index_is_stored_with_what_it_finds(mask, grain, bits):
    assert storage_share(LAYERS, {"masked.weight": mask}, grain, {"masked": 0.5}) == (bits + (4 + 92) * 8) / (128 * 8)


def test_a_layer_stores_the_weights_of_its_own_pattern():
    quarter = {"masked.weight": torch.tensor([True, False, False, False] * 8).view(4, 8)}
    assert storage_share(LAYERS, quarter, "2:4", {"masked": 0.25}) == (8 * (8 + 2) + (4 + 92) * 8) / (128 * 8)
    assert reference_share(LAYERS, quarter, "2:4") == 0.25


@pytest.mark.parametrize(("mask", "grain", "share"), [
    (HALF, "fine", 0.5), (HALF, "2:4", 0.25), (ROWS, "vector", 0.5 / 8), (ROWS, "filter", 0.5 / 8), (ROWS, "unit", 0.5 / 8)])
def test_products_of_one_grain_and_output_are_referenced_once(mask, grain, share):
    assert reference_share(LAYERS, {"masked.weight": mask}, grain) == pytest.approx(share)


def test_a_kernel_of_a_convolution_is_one_run():
    assert [run_length((4, 8, 3, 3), grain) for grain in ("fine", "vector", "kernel", "filter")] == [1, 3, 9, 72]
