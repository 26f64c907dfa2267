"""Reorder hidden units so that N:M masks cost less: the function stays, the neighbours that compete for places change.

Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021 (ASP: arXiv 2104.08378). The columns of a layer and the rows
that make them move together, within a block alone: the hidden units of a feed-forward anywhere, value channels inside their
head, a resnet's channels inside their group of norm2, whose statistics do not see the order.
Left out: the residual stream, whose order every block shares; whole heads and groups (worth it where M is above their size);
the paper's escape from local optima by exhaustive search over pairs of groups.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tasks.core.sparsity import nm_mask
from tasks.runtime.masks import HiddenUnits, hidden_units, selected

LEAST_GAIN = 1e-9  # of what is retained: below it a swap may be rounding, and the search would not end


def retained(saliency: Tensor, n: int, m: int) -> float:
    """Sum of the saliency (out, in, ...) that an N:M mask keeps."""
    return saliency[nm_mask(saliency, n, m)].double().sum().item()


def permuted_order(saliency: Tensor, n: int, m: int, pool: int) -> Tensor:
    """(count,) the order of the columns that greedy swaps reach: column i of the new weight is column order[i] of the old.

    saliency: (out, count, ...) >= 0, of the layer that reads the units. pool: columns swap inside `pool` consecutive ones only.
    Each swap is the one of all pairs that adds most to what N:M retains, until none adds; never less than at the start.
    Raises ValueError if count is no multiple of m or of pool.
    """
    count = saliency.shape[1]
    for width in (m, pool):
        if count % width:
            raise ValueError(f"permutation: {count} columns are no multiple of {width}")
    columns = saliency.detach().transpose(0, 1).flatten(1).to(torch.float64, copy=True)  # (count, rows), swapped below
    order, place = torch.arange(count), torch.arange(count, device=columns.device)
    group, of = place // m, place // pool
    allowed = (group[:, None] != group) & (of[:, None] == of)
    if n == m or not allowed.any():
        return order
    kept = group_sums(columns, n, m)
    swapped = with_column(columns, place, n, m)
    while True:
        gain = swapped + swapped.T - kept[group][:, None] - kept[group]
        best, at = gain.masked_fill_(~allowed, -torch.inf).view(-1).max(0)
        if best <= LEAST_GAIN * kept.sum():
            return order
        i, j = divmod(at.item(), count)
        order[[i, j]], columns[[i, j]], swapped[:, [i, j]] = order[[j, i]], columns[[j, i]], swapped[:, [j, i]]
        changed = ((group == group[i]) | (group == group[j])).nonzero().flatten()
        swapped[changed] = with_column(columns, changed, n, m)
        kept[group[changed[::m]]] = group_sums(columns[changed], n, m)


def group_sums(columns: Tensor, n: int, m: int) -> Tensor:
    """(count, rows) -> (count / m,) what N:M retains of each group of columns."""
    return columns.view(-1, m, columns.shape[1]).topk(n, 1)[0].sum((1, 2))


def with_column(columns: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """(len(places), count): what the group of places[p] would retain if column q stood in that place.

    A row keeps the n - 1 largest of the m - 1 others, and the larger of the next one and the newcomer; the sum over the rows of
    max(a, b) = (a + b + |a - b|) / 2 is an l1 distance, so nothing of count x count x rows is ever held.
    """
    first = places // m * m
    others = torch.arange(m - 1, device=places.device) + first[:, None]
    others = others + (others >= places[:, None])
    top = columns[others].topk(n, 1)[0]  # (places, n, rows)
    last = top[:, -1]
    larger = (last.sum(1)[:, None] + columns.sum(1) + torch.cdist(last, columns, p=1)) / 2
    return top[:, :-1].sum((1, 2))[:, None] + larger


def permute_model(model: nn.Module, n: int, m: int, saliencies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Permute, in place, every block whose reading layer has a saliency and fits N:M. -> block -> order, of those that changed.

    saliencies: layer path -> saliency of its weight as it is before. Statistics of inputs are to be taken again afterwards.
    """
    orders = {}
    for units in hidden_units(model):
        found = saliencies.get(units.consumer)
        if found is None or units.count % m:
            continue
        order = permuted_order(found, n, m, pool_of(units))
        if not torch.equal(order, torch.arange(units.count)):
            permute_units(model, units, order)
            orders[units.block] = order
    return orders


@torch.no_grad()
def permute_units(model: nn.Module, units: HiddenUnits, order: Tensor) -> None:
    """Reorder the units of one block in place, in all that makes and reads them; outputs stay, up to the order of sums.

    order: (count,) new place -> old. Of an attention the value channels move alone: what pairs queries with keys is the head.
    Raises ValueError if it is no permutation, or takes a unit out of its head or group.
    """
    order = order.to(torch.int64)
    if not torch.equal(order.sort()[0], torch.arange(units.count, device=order.device)):
        raise ValueError(f"order of {units.block}: not a permutation of 0..{units.count - 1}")
    pool = pool_of(units)
    if not torch.equal(order // pool, torch.arange(units.count, device=order.device) // pool):
        raise ValueError(f"order of {units.block}: units leave their head or group of {pool}")
    for path in units.producers[-1:] if units.products else units.producers:
        layer = model.get_submodule(path)
        rows = torch.cat([order + start for start in range(0, len(layer.weight), units.count)])
        layer.weight = selected(layer.weight, rows, dim=0)
        if layer.bias is not None:
            layer.bias = selected(layer.bias, rows, dim=0)
    consumer = model.get_submodule(units.consumer)
    consumer.weight = selected(consumer.weight, order, dim=1)


def pool_of(units: HiddenUnits) -> int:
    """How many consecutive units may trade places: those of a head or a group of norm2, or all of a feed-forward."""
    return units.granule if units.granule > 1 or units.products else units.count
