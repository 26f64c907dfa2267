"""What to prune, where and how far: the least summed error that saves enough, exact; and one density for all, the opponent."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

TOLERANCE = 1e-6  # relative, of the budget: what HiGHS counts as satisfied
VALUES = 1e3      # largest value that HiGHS sees: it stops within 1e-6 of the optimum, whatever the unit


@dataclass(frozen=True)
class Cut:
    layers: tuple[str, ...]  # pruned together: the one that a pattern is of, or all that make and read a block's units
    grain: str               # unit, N:M or one of tasks.core.sparsity.GRAINS
    density: float           # kept share of these layers' weights


@dataclass(frozen=True)
class Option(Cut):
    error: float  # of what it is judged by, made alone
    saved: float  # of the dense cost, in the unit of the budget


def allocate(options: Sequence[Option], budget: float) -> list[Option]:
    """The options, no layer in two of them, with sum(saved) >= budget and the least sum(error).

    A 0-1 programme, solved to optimality by HiGHS. Errors of layers are taken as additive.
    Raises ValueError with the nearest feasible budget if the options cannot save that much together.
    """
    most = ceiling(options)
    if budget > most * (1 + TOLERANCE):
        raise ValueError(f"budget {budget:g}: the options save {most:g} at most")
    if budget <= 0:
        return []
    share = np.array([option.saved for option in options]) / budget
    return select(options, [option.error for option in options], LinearConstraint(share[None], lb=1))


def ceiling(options: Sequence[Option]) -> float:
    """The most that the options save together, no layer in two of them."""
    return sum(option.saved for option in select(options, [-option.saved for option in options]))


def select(options: Sequence[Option], values: Sequence[float], *constraints: LinearConstraint) -> list[Option]:
    """The options with the least sum of values, no layer in two of them."""
    if not options:
        return []
    scaled = np.array(values) * (VALUES / (np.abs(values).max() or 1.0))
    layers = dict.fromkeys(layer for option in options for layer in option.layers)
    once = LinearConstraint(incidence(options, layers), lb=0, ub=1)
    found = milp(scaled, integrality=np.ones(len(options)), bounds=Bounds(0, 1), constraints=[once, *constraints],
                 options={"mip_rel_gap": 0})
    assert found.success, found.message
    return [option for option, taken in zip(options, found.x, strict=True) if taken > 0.5]


def incidence(options: Sequence[Option], layers: Iterable[str]) -> csr_array:
    """(layers, options), 1 where an option prunes a layer."""
    index = {layer: row for row, layer in enumerate(layers)}
    entries = [(index[layer], column) for column, option in enumerate(options) for layer in option.layers]
    rows, columns = zip(*entries, strict=True)
    return csr_array((np.ones(len(entries)), (rows, columns)), shape=(len(index), len(options)))


def uniform(offer: Callable[[float], Sequence[Option]], budget: float, lowest: float) -> list[Option] | None:
    """One density for all: the options at the highest density, in whole percent down to `lowest`, that save the budget.

    offer: a density -> the options of one grain in all its places. None if even the lowest does not save enough.
    """
    percents = (percent / 100 for percent in range(99, 0, -1) if percent / 100 > lowest)
    for density in (*percents, lowest):
        options = offer(density)
        if sum(option.saved for option in options) >= budget * (1 - TOLERANCE):
            return list(options)
    return None
