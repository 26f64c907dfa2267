"""What can be told of 2:4 kernels without a GPU; what they compute is in tests/gpu."""

import pytest
import torch
from torch import nn

from tasks.core.sparsity import nm_mask
from tasks.runtime.semi_structured import misfits, supported, to_semi_structured

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")


def layers() -> nn.Sequential:
    found = nn.Linear(64, 32), nn.Linear(64, 24), nn.Linear(32, 32), nn.Conv2d(64, 64, 3), nn.Linear(64, 64)
    return nn.Sequential(*found).half()


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: nm_mask(p, 2, 4) for name, p in model.named_parameters() if name.endswith("weight")}


@needs_no_gpu
def test_the_probe_says_why_not():
    assert supported() == supported(torch.bfloat16) == "no CUDA device"


@needs_no_gpu
def test_without_kernels_nothing_is_changed():
    model = layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="2:4 kernels: no CUDA device"):
        to_semi_structured(model, masks(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_that_do_not_fit_are_named():
    model = layers()
    given = masks(model)
    given["4.weight"] = nm_mask(model[4].weight, 3, 4)
    given["0.bias"] = torch.ones(32, dtype=torch.bool)
    assert misfits(model, given) == {
        "1.weight": "24 x 64 is no multiple of 32 x 64", "2.weight": "32 x 32 is no multiple of 32 x 64",
        "3.weight": "Conv2d has no 2:4 kernel", "4.weight": "its mask keeps 3 of 4", "0.bias": "is no weight"}
    model.float()
    assert misfits(model, {"0.weight": given["0.weight"]}) == {"0.weight": "torch.float32 is neither float16 nor bfloat16"}
