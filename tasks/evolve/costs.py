"""What a recipe costs on the goal's target, as arithmetic: no candidate is sampled from to learn that it is too dear."""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from tasks.core.cost import LayerCost, bitops_counter, density, evaluations, size_bytes
from tasks.core.denoiser import Denoiser
from tasks.core.latency import Times
from tasks.core.params import Goal
from tasks.core.recipe import Recipe
from tasks.runtime.cache import TRUNK

LATENCY_CLASSES = ("w8a8", "bf16", "fp32")  # fewer bits are no faster on a CPU; from the least accurate to the most
QUANTISABLE = ("linear", "conv")
WEIGHT_BITS = tuple(f"w{b}" for b in range(3, 9))
ACTIVATION_BITS = tuple(f"a{b}" for b in range(3, 9))
EDGES = {"dit": ("pos_embed.proj", "proj_out_2"), "unet": ("conv_in", "conv_out")}  # read the image, make the output

RecipeCost = Callable[[Recipe], float]  # less is better


def latency(costs: Sequence[LayerCost], times: Times, dense: Recipe) -> RecipeCost:
    """Time over that of the dense recipe at fp32. A skipped sublayer saves its layers, nothing of the remainder
    and no change of precision; a skipped trunk of these as large a share as it has of the layers."""
    time = functools.cache(times.of)
    layers = [c.name for c in costs if quantisable(c)]

    def of(recipe: Recipe) -> float:
        tokens = {c.name: recipe.precision.get(c.name, "fp32") for c in costs}
        computed = sum(time(c.name, tokens[c.name], density(c, recipe)) * evaluations(c, recipe) for c in costs)
        every_step = times.remainder(tokens) + times.changing([tokens[layer] for layer in layers])
        trunk = recipe.cache is not None and TRUNK in recipe.cache.sublayers
        steps = statistics.mean(evaluations(c, recipe) for c in costs) if trunk else recipe.nfe
        return computed + steps * every_step

    whole = of(dense)
    return lambda recipe: of(recipe) / whole


def bitops_share(costs: Sequence[LayerCost], dense: Recipe) -> RecipeCost:
    count = bitops_counter(costs)
    whole = count(dense)
    return lambda recipe: count(recipe) / whole


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
