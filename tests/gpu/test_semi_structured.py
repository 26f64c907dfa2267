"""2:4 kernels compute what the masked dense model does: `pytest -m gpu tests/gpu`."""

import copy

import pytest
import torch
from torch import nn

from tasks.core.denoiser import build
from tasks.core.sparsity import nm_mask
from tasks.runtime.masks import apply_masks
from tasks.runtime.semi_structured import supported, to_semi_structured

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16]


def skip_unless_supported(dtype: torch.dtype) -> None:
    if reason := supported(dtype):
        pytest.skip(reason)


def two_four(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": nm_mask(layer.weight, 2, 4) for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer.in_features % 4 == 0}


def masked(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    dense = copy.deepcopy(model)
    apply_masks(dense, masks)
    return dense


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_whole_numbers_is_exact(dtype):
    skip_unless_supported(dtype)
    rng = torch.Generator().manual_seed(0)
    layer = nn.Linear(128, 64).to("cuda", dtype).requires_grad_(False)
    layer.weight.copy_(torch.randint(-3, 4, (64, 128), generator=rng))
    layer.bias.copy_(torch.randint(-3, 4, (64,), generator=rng))
    masks = {"weight": nm_mask(layer.weight, 2, 4)}
    x = torch.randint(-1, 2, (2, 5, 128), generator=rng).to("cuda", dtype)
    expected = masked(layer, masks)(x)
    assert to_semi_structured(nn.ModuleDict({"layer": layer}), {f"layer.{name}": mask for name, mask in masks.items()}) == {}
    assert type(layer.weight).__name__.startswith("SparseSemiStructured")
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dit_equals_its_masked_dense_self(dtype):
    skip_unless_supported(dtype)
    torch.manual_seed(0)
    denoiser = build("DiTTransformer2DModel", {
        "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 1, "out_channels": 1, "num_layers": 2,
        "sample_size": 28, "patch_size": 4, "num_embeds_ada_norm": 10, "norm_elementwise_affine": False,
        "norm_type": "ada_norm_zero"}, {"num_train_timesteps": 1000})
    model = denoiser.model.eval().requires_grad_(False).to("cuda", dtype)
    masks = two_four(model)
    expected = masked(model, masks)
    left = to_semi_structured(model, masks)
    assert set(left) == {"proj_out_2.weight"}  # 16 outputs
    x, t, labels = torch.randn(3, 1, 28, 28, device="cuda", dtype=dtype), torch.tensor([5, 500, 999]), torch.tensor([0, 1, 2])
    evaluate = [m(x, timestep=t.cuda(), class_labels=labels.cuda(), return_dict=False)[0].float() for m in (model, expected)]
    error = (evaluate[0] - evaluate[1]).norm() / evaluate[1].norm()
    assert error < {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
