"""What pruning saves on each target, as arithmetic: MACs, stored bits, and the profile's times; and which grain pays."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path

from tasks.core.cost import LayerCost
from tasks.core.latency import read_times

STORED_BITS = 8  # of a weight in a package, as a rule; at more bits the index weighs less
MASK_BITS = 1    # per weight of a masked layer: a package stores one bit of mask, or for units a smaller layer and none


@dataclass(frozen=True)
class CostModel:
    counted: str                               # in one evaluation, in words
    whole: float                               # of the dense model
    price: Callable[[str, str, float], float]  # layer, grain, density -> its part, 0 of what is not counted (norms)

    # Exact sums: layers may come as a set, whose order is another one in every process.

    def dense(self, layers: Iterable[str]) -> float:
        return fsum(self.price(layer, "unit", 1.0) for layer in layers)

    def saved(self, layers: Iterable[str], grain: str, density: float) -> float:
        return fsum(self.price(layer, grain, 1.0) - self.price(layer, grain, density) for layer in layers)

    def share(self, kept: Mapping[str, float], grain: str) -> float:
        """Cost against dense. kept: layer -> kept share of its weights, a missing layer is dense."""
        return 1 - fsum(self.saved([layer], grain, density) for layer, density in kept.items()) / self.whole


def cost_models(costs: Sequence[LayerCost], profile: Path, backend: str, batch: int) -> dict[str, CostModel]:
    """One for each target of the goal. profile: the stage's folder."""
    return {"latency": latency_model(profile, backend, batch), "bitops": macs_model(costs), "size": storage_model(costs)}


def macs_model(costs: Sequence[LayerCost]) -> CostModel:
    """Attention products included; they shrink with the heads."""
    macs = {cost.name: cost.macs for cost in costs}
    return CostModel("MACs of an image", sum(macs.values()), lambda layer, _, density: macs.get(layer, 0) * density)


def storage_model(costs: Sequence[LayerCost]) -> CostModel:
    """Linear and Conv2d layers at STORED_BITS a weight, and the index of what stayed."""
    weights = {cost.name: cost.weights for cost in costs}

    def price(layer: str, grain: str, density: float) -> float:
        index = 0 if density == 1 or grain == "unit" else MASK_BITS
        return weights.get(layer, 0) * (STORED_BITS * density + index)

    return CostModel(f"bits at {STORED_BITS} a weight, index included", STORED_BITS * sum(weights.values()), price)


def latency_model(profile: Path, backend: str, batch: int) -> CostModel:
    """fp32. What was not timed, saves nothing: a grain without kernels, a layer outside the table."""
    times = functools.cache(functools.partial(read_times, profile, backend, batch))
    return CostModel(f"us of {batch} images on {backend}", times("unit").whole("fp32"),
                     lambda layer, grain, density: times(grain).of(layer, "fp32", density))


def choose(predicted: Mapping[str, Mapping[str, float]], target: str, min_gain: float) -> tuple[str, str]:
    """The grain with the least share of the dense model's cost on the target, and why; "none" if it gains too little.

    predicted: grain -> target (latency | bitops | size) -> cost against dense. The first grain wins a tie. Errors play no part:
    how much units save is what `unit_share` asks of them, and what a student loses is known after it is trained, not here.
    """
    shares = {grain: measures[target] for grain, measures in predicted.items()}
    grain = min(shares, key=shares.get)
    account = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    if shares[grain] > 1 - min_gain:
        return "none", f"{target} against dense: {account}; none gains {min_gain:.0%}"
    return grain, f"{target} against dense: {account}"
