"""How much each weight matters, from itself or from the inputs it meets, and the weights that stay made up for the others.

Inputs are those of the calibration images: X (rows, columns), one row a token or an output pixel, column j what column j of the
weight as a matrix (out, columns) reads; a Conv2d's columns run over (in, kh, kw). Of X its Gram matrix is kept alone.
Left out: the mask that changes while columns are swept (SparseGPT's): masks here come from one look, by `grain_mask`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.core.calibration import Calibration, predictions
from tasks.core.denoiser import Denoiser

KINDS = ("magnitude", "activation", "second_order")
DAMPING = 0.01  # of the Hessian's mean diagonal, SparseGPT's value: inputs that hardly vary would make it singular
IMAGES = 8      # unfolded at a time: a convolution's X is kh x kw times its input


@dataclass(frozen=True)
class Statistics:
    """Of one layer's inputs."""

    gram: Tensor  # (columns, columns) fp64, X^T X
    rows: int     # of X

    def norm(self) -> Tensor:
        """(columns,) l2 norm of each column of X."""
        return self.gram.diagonal().sqrt()

    def hessian(self) -> Tensor:
        """(columns, columns) H = X^T X + damping, of half the squared error of the layer's outputs in one row of weights."""
        level = DAMPING * self.gram.diagonal().mean().item()
        return self.gram + torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device) * (level or 1.0)


def saliency(weight: Tensor, statistics: Statistics | None, kind: str) -> Tensor:
    """Of each weight of a Linear or Conv2d, >= 0, of its shape and dtype; `grain_mask` makes masks of it.

    magnitude: |w|, needs no statistics. activation: |w| x norm of its input (Wanda, arXiv 2306.11695, equation 1).
    second_order: w^2 / [H^-1]_jj, the squared error of the outputs if w goes and the others of its row make up for it as well
    as they can (OBS; SparseGPT, arXiv 2301.00774, section 3). Raises ValueError for an unknown kind or missing statistics.
    """
    if kind not in KINDS:
        raise ValueError(f"saliency {kind!r} is none of {', '.join(KINDS)}")
    rows = weight.detach().flatten(1)
    if kind == "magnitude":
        found = rows.abs()
    elif statistics is None:
        raise ValueError(f"saliency {kind!r} needs the statistics of the layer's inputs, got none")
    elif kind == "activation":
        found = rows.abs() * statistics.norm().to(rows)
    else:
        found = (rows.double().square() / inverse(statistics.hessian()).diagonal()).to(rows)
    return found.view(weight.shape)


def inverse(hessian: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def reconstruct(weight: Tensor, mask: Tensor, statistics: Statistics) -> Tensor:
    """The weights w' that are zero outside the mask and give the layer's outputs best; of the weight's shape and dtype.

    Exact for each row: argmin (w - w')^T H (w - w'), so w'_K = w_K + H_KK^-1 H_KR w_R for the kept columns K and the removed
    R (SparseGPT, section 3.1, whose sweep over the columns approximates this). One solve for all rows of equal masks.
    """
    rows, hessian = weight.detach().flatten(1).double(), statistics.hessian()
    result = torch.zeros_like(rows)
    masks, owner = mask.bool().flatten(1).unique(dim=0, return_inverse=True)
    for i, keep in enumerate(masks):
        mine, kept, gone = (flags.nonzero().flatten() for flags in (owner == i, keep, ~keep))
        made_up = torch.linalg.solve(hessian[kept][:, kept], hessian[kept][:, gone] @ rows[mine][:, gone].T)
        result[mine[:, None], kept] = rows[mine][:, kept] + made_up.T
    return result.to(weight.dtype).view(weight.shape)


def made_up(model: nn.Module, masks: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    """Parameter name -> `reconstruct`ed weight, of the masked layers that have statistics; a bias, or a norm, stays masked."""
    layers = [name.removesuffix(".weight") for name, mask in masks.items() if name.endswith(".weight")]
    return {f"{layer}.weight": reconstruct(model.get_parameter(f"{layer}.weight"), masks[f"{layer}.weight"], statistics[layer])
            for layer in layers if layer in statistics}


def input_statistics(denoiser: Denoiser, calibration: Calibration, layers: Iterable[str]) -> dict[str, Statistics]:
    """Layer path -> statistics over the calibration images, all in one pass.

    Memory: columns^2 x 8 bytes for each layer. Raises ValueError for a path that is no Linear or Conv2d of the model, a grouped
    convolution, and a layer that no image reaches.
    """
    known, found = denoiser.prunable_layers(), {}
    for name in layers:
        if name not in known:
            raise ValueError(f"input statistics: {name} is no Linear or Conv2d of the model")
        if getattr(known[name], "groups", 1) != 1:
            raise ValueError(f"input statistics: {name} is a convolution in {known[name].groups} groups, expected 1")
        columns, device = known[name].weight[0].numel(), known[name].weight.device
        found[name] = [torch.zeros(columns, columns, dtype=torch.float64, device=device), 0]
    hooks = [known[name].register_forward_pre_hook(adder(total)) for name, total in found.items()]
    try:
        predictions(denoiser, calibration)
    finally:
        for hook in hooks:
            hook.remove()
    idle = [name for name, (_, rows) in found.items() if not rows]
    if idle:
        raise ValueError(f"input statistics: no calibration image reaches {', '.join(idle)}")
    return {name: Statistics(gram, rows) for name, (gram, rows) in found.items()}


def adder(total: list) -> Callable:
    """A hook that adds a layer's inputs to [gram, rows]."""
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for images in inputs[0].split(IMAGES):
            x = input_rows(module, images).double()
            total[0] += x.T @ x
            total[1] += len(x)
    return hook


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """X (rows, columns): the layer's output without its bias is X @ weight.flatten(1).T."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (N, columns, pixels)
    return patches.transpose(1, 2).flatten(0, 1)
