"""Which candidates are worth more images: those that could still reach the front, given how the first few were.

All candidates are compared on the same noise, so a difference of two is known far better than either: its standard error is
that of the differences of paired images. A candidate is promoted unless one that is no dearer is better by more than chance
would have it; it then keeps what its first images say of it, corrected by how these were for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rival:
    """A candidate that was seen on all images."""

    cost: float
    losses: np.ndarray  # (images,) of each image


@dataclass(frozen=True)
class Decision:
    promoted: bool
    loss: float  # over all images, as far as the first few and the rival tell


def decide(cost: float, losses: np.ndarray, front: Sequence[Rival], z: float) -> Decision:
    """losses: (n,) of the first n images. front: of those seen on all images, in any order. z: standard errors that count as
    more than chance; larger promotes more.

    The rival is the best of those that cost no more: to be off the front it is enough to be behind that one.
    """
    rivals = [rival for rival in front if rival.cost <= cost]
    if not rivals:
        return Decision(True, float(losses.mean()))
    rival = min(rivals, key=lambda rival: rival.losses.mean())
    behind = losses - rival.losses[: len(losses)]
    mean, error = behind.mean(), behind.std(ddof=1) / np.sqrt(len(behind))
    return Decision(bool(mean <= z * error), float(rival.losses.mean() + mean))


def with_rival(front: Sequence[Rival], new: Rival) -> list[Rival]:
    """The front with one more, and without those that are behind another one in both."""
    everyone = sorted([*front, new], key=lambda rival: (rival.cost, rival.losses.mean()))
    kept: list[Rival] = []
    for rival in everyone:
        if not kept or rival.losses.mean() < kept[-1].losses.mean():
            kept.append(rival)
    return kept
