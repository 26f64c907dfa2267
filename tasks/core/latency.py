"""The profile's table as an additive model of time: layers at their precision and density, and the remainder.

time(plan) = sum over layers of time(layer, precision, density) + remainder + changes of precision. A precision's remainder is
its whole dense model minus its layers (norms, softmax, sums, calls), so the model is exact wherever one precision is used
throughout; a mixed plan takes the mean of the remainders, weighted by its layers' time in fp32.
"""

import csv
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tasks.core.recipe import bits

TURNING = ("linear", "conv")  # kinds of layers that take turns in a whole model of two precisions


@dataclass(frozen=True)
class Times:
    """Microseconds of one evaluation of a batch."""

    layers: Mapping[tuple[str, str], Sequence[tuple[float, float]]]  # (layer, precision) -> (density, time) by rising density
    remainders: Mapping[str, float]                                  # precision -> whole dense model less its layers
    changes: Mapping[frozenset[str], float] = field(default_factory=dict)  # two precisions -> time of a change

    def of(self, layer: str, precision: str, density: float = 1.0) -> float:
        """Between measured densities it is interpolated, below the lowest it stays. A layer that was not profiled is in the
        remainder."""
        points = self.layers.get((layer, timed_as(precision)), ((1.0, 0.0),))
        return float(np.interp(density, *zip(*points, strict=True)))

    def whole(self, precision: str) -> float:
        """The dense model at one precision."""
        return self.remainders[precision] + sum(points[-1][1] for (_, at), points in self.layers.items() if at == precision)

    def remainder(self, tokens: Mapping[str, str]) -> float:
        """Mean of the precisions' remainders, weighted by the layers' times in fp32."""
        weights = [self.of(layer, "fp32") for layer in tokens]
        return float(np.average([self.remainders[timed_as(token)] for token in tokens.values()], weights=weights))

    def changing(self, tokens: Sequence[str]) -> float:
        """What the changes of precision from each layer to the next take together. One fp32 layer makes all that is between
        the layers run in fp32 (`tasks.runtime.graph.rest_precision`): then each bf16 layer is a change there and back."""
        if "fp32" in tokens:
            tokens = [part for token in tokens for part in (("fp32", token, "fp32") if token == "bf16" else (token,))]
        return sum(self.changes.get(frozenset(pair), 0.0) for pair in itertools.pairwise(tokens))


def read_times(folder: Path, backend: str, batch: int, grain: str | None) -> Times:
    """From the profile's layers.csv and model.csv. grain: how the weights went that are gone, unit | 2:4, None: none are."""
    layers: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows_of(folder / "layers.csv", backend, batch):
        if row["grain"] in ("dense", grain):
            layers[row["layer"], token_of(row)].append((float(row["density"]), float(row["time_us"])))
    whole = {token_of(row): float(row["time_us"]) for row in rows_of(folder / "model.csv", backend, batch)}
    by_density = {key: sorted(points) for key, points in layers.items()}
    remainders = {token: time - sum(points[-1][1] for (_, of), points in by_density.items() if of == token)
                  for token, time in whole.items() if "+" not in token}
    kinds = {row["layer"]: row["kind"] for row in rows_of(folder / "layers.csv", backend, batch)}
    return with_changes(Times(by_density, remainders), whole, kinds)


def with_changes(times: Times, whole: Mapping[str, float], kinds: Mapping[str, str]) -> Times:
    """What a change costs: the time of a model whose layers take turns, less what the additive model says of it.

    whole: times of whole models, those of `w8a8+bf16` among them. kinds: of layers and products, in the order of their calls.
    """
    changes = {}
    for name, time in whole.items():
        if "+" in name:
            turns = itertools.cycle(name.split("+"))
            tokens = {layer: next(turns) if kind in TURNING else "fp32" for layer, kind in kinds.items()}
            additive = sum(times.of(layer, token) for layer, token in tokens.items()) + times.remainder(tokens)
            count = sum(kind in TURNING for kind in kinds.values()) - 1
            changes[frozenset(name.split("+"))] = max(0.0, (time - additive) / count)
    return replace(times, changes=changes)


def token_of(row: Mapping[str, str]) -> str:
    return row["precision"].replace("int8", "w8a8")


def timed_as(token: str) -> str:
    """Every integer width takes the time of 8 bits on hardware that has no other."""
    return "w8a8" if bits(token)[0] <= 8 else token


def rows_of(path: Path, backend: str, batch: int) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    found = [row for row in rows if row["backend"] == backend and int(row["batch"]) == batch]
    if not found:
        offered = sorted({(row["backend"], int(row["batch"])) for row in rows})
        raise ValueError(f"{path}: nothing for backend {backend} at batch {batch}; it holds {offered}")
    return found
