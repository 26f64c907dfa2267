"""2:4 masks on the kernels that are faster for them: NVIDIA's semi-structured sparsity, compute capability 8.0 or later.

Shipped inside packages: imports torch alone. Converted weights are stored at half their size and multiplied by cuSPARSELt or
CUTLASS, whichever this torch has. Not covered: Conv2d (torch has no kernel), training through the converted weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

DTYPES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64  # CUTLASS's tile of 2-byte weights; cuSPARSELt's, 16 x 16, divides it


def supported(dtype: torch.dtype = torch.float16, device: str = "cuda") -> str | None:
    """None where a 2:4 product runs here and is right; else the reason why not. A small one is really multiplied."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    name = torch.cuda.get_device_name(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{name}: 2:4 kernels need compute capability 8.0, this is {torch.cuda.get_device_capability(device)}"
    try:
        weight = torch.tensor([0, 1, 0, 2], dtype=dtype, device=device).repeat(ROWS, COLUMNS // 4)
        product = nn.functional.linear(torch.ones(1, 8, COLUMNS, dtype=dtype, device=device), to_sparse_semi_structured(weight))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"{name}: {str(error).splitlines()[0]}"
    expected = 3 * COLUMNS / 4
    return None if (product == expected).all() else f"{name}: a 2:4 product gave {product.flatten()[0].item()}, not {expected}"


def misfit(layer: nn.Module, mask: Tensor) -> str | None:
    """Why the layer's weight cannot be converted under this mask, or None. mask: bool of its shape (out, in)."""
    if not isinstance(layer, nn.Linear):
        return f"{type(layer).__name__} has no 2:4 kernel"
    if layer.weight.dtype not in DTYPES:
        return f"{layer.weight.dtype} is neither float16 nor bfloat16"
    rows, columns = layer.weight.shape
    if rows % ROWS or columns % COLUMNS:
        return f"{rows} x {columns} is no multiple of {ROWS} x {COLUMNS}"
    most = mask.bool().view(rows, -1, 4).sum(2).max().item()
    return f"its mask keeps {most} of 4" if most > 2 else None


def misfits(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, str]:
    """Parameter name -> why it has to stay dense, of the masked parameters that cannot be converted."""
    found = {}
    for name, mask in masks.items():
        path, _, leaf = name.rpartition(".")
        reason = misfit(model.get_submodule(path), mask) if leaf == "weight" else "is no weight"
        if reason:
            found[name] = reason
    return found


@torch.no_grad()
def to_semi_structured(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, str]:
    """Make the masks permanent and convert the weights that fit, in place. -> parameter name -> why it stays dense.

    masks: parameter name -> bool of its shape, 2:4 along a Linear's inputs. model: fp16 or bf16, on the device that supports
    it, its inputs contiguous. Outputs are those of the masked dense model up to the rounding of another order of sums.
    Raises ValueError, before anything is changed, where the kernels do not run.
    """
    if reason := supported(torch.float16) or supported(torch.bfloat16):
        raise ValueError(f"2:4 kernels: {reason}")
    dense = misfits(model, masks)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        weight.masked_fill_(~mask.to(weight.device, torch.bool), 0)
        if name not in dense:
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.weight = nn.Parameter(to_sparse_semi_structured(weight.detach().contiguous()), requires_grad=False)
    return dense
