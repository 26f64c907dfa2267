"""What a recipe costs on the goal's target, as arithmetic: no candidate is sampled from to learn that it is too dear."""

import csv
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from tasks.core.cost import LayerCost, bitops, density, evaluations, size_bytes
from tasks.core.denoiser import Denoiser
from tasks.core.params import Goal
from tasks.core.recipe import Recipe

LATENCY_CLASSES = ("w8a8", "bf16", "fp32")  # fewer bits are no faster on a CPU; from the least accurate to the most
QUANTISABLE = ("linear", "conv")
WEIGHT_BITS = tuple(f"w{b}" for b in range(3, 9))
ACTIVATION_BITS = tuple(f"a{b}" for b in range(3, 9))
EDGES = {"dit": ("pos_embed.proj", "proj_out_2"), "unet": ("conv_in", "conv_out")}  # read the image, make the output

RecipeCost = Callable[[Recipe], float]  # less is better


@dataclass(frozen=True)
class Times:
    """The profile's additive model, as `tasks.core.latency` describes it: microseconds of one evaluation of a batch."""

    layers: Mapping[tuple[str, str], Sequence[tuple[float, float]]]  # (layer, precision) -> (density, time) by rising density
    remainders: Mapping[str, float]                                  # precision -> whole dense model less its layers
    changes: Mapping[frozenset[str], float] = field(default_factory=dict)  # two precisions -> time of a change

    def of(self, layer: str, precision: str, density: float = 1.0) -> float:
        """Between measured densities it is interpolated. A layer that was not profiled is in the remainder."""
        points = self.layers.get((layer, precision), ((1.0, 0.0),))
        return float(np.interp(density, *zip(*points, strict=True)))

    def remainder(self, tokens: Mapping[str, str]) -> float:
        """Mean of the precisions' remainders, weighted by the layers' times in fp32."""
        weights = [self.of(layer, "fp32") for layer in tokens]
        return float(np.average([self.remainders[token] for token in tokens.values()], weights=weights))

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
            tokens = {layer: next(turns) if kind in QUANTISABLE else "fp32" for layer, kind in kinds.items()}
            additive = sum(times.of(layer, token) for layer, token in tokens.items()) + times.remainder(tokens)
            count = sum(kind in QUANTISABLE for kind in kinds.values()) - 1
            changes[frozenset(name.split("+"))] = max(0.0, (time - additive) / count)
    return replace(times, changes=changes)


def token_of(row: Mapping[str, str]) -> str:
    return row["precision"].replace("int8", "w8a8")


def rows_of(path: Path, backend: str, batch: int) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    found = [row for row in rows if row["backend"] == backend and int(row["batch"]) == batch]
    if not found:
        offered = sorted({(row["backend"], int(row["batch"])) for row in rows})
        raise ValueError(f"{path}: nothing for evolve's backend {backend} and batch {batch}; it holds {offered}")
    return found


def latency(costs: Sequence[LayerCost], times: Times, dense: Recipe) -> RecipeCost:
    """Time over that of the dense recipe at fp32. A skipped sublayer saves its layers, nothing of the remainder
    and no change of precision."""
    time = functools.cache(times.of)
    layers = [c.name for c in costs if quantisable(c)]

    def of(recipe: Recipe) -> float:
        tokens = {c.name: recipe.precision.get(c.name, "fp32") for c in costs}
        computed = sum(time(c.name, tokens[c.name], density(c, recipe)) * evaluations(c, recipe) for c in costs)
        every_step = times.remainder(tokens) + times.changing([tokens[layer] for layer in layers])
        return computed + recipe.nfe * every_step

    whole = of(dense)
    return lambda recipe: of(recipe) / whole


def bitops_share(costs: Sequence[LayerCost], dense: Recipe) -> RecipeCost:
    whole = bitops(list(costs), dense)
    return lambda recipe: bitops(list(costs), recipe) / whole


def weights_bytes(costs: Sequence[LayerCost], parameters: int) -> RecipeCost:
    """parameters: all of the model; those of no counted layer (embeddings, norms) take 4 bytes each."""
    other = parameters - sum(c.weights for c in costs)

    def total(recipe: Recipe) -> float:
        return float(size_bytes(list(costs), recipe.precision, (recipe.sparsity or {}).get("density", {}), other))
    return total


def bound_of(goal: Goal) -> float:
    """The largest cost that meets the goal, in the unit of the functions above."""
    if goal.target == "latency":
        return 1 / goal.min_speedup
    return goal.max_bitops if goal.target == "bitops" else float(goal.max_size)


def quantisable(cost: LayerCost) -> bool:
    """Products of activations stay as they are."""
    return cost.kind in QUANTISABLE


def edges(denoiser: Denoiser) -> tuple[str, ...]:
    """The first and the last layer of the image's way through the network: many post-training schemes keep them at 8 bits."""
    return EDGES[denoiser.architecture]


def precision_menus(target: str, layers: Sequence[str], times: Times | None,
                    least: Mapping[str, int] = MappingProxyType({})) -> tuple[tuple[str, ...], ...]:
    """Choices of every gene, cheapest first. latency: one gene a layer, of `useful_classes`; else two genes a layer, bits of
    the weights and of the activations. least: layer -> its fewest bits, 3 where it is missing."""
    if target == "latency":
        return tuple(useful_classes(layer, times) for layer in layers)
    skipped = (least.get(layer, 3) - 3 for layer in layers)
    return tuple(menu[n:] for n in skipped for menu in (WEIGHT_BITS, ACTIVATION_BITS))


def useful_classes(layer: str, times: Times) -> tuple[str, ...]:
    """The classes that are faster than every more accurate one, and bf16 in any case: where all other layers are bf16 or int8,
    a layer that is itself fastest in fp32 would keep what is between them in fp32, too."""
    kept = ["fp32"]
    for token in (token for token in reversed(LATENCY_CLASSES[:-1]) if (layer, token) in times.layers):
        if token == "bf16" or times.of(layer, token) < times.of(layer, kept[0]):
            kept.append(token)
            kept.sort(key=lambda token: times.of(layer, token))
    return tuple(kept)
