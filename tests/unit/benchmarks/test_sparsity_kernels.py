"""What can be told of the timing of 2:4 kernels without a GPU."""

import pytest
import torch

from benchmarks.sparsity import kernels
from tests.unit.distill.toy import tiny_dit


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(kernels, "model_of", lambda name: tiny_dit())
    with pytest.raises(ValueError, match="2:4 kernels: no CUDA device"):
        next(kernels.measure("tiny", 1))


def test_both_prune_half_of_the_feed_forwards():
    teacher = tiny_dit()
    masks = kernels.masks_of(teacher)
    for grain, found in masks.items():
        inner = found["transformer_blocks.0.ff.net.2.weight"]
        assert inner.float().mean() == 0.5, grain
    assert kernels.macs_share(teacher, "2:4", masks["2:4"]) < kernels.macs_share(teacher, "unit", masks["unit"]) < 1
