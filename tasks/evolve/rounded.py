"""Integers whose rounding was learned, of the weights that a search compresses: for its workers, and for `package`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.progress import track
from tasks.runtime.precision import WIDTHS
from tasks.runtime.rounding import Batch, Rounding, learn_rounding, write_integers


def write_rounding(weights: Mapping[str, Denoiser], states: Mapping[str, Sequence[Batch]], how: Rounding,
                   checkpoint: Checkpoint, folder: Path) -> None:
    """weights, states: by file name; of each, states of its trajectories. Into folder/<file name>, for every width; a kill
    loses one width."""
    saved = checkpoint.load() or {}
    due = [(name, bits) for name in weights for bits in WIDTHS if f"{name} {bits}" not in saved]
    for name, bits in track(due, len(due), "evolve: learned rounding"):
        saved[f"{name} {bits}"] = learn_rounding(weights[name].model, bits, states[name], how)
        checkpoint.save(saved)
    folder.mkdir()
    for name in weights:
        write_integers({(layer, bits): q for bits in WIDTHS for layer, q in saved[f"{name} {bits}"].items()}, folder / name)
