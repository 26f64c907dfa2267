"""What removing units costs: the error of the prediction, block by block, and the density of each block under a budget."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from tasks.core.calibration import Calibration, predictions, relative_error
from tasks.core.cost import LayerCost
from tasks.core.denoiser import Denoiser
from tasks.core.progress import track
from tasks.mask_search.allocate import Option, allocate
from tasks.mask_search.masks import kept_count, unit_masks
from tasks.runtime.masks import HiddenUnits, apply_masks, hidden_units, remove_masks


def masked_error(denoiser: Denoiser, masks: Mapping[str, Tensor], calibration: Calibration, reference: Tensor) -> float:
    """Relative error of the prediction with the masks live; they are removed again."""
    apply_masks(denoiser.model, masks)
    error = relative_error(predictions(denoiser, calibration), reference)
    remove_masks(denoiser.model)
    return error


def unit_errors(denoiser: Denoiser, densities: Iterable[float], multiple: int, calibration: Calibration,
                reference: Tensor) -> dict[str, dict[float, float]]:
    """Block -> density -> relative error with that block alone masked. One forward over the calibration images each;
    densities that keep the same units (four heads know quarters only) share theirs."""
    blocks, densities = hidden_units(denoiser.model), sorted(densities)
    errors: dict[str, dict[float, float]] = {units.block: {} for units in blocks}
    measured = {(units.block, units.count): 0.0 for units in blocks}
    for units, density in track([(u, d) for u in blocks for d in densities], len(blocks) * len(densities), "sensitivity"):
        kept = units.block, kept_count(units, density, multiple)
        if kept not in measured:
            masks = unit_masks(denoiser.model, {units.block: density}, multiple)
            measured[kept] = masked_error(denoiser, masks, calibration, reference)
        errors[units.block][density] = measured[kept]
    return errors


def block_macs(units: HiddenUnits, costs: Sequence[LayerCost]) -> int:
    """MACs per image of what makes and reads a block's units, attention products too: all proportional to their number."""
    layers = {*units.producers, units.consumer, *units.products}
    return sum(cost.macs for cost in costs if cost.name in layers)


def unit_densities(denoiser: Denoiser, errors: Mapping[str, Mapping[float, float]], multiple: int, share: float,
                   costs: Sequence[LayerCost]) -> dict[str, float]:
    """Block -> kept share, at the least summed error that removes `share` of the MACs of all blocks together."""
    options, total = {}, 0
    for units in hidden_units(denoiser.model):
        macs = block_macs(units, costs)
        total += macs
        kept = {density: kept_count(units, density, multiple) for density in errors[units.block]}
        options[units.block] = [Option(1.0, 0.0, 0)] + [
            Option(density, error, macs * (units.count - kept[density]) // units.count)
            for density, error in errors[units.block].items()]
    return allocate(options, int(share * total))
