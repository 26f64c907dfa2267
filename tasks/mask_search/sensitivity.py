"""What a cut costs in error: every grain and density that is offered, in every place, one at a time.

The error is that of images and not of predictions: how far a wrong prediction leads differs by timestep and by layer, and plans
of least summed error in predictions lead farther from the dense model's images than those of least error in images, on one of
two networks farther than one density for all (benchmarks/sparsity, "Blocks chosen one by one").
"""

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from tasks.core.calibration import chunk_of, relative_error
from tasks.core.denoiser import Denoiser, Schedule
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, sample, spaced_timesteps
from tasks.core.sparsity import grain_mask, grain_shape, parse_pattern
from tasks.mask_search.allocate import Cut, Option
from tasks.mask_search.choose import CostModel
from tasks.mask_search.masks import kept_count, unit_masks
from tasks.mask_search.saliency import Statistics, made_up
from tasks.runtime.masks import HiddenUnits, apply_masks, hidden_units, remove_masks
from tasks.runtime.solver import Predict

Errors = Mapping[tuple[tuple[str, ...], str], Mapping[float, float]]  # layers and grain -> density -> relative error


def unit_layers(units: HiddenUnits, counted: Container[str]) -> tuple[str, ...]:
    """Layers that make or read the units and the attention products between them: all proportional to their number.
    counted: names in the model's costs; a norm is not among them."""
    return tuple(name for name in (*units.producers, units.consumer, *units.products) if name in counted)


def unit_cuts(blocks: Mapping[tuple[str, ...], HiddenUnits], densities: Sequence[float], multiple: int) -> list[Cut]:
    """Of every block, at the shares of its units nearest to the densities. blocks: by their `unit_layers`."""
    cuts = []
    for layers, units in blocks.items():
        counts = {kept_count(units, density, multiple) for density in densities} - {units.count}
        cuts += [Cut(layers, "unit", count / units.count) for count in sorted(counts)]
    return cuts


def layer_cuts(layers: Mapping[str, nn.Module], grain: str, densities: Sequence[float]) -> list[Cut]:
    """Of every layer by itself, in whole grains. N:M has one density, its own."""
    return [Cut((name,), grain, density) for name, layer in layers.items()
            for density in grain_densities(tuple(layer.weight.shape), grain, densities)]


def grain_densities(shape: tuple[int, ...], grain: str, densities: Sequence[float]) -> list[float]:
    """Kept shares below 1 that a weight of that shape can have, nearest to the densities."""
    if ":" in grain:
        n, m = parse_pattern(grain)
        return [n / m]
    count = prod(shape) // prod(grain_shape(shape, grain))
    return sorted({max(1, round(density * count)) / count for density in densities} - {1.0})


def cut_masks(model: nn.Module, cuts: Iterable[Cut], score: Callable[[str], Tensor] | None = None) -> dict[str, Tensor]:
    """Masks of cuts that share no layer, by parameter name.

    score: layer path -> how much each weight of it matters (`saliency`), |w| by default; grains of the largest sum stay.
    Units go by |w|.
    """
    def magnitude(layer: str) -> Tensor:
        return model.get_parameter(f"{layer}.weight").detach().abs()

    matters = score or magnitude
    blocks = {units.consumer: units.block for units in hidden_units(model)}
    masks: dict[str, Tensor] = {}
    for cut in cuts:
        if cut.grain == "unit":
            masks |= unit_masks(model, {blocks[name]: cut.density for name in cut.layers if name in blocks})
        else:
            masks |= {f"{layer}.weight": grain_mask(matters(layer), cut.grain, cut.density) for layer in cut.layers}
    return masks


@dataclass(frozen=True)
class Trajectories:
    """Images that a network samples from fixed noise by DDIM, and how far another leads from them."""

    schedule: Schedule
    recipe: Recipe
    noise: Tensor          # (N, C, H, W)
    labels: Tensor | None  # (N,)
    images: Tensor         # (N, C, H, W), of the first network

    @classmethod
    def of(cls, denoiser: Denoiser, predict: Predict, steps: int, n: int, seed: int) -> "Trajectories":
        """Of `predict`, which is the denoiser's: n images of `steps` uniform steps, their noise drawn with the seed."""
        recipe = Recipe(timesteps=spaced_timesteps(denoiser.schedule, steps))
        noise, labels = initial_noise(denoiser.sample_shape, range(n), seed), labels_for(range(n), denoiser.num_classes)
        return cls(denoiser.schedule, recipe, noise, labels, sampled(predict, denoiser.schedule, recipe, noise, labels))

    def error(self, predict: Predict) -> float:
        """Mean square of what is different in images by `predict`, over the mean square of all: `relative_error`."""
        return relative_error(sampled(predict, self.schedule, self.recipe, self.noise, self.labels), self.images)


def sampled(predict: Predict, schedule: Schedule, recipe: Recipe, noise: Tensor, labels: Tensor | None) -> Tensor:
    """`sample` in chunks of bounded memory."""
    chunk = chunk_of(noise.shape[1:])
    parts = [slice(i, i + chunk) for i in range(0, len(noise), chunk)]
    return torch.cat([sample(predict, schedule, recipe, noise[s], None if labels is None else labels[s]) for s in parts])


def masked_error(denoiser: Denoiser, masks: Mapping[str, Tensor], error: Callable[[], float],
                 statistics: Mapping[str, Statistics] = MappingProxyType({})) -> float:
    """error(), of the denoiser as it then is, under the plan `masked`. The model is left as it was."""
    with masked(denoiser, masks, statistics):
        return error()


@contextlib.contextmanager
def masked(denoiser: Denoiser, masks: Mapping[str, Tensor],
           statistics: Mapping[str, Statistics] = MappingProxyType({})) -> Iterator[None]:
    """While open, the masks are live; in a layer that has statistics the weights that stay make up for the others."""
    weights = made_up(denoiser.model, masks, statistics)
    apply_masks(denoiser.model, masks)
    denoiser.model.load_state_dict(weights, strict=False)  # all of them masked, so they are put back, too
    try:
        yield
    finally:
        remove_masks(denoiser.model)


def cut_errors(denoiser: Denoiser, cuts: Sequence[Cut], error: Callable[[], float],
               statistics: Mapping[str, Statistics] = MappingProxyType({}),
               score: Callable[[str], Tensor] | None = None) -> Errors:
    """With each cut alone, as `masked_error`. score: as in `cut_masks`.

    With statistics where training starts from such weights: plain errors are large where the loss is easily made up for.
    """
    errors: dict[tuple[tuple[str, ...], str], dict[float, float]] = {}
    for cut in track(cuts, len(cuts), "sensitivity"):
        found = masked_error(denoiser, cut_masks(denoiser.model, [cut], score), error, statistics)
        errors.setdefault((cut.layers, cut.grain), {})[cut.density] = found
    return errors


def priced(cuts: Iterable[Cut], errors: Errors, model: CostModel) -> list[Option]:
    """The cuts with their error, between measured densities interpolated, and what they save."""
    return [Option(cut.layers, cut.grain, cut.density, error_at(errors[cut.layers, cut.grain], cut.density),
                   model.saved(cut.layers, cut.grain, cut.density)) for cut in cuts]


def error_at(measured: Mapping[float, float], density: float) -> float:
    """Nothing at density 1; the lowest measured below it."""
    return float(np.interp(density, *zip(*sorted({**measured, 1.0: 0.0}.items()), strict=True)))
