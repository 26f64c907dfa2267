"""How dense each block may stay: the least summed error that still removes enough (multiple-choice knapsack, exact)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    density: float  # kept share of the block's units
    error: float    # what it does to the prediction, alone
    removed: int    # what it takes away: MACs, or nanoseconds


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, float]:
    """Block -> density with sum(removed) >= budget and the least sum(error). Errors of blocks are taken as additive.

    Dynamic programming over the blocks; a state is an amount removed, counted up to the budget, and the cheapest way there.
    Raises ValueError if the options cannot remove the budget together.
    """
    states: dict[int, tuple[float, tuple[float, ...]]] = {0: (0.0, ())}
    for choices in options.values():
        grown: dict[int, tuple[float, tuple[float, ...]]] = {}
        for removed, (error, densities) in states.items():
            for option in choices:
                key = min(budget, removed + option.removed)
                state = (error + option.error, (*densities, option.density))
                grown[key] = min(state, grown.get(key, state))
        states = undominated(grown)
    if budget not in states:
        most = sum(max(option.removed for option in choices) for choices in options.values())
        raise ValueError(f"budget {budget}: the densities on offer remove {most} at most")
    return dict(zip(options, states[budget][1], strict=True))


def undominated(states: dict[int, tuple]) -> dict[int, tuple]:
    """Drop a state when another removes at least as much at no more error."""
    kept, least = {}, float("inf")
    for removed in sorted(states, reverse=True):
        if states[removed][0] < least:
            kept[removed], least = states[removed], states[removed][0]
    return kept
