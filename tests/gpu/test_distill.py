"""Distillation that dies on one device goes on on another: `pytest -m gpu tests/gpu`."""

import pytest
import torch

from tasks.core.checkpoint import Checkpoint
from tests.unit.distill.test_distill_train import DyingCheckpoint, Killed
from tests.unit.distill.toy import distilled, tiny_dit

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("first, then", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize("method", ["fixed", "sr_ste"])
def test_a_checkpoint_is_of_no_device(first, then, method, tmp_path):
    undisturbed = distilled(tiny_dit(), "2:4", Checkpoint(tmp_path / "a", "k" * 16), method=method)
    teacher = tiny_dit()
    teacher.model.to(first)
    with pytest.raises(Killed):
        distilled(teacher, "2:4", DyingCheckpoint(tmp_path / "b", "k" * 16), method=method)
    teacher.model.to(then)
    student = distilled(teacher, "2:4", Checkpoint(tmp_path / "b", "k" * 16), method=method)
    assert {weight.device.type for weight in student.weights.values()} == {then}
    for name, weight in undisturbed.weights.items():
        torch.testing.assert_close(student.weights[name].cpu(), weight, rtol=0.02, atol=0.02)
