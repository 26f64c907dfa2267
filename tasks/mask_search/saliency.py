"""How much each weight matters, from itself or from the inputs it meets, and the weights that stay made up for the others.

Inputs are those of the calibration images: X (rows, columns), one row a token or an output pixel, column j what column j of the
weight as a matrix (out, columns) reads; a Conv2d's columns run over (in, kh, kw). Of X its Gram matrix is kept alone
(`tasks/mask_search/grams.py`); work on one layer takes the room of two more of its size at most.
Left out: the mask that changes while columns are swept (SparseGPT's): masks here come from one look, by `grain_mask`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

KINDS = ("magnitude", "activation", "second_order")
DAMPING = 0.01  # of the Hessian's mean diagonal, SparseGPT's value: inputs that hardly vary would make it singular


@dataclass(frozen=True)
class Statistics:
    """Of one layer's inputs."""

    gram: Tensor  # (columns, columns) fp64, X^T X
    rows: int     # of X

    def norm(self) -> Tensor:
        """(columns,) l2 norm of each column of X."""
        return self.gram.diagonal().sqrt()

    def hessian(self, among: Tensor | None = None) -> Tensor:
        """(columns, columns) H = X^T X + damping, of half the squared error of the layer's outputs in one row of weights.
        among: (k,) indices of some columns, for that part of H alone."""
        part = self.gram.clone() if among is None else self.gram[among[:, None], among]
        part.diagonal().add_(DAMPING * self.gram.diagonal().mean().item() or 1.0)
        return part


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
        factor = torch.linalg.cholesky(statistics.hessian())
        found = (rows.double().square() / torch.cholesky_inverse(factor).diagonal()).to(rows)
    return found.view(weight.shape)


def reconstruct(weight: Tensor, mask: Tensor, statistics: Statistics) -> Tensor:
    """The weights w' that are zero outside the mask and give the layer's outputs best; of the weight's shape and dtype.

    Exact for each row: argmin (w - w')^T H (w - w'), so w'_K = w_K + H_KK^-1 H_KR w_R for the kept columns K and the removed
    R (SparseGPT, section 3.1, whose sweep over the columns approximates this). One solve for all rows of equal masks.
    """
    rows, masks = weight.detach().flatten(1).double(), mask.bool().flatten(1)
    result = torch.zeros_like(rows)
    kinds, owner = masks.unique(dim=0, return_inverse=True)
    for i, keep in enumerate(kinds):
        mine, kept, gone = (flags.nonzero().flatten() for flags in (owner == i, keep, ~keep))
        result[mine[:, None], kept] = rows[mine][:, kept]
        if len(kept) and len(gone):
            pull = statistics.gram[kept[:, None], gone] @ rows[mine][:, gone].T
            result[mine[:, None], kept] += torch.linalg.solve(statistics.hessian(kept), pull).T
    return result.to(weight.dtype).view(weight.shape)


def made_up(model: nn.Module, masks: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    """Parameter name -> `reconstruct`ed weight, of the masked layers that have statistics; a bias, or a norm, stays masked."""
    names = [name for name in masks if name.endswith(".weight") and name.removesuffix(".weight") in statistics]
    return {name: masked_rows(model.get_parameter(name), masks[name]) if by_rows(masks[name]) else
            reconstruct(model.get_parameter(name), masks[name], statistics[name.removesuffix(".weight")]) for name in names}


def by_rows(mask: Tensor) -> bool:
    """Whether each row stays or goes whole: nothing is left that could make up for what went, whatever the inputs are."""
    rows = mask.bool().flatten(1)
    return bool((rows.any(1) == rows.all(1)).all())


def masked_rows(weight: Tensor, mask: Tensor) -> Tensor:
    return weight.detach().masked_fill(~mask.bool(), 0)
