"""Gram matrices within a bound: the same results for any bound, the memory that they take, and what does not fit, by name."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.core import disk
from tasks.core.calibration import chunk_of, noised
from tasks.core.denoiser import build
from tasks.mask_search import grams, stage
from tasks.mask_search.grams import (
    bounded_statistics,
    check_widths,
    fits,
    gram_bytes,
    groups,
    input_parts,
    input_rows,
    input_statistics,
)
from tasks.mask_search.saliency import reconstruct, saliency
from tests.unit.mask_search.test_mask_stage import PARAMS, artifacts, tiny

MIB = 1 << 20


class Fp64(TorchDispatchMode):
    """Bytes of the fp64 tensors that are alive at the same time, at their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.count(tensor.untyped_storage())
        return found

    def count(self, storage):
        if storage.data_ptr() in self.known:
            return
        self.known.add(storage.data_ptr())
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.forget, storage.data_ptr(), storage.nbytes())

    def forget(self, place, size):
        self.known.discard(place)
        self.alive -= size


@pytest.fixture(scope="module")
def wide():
    """A small image through wide layers: 12 convolutions of 576 to 1152 columns, 67 MiB of Gram matrices."""
    torch.manual_seed(0)
    made = build("UNet2DModel", {
        "sample_size": 4, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [64, 64],
        "norm_num_groups": 8, "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"]}, {"num_train_timesteps": 50})
    made.model.eval().requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def calibration(wide):
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)
    return noised(wide.schedule, images, None, 6, torch.Generator().manual_seed(0))


def convolutions(denoiser):
    return {name: layer for name, layer in denoiser.prunable_layers().items() if layer.weight[0].numel() >= 576}


def test_bytes_by_hand():
    assert gram_bytes((1, 512, 3, 3)) == (512 * 9) ** 2 * 8 == 162 * MIB
    assert gram_bytes((7, 100)) == 80_000
    shapes = {"a": (1, 256), "b": (1, 256), "c": (1, 256)}  # half a MiB each
    assert groups(shapes, 1) == [["a", "b"], ["c"]] and groups(shapes, 2) == [["a", "b", "c"]]
    assert fits({"a": (1, 256)}, 2) and fits({"a": (1, 256), "b": (1, 256)}, 2) and not fits(shapes, 2)


def test_a_layer_that_does_not_fit_is_named_from_shapes_alone():
    check_widths({"narrow": (8, 256), "wide": (8, 64, 3, 3)}, 8)  # 3 x 576^2 x 8 bytes = 7.6 MiB
    with pytest.raises(ValueError, match=r"mask_search.gram_mb: 7 is too little for wide, .* 576 inputs: 3 .* take 8 MiB"):
        check_widths({"narrow": (8, 256), "wide": (8, 64, 3, 3)}, 7)
    teacher = tiny("unet")
    teacher.model.to("meta")
    with pytest.raises(ValueError, match=r"gram_mb: 1 is too little for up_blocks.0.resnets.0.conv1"):
        stage.check_memory(teacher, replace(PARAMS, gram_mb=1))
    stage.check_memory(teacher, replace(PARAMS, gram_mb=2))  # 3 x (32 x 9)^2 x 8 bytes = 1.9 MiB


@pytest.mark.parametrize("mib", [32, 36, 200])
def test_statistics_are_bit_for_bit_those_of_one_pass(wide, calibration, mib, tmp_path):
    layers = convolutions(wide)
    whole, found = input_statistics(wide, calibration, layers), bounded_statistics(wide, calibration, layers, mib, tmp_path)
    assert list(found) == list(whole) and len(found) == len(whole) and "conv_in" not in found
    for name in whole:
        assert torch.equal(found[name].gram, whole[name].gram) and found[name].rows == whole[name].rows
    assert bool(list(tmp_path.iterdir())) == (mib < 200)


def test_memory_stays_below_the_bound_while_matrices_are_summed_and_used(wide, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(grams, "ENTRIES", 1 << 15)
    layers, mib = convolutions(wide), 34
    widest = max(layers, key=lambda name: gram_bytes(layers[name].weight.shape))
    weight = layers[widest].weight[:8].detach()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5

    def peak(statistics_of):
        with Fp64() as seen:
            statistics = statistics_of()[widest]
            saliency(weight, statistics, "second_order")
            reconstruct(weight, mask, statistics)
        return seen.peak

    before = peak(lambda: input_statistics(wide, calibration, layers))
    bounded = peak(lambda: bounded_statistics(wide, calibration, layers, mib, tmp_path))
    total = sum(gram_bytes(layer.weight.shape) for layer in layers.values())
    assert before > total > 60 * MIB
    assert bounded < (mib + 2) * MIB  # and one part of the unfolded inputs


def test_the_stage_writes_the_same_bytes_for_any_bound(tmp_path):
    inputs = artifacts(tmp_path, tiny("unet"))
    params = replace(PARAMS, saliency="second_order", densities=(0.5,), images=2, steps=2, inputs=4)
    written = []
    for mib in (2, 3, 64):  # eight parts, three, and all in memory
        out = tmp_path / str(mib)
        out.mkdir()
        report = stage.run(replace(params, gram_mb=mib), inputs, out)
        assert sorted(path.name for path in out.iterdir()) == ["choice.json", "density.csv", "masks.safetensors",
                                                               "weights.safetensors"]
        written.append((report, *(path.read_bytes() for path in sorted(out.iterdir()))))
    assert written[0] == written[1] == written[2]


def test_a_stage_whose_layers_are_too_wide_ends_before_it_samples(tmp_path, monkeypatch):
    inputs = artifacts(tmp_path, tiny("unet"))
    monkeypatch.setattr(stage.Trajectories, "of", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="mask_search.gram_mb: 1 is too little"):
        stage.run(replace(PARAMS, gram_mb=1), inputs, tmp_path)


def test_no_room_for_those_that_wait_is_told_before_anything_is_computed(wide, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 5 * MIB)
    monkeypatch.setattr(grams, "input_statistics", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"gram_mb: 34: \d+ MiB of Gram matrices have to wait on disk, .* 5 MiB free"):
        bounded_statistics(wide, calibration, convolutions(wide), 34, tmp_path)


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, (1, 3), stride=2, padding=(0, 2), dilation=2), nn.Conv2d(4, 3, 1),
    nn.Conv2d(4, 3, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1)), nn.Linear(6, 3)])
def test_parts_together_are_all_rows(layer, monkeypatch):
    """Against torch's own unfold of the whole, whose products with the weight another test compares with the layer."""
    x = torch.randn(10, 4, 9, 6)
    monkeypatch.setattr(grams, "ENTRIES", 60 * layer.weight[0].numel())
    parts = list(input_parts(layer, x))
    whole = x.flatten(0, -2) if isinstance(layer, nn.Linear) else nn.functional.unfold(
        x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2).flatten(0, 1)
    assert len(parts) > 2 and max(map(len, parts)) <= 60
    assert torch.equal(torch.cat(parts).sort(0).values, whole.sort(0).values)  # the rows in another order
    assert torch.equal(input_rows(layer, x), whole)


def test_fewer_large_images_are_evaluated_at_once():
    assert [chunk_of((3, side, side)) for side in (8, 32, 64, 128, 512)] == [64, 64, 16, 4, 1]
