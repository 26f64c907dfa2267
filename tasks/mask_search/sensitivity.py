"""What a cut costs in error: every grain and density that is offered, in every place, one at a time."""

import contextlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType

import numpy as np
from torch import Tensor, nn

from tasks.core.calibration import Calibration, predictions, relative_error
from tasks.core.denoiser import Denoiser
from tasks.core.progress import track
from tasks.core.sparsity import grain_mask, grain_shape, parse_pattern
from tasks.mask_search.allocate import Cut, Option
from tasks.mask_search.choose import CostModel
from tasks.mask_search.masks import kept_count, unit_masks
from tasks.mask_search.saliency import Statistics, made_up
from tasks.runtime.masks import HiddenUnits, apply_masks, hidden_units, remove_masks

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


def cut_masks(model: nn.Module, cuts: Iterable[Cut]) -> dict[str, Tensor]:
    """Masks of cuts that share no layer, by parameter name; what stays has the largest |w| of its grain."""
    blocks = {units.consumer: units.block for units in hidden_units(model)}
    masks: dict[str, Tensor] = {}
    for cut in cuts:
        if cut.grain == "unit":
            masks |= unit_masks(model, {blocks[name]: cut.density for name in cut.layers if name in blocks})
        else:
            names = [f"{layer}.weight" for layer in cut.layers]
            masks |= {name: grain_mask(model.get_parameter(name).detach().abs(), cut.grain, cut.density) for name in names}
    return masks


def masked_error(denoiser: Denoiser, masks: Mapping[str, Tensor], calibration: Calibration, reference: Tensor,
                 statistics: Mapping[str, Statistics] = MappingProxyType({})) -> float:
    """Relative error of the prediction with the plan `masked`. The model is left as it was."""
    with masked(denoiser, masks, statistics):
        return relative_error(predictions(denoiser, calibration), reference)


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


def cut_errors(denoiser: Denoiser, cuts: Sequence[Cut], calibration: Calibration, reference: Tensor,
               statistics: Mapping[str, Statistics] = MappingProxyType({})) -> Errors:
    """With each cut alone, as `masked_error`. One forward over the calibration images each.

    With statistics where training starts from such weights: plain errors are large where the loss is easily made up for.
    """
    errors: dict[tuple[tuple[str, ...], str], dict[float, float]] = {}
    for cut in track(cuts, len(cuts), "sensitivity"):
        error = masked_error(denoiser, cut_masks(denoiser.model, [cut]), calibration, reference, statistics)
        errors.setdefault((cut.layers, cut.grain), {})[cut.density] = error
    return errors


def priced(cuts: Iterable[Cut], errors: Errors, model: CostModel) -> list[Option]:
    """The cuts with their error, between measured densities interpolated, and what they save."""
    return [Option(cut.layers, cut.grain, cut.density, error_at(errors[cut.layers, cut.grain], cut.density),
                   model.saved(cut.layers, cut.grain, cut.density)) for cut in cuts]


def error_at(measured: Mapping[float, float], density: float) -> float:
    """Nothing at density 1; the lowest measured below it."""
    return float(np.interp(density, *zip(*sorted({**measured, 1.0: 0.0}.items()), strict=True)))
