"""Which grain pays on which target: arithmetic on what the masks keep, and the profile's times."""

from collections.abc import Mapping, Sequence

import pandas as pd

from tasks.core.cost import LayerCost
from tasks.core.latency import additive_latency

STORED_BITS = 8  # of a weight in a package, as a rule; at more bits the index of 2:4 weighs less
INDEX_BITS = {"2:4": 1, "unit": 0}  # per weight of a masked layer: a package stores one bit of mask, or a smaller layer


def macs_share(costs: Sequence[LayerCost], kept: Mapping[str, float]) -> float:
    """MACs against dense. kept: layer -> kept share of its weights, a missing layer is dense."""
    return sum(cost.macs * kept.get(cost.name, 1.0) for cost in costs) / sum(cost.macs for cost in costs)


def size_share(costs: Sequence[LayerCost], kept: Mapping[str, float], grain: str) -> float:
    """Bits of the weights of all Linear and Conv2d layers against dense, index included."""
    index = INDEX_BITS[grain] / STORED_BITS
    return sum(cost.weights * (kept[cost.name] + index if cost.name in kept else 1.0) for cost in costs) / sum(
        cost.weights for cost in costs)


def latency_share(table: pd.DataFrame, kept: Mapping[str, float], grain: str, backend: str, batch: int) -> float:
    """Time of one fp32 evaluation against dense. 2:4 saves what was measured: nothing where no kernel uses the pattern."""
    def microseconds(density: Mapping[str, float]) -> float:
        return additive_latency(table, {}, density, backend, batch, grain)
    return microseconds(kept) / microseconds({})


def choose(predicted: Mapping[str, Mapping[str, float]], target: str, min_gain: float) -> tuple[str, str]:
    """The grain with the least share of the dense model's cost on the target, and why; "none" if it gains too little.

    predicted: grain -> target (latency | bitops | size) -> cost against dense. The first grain wins a tie.
    """
    shares = {grain: measures[target] for grain, measures in predicted.items()}
    grain = min(shares, key=shares.get)
    account = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    if shares[grain] > 1 - min_gain:
        return "none", f"{target} against dense: {account}; none gains {min_gain:.0%}"
    return grain, f"{target} against dense: {account}"
