"""Reorder hidden units so that N:M masks cost less: the function stays, the neighbours that compete for places change.

Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021 (ASP: arXiv 2104.08378). The columns of a layer and the rows
that make them move together, within a block alone: the hidden units of a feed-forward anywhere, value channels inside their
head, a resnet's channels inside their group of norm2, whose statistics do not see the order, or small groups as a whole.
Left out: the residual stream, whose order every block shares; the paper's escape from local optima by exhaustive search.
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


def permuted_order(saliency: Tensor, n: int, m: int, pool: int, together: int = 1) -> Tensor:
    """(count,) the order of the columns that greedy swaps reach: column i of the new weight is column order[i] of the old.

    saliency: (out, count, ...) >= 0, of the layer that reads the units. pool: columns swap inside `pool` consecutive ones only.
    together: that many consecutive columns move as one. Each swap is the one of all pairs that adds most to what N:M retains,
    until none adds; never less than at the start. Raises ValueError if a width does not divide the one above it.
    """
    count = saliency.shape[1]
    for wide, narrow in ((count, m), (count, pool), (pool, together), (m, together)):
        if wide % narrow:
            raise ValueError(f"permutation of {count} columns for {n}:{m}: {wide} is no multiple of {narrow}")
    rows = saliency.detach().transpose(0, 1).flatten(1).to(torch.float64, copy=True)  # (count, rows), swapped below
    parts = rows.view(-1, together, rows.shape[1])
    order, place = torch.arange(len(parts)), torch.arange(len(parts), device=parts.device)
    group, of = place * together // m, place * together // pool
    allowed = (group[:, None] != group) & (of[:, None] == of)
    if n < m and allowed.any():
        swap_greedily(parts, order, group, allowed, n, m)
    return (order[:, None] * together + torch.arange(together)).flatten()


def swap_greedily(parts: Tensor, order: Tensor, group: Tensor, allowed: Tensor, n: int, m: int) -> None:
    """Swap parts (count, together, rows), and their order (count,), in place. group: (count,); allowed: (count, count) bool."""
    kept, swapped = group_sums(parts, n, m), with_part(parts, torch.arange(len(parts), device=parts.device), n, m)
    while True:
        gain = swapped + swapped.T - kept[group][:, None] - kept[group]
        best, at = gain.masked_fill_(~allowed, -torch.inf).view(-1).max(0)
        if not best > LEAST_GAIN * kept.sum():  # so a NaN ends it, too
            return
        i, j = divmod(at.item(), len(parts))
        order[[i, j]], parts[[i, j]], swapped[:, [i, j]] = order[[j, i]], parts[[j, i]], swapped[:, [j, i]]
        changed = ((group == group[i]) | (group == group[j])).nonzero().flatten()
        swapped[changed] = with_part(parts, changed, n, m)
        kept[group[changed].unique()] = group_sums(parts[changed], n, m)


def group_sums(parts: Tensor, n: int, m: int) -> Tensor:
    """(count, together, rows) -> (groups,) what N:M retains of each m consecutive columns."""
    return parts.reshape(-1, m, parts.shape[2]).topk(n, 1)[0].sum((1, 2))


def with_part(parts: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """(len(places), count): what the group of places[p] would retain if part q stood in that place.

    Of single columns a row keeps the n - 1 largest of the m - 1 others, and the larger of the next one and the newcomer. The
    sum over the rows of max(a, b) = (a + b + |a - b|) / 2 is an l1 distance, so nothing of count x count x rows is ever held.
    """
    per = m // parts.shape[1]
    others = torch.arange(per - 1, device=places.device) + (places // per * per)[:, None]
    staying = parts[others + (others >= places[:, None])].flatten(1, 2)  # (places, m - together, rows)
    if parts.shape[1] > 1:
        return torch.stack([torch.cat([stay.expand(len(parts), -1, -1), parts], 1).topk(n, 1)[0].sum((1, 2))
                            for stay in staying])
    top, newcomers = staying.topk(n, 1)[0], parts[:, 0]
    last = top[:, -1]
    larger = (last.sum(1)[:, None] + newcomers.sum(1) + torch.cdist(last, newcomers, p=1)) / 2
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
        order = permuted_order(found, n, m, *freedom(units, m))
        if not torch.equal(order, torch.arange(units.count)):
            permute_units(model, units, order)
            orders[units.block] = order
    return orders


@torch.no_grad()
def permute_units(model: nn.Module, units: HiddenUnits, order: Tensor) -> None:
    """Reorder the units of one block in place, in all that makes and reads them; outputs stay, up to the order of sums.

    order: (count,) new place -> old. Of an attention the value channels move alone: what pairs queries with keys is the head.
    Raises ValueError if it is no permutation, parts a group of norm2, or takes a value out of its head.
    """
    place = torch.arange(units.count)
    if not torch.equal(order.sort()[0], place):
        raise ValueError(f"order of {units.block}: not a permutation of 0..{units.count - 1}")
    owner = order.view(-1, units.granule) // units.granule
    if not (owner == owner[:, :1]).all() or (units.products and not torch.equal(owner.flatten(), place // units.granule)):
        raise ValueError(f"order of {units.block}: units leave their head or group of {units.granule}")
    for path in units.producers[-1:] if units.products else units.producers:
        layer = model.get_submodule(path)
        rows = torch.cat([order + start for start in range(0, len(layer.weight), units.count)])
        layer.weight = selected(layer.weight, rows, dim=0)
        if layer.bias is not None:
            layer.bias = selected(layer.bias, rows, dim=0)
    consumer = model.get_submodule(units.consumer)
    consumer.weight = selected(consumer.weight, order, dim=1)


def freedom(units: HiddenUnits, m: int) -> tuple[int, int]:
    """Pool and together, as `permuted_order` takes them: what leaves the block's function as it is and may change an N:M mask.

    Groups of norm2 that are smaller than m trade places as a whole; inside larger ones their channels do.
    """
    if units.granule < m and m % units.granule == 0 and not units.products:
        return units.count, units.granule
    return units.granule, 1
