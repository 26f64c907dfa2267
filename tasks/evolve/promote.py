"""Which candidates are worth more images: those that could still reach the front, given how the first few were.

All candidates are compared on the same noise, so a difference of two is known far better than either: its standard error is
that of the differences of paired images. A candidate is promoted unless one that is no dearer is better by more than chance
would have it; it then keeps what its first images say of it, corrected by how these were for the other.

The worker decides, from what its item says of the rival: nothing is sent twice, and no other candidate waits. Who the rival is
depends on what was told when the candidate was asked, as the candidate itself does, and on nothing else.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.core.params import check_range
from tasks.core.quality import paired_distance


@dataclass(frozen=True, kw_only=True)
class Promotion:
    images: int   # that every candidate is seen on; 0: all of them, nobody is promoted
    z: float      # standard errors that count as more than chance; larger promotes more

    def __post_init__(self):
        check_range("evolve.promotion.images", self.images, 0, 100_000)
        check_range("evolve.promotion.z", self.z, 0, 100)


@dataclass(frozen=True)
class Rival:
    """A candidate that was seen on all images."""

    cost: float
    losses: np.ndarray  # (images,) of each image


@dataclass(frozen=True)
class Decision:
    promoted: bool
    loss: float  # over all images, as far as the first few and the rival tell


def rival_of(cost: float, front: Iterable[Rival]) -> Rival | None:
    """The best of those that cost no more: to be off the front it is enough to be behind that one."""
    return min((rival for rival in front if rival.cost <= cost), key=lambda rival: rival.losses.mean(), default=None)


def decide(losses: np.ndarray, rival: Rival | None, z: float) -> Decision:
    """losses: (n,) of the first n images."""
    if rival is None:
        return Decision(True, float(losses.mean()))
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


def image_losses(found: np.ndarray, references: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(n, D) features of a recipe's first n images, those of the dense teacher at 50 and at 100 steps -> (n,) whose mean is the
    recipe's distance, if all images were found."""
    return np.linalg.norm(found - references[0][: len(found)], axis=1) / paired_distance(references[1], references[0])


@dataclass(frozen=True)
class Heat:
    """What goes to a worker with a candidate."""

    how: Promotion
    cost: float
    rival: Rival | None
    references: tuple[np.ndarray, np.ndarray]

    def decide(self, losses: np.ndarray) -> Decision:
        """losses: of the first images, or of more."""
        return decide(losses[: self.how.images], self.rival, self.how.z)

    def promotes(self, found: np.ndarray) -> bool:
        """found: features of the first images."""
        return self.decide(image_losses(found, self.references)).promoted


class Contest:
    """The front of one search, as far as it was seen on all images. Candidates pass through it, and their losses."""

    def __init__(self, how: Promotion, references: tuple[np.ndarray, np.ndarray]):
        self.how, self.references = how, references
        self.front: list[Rival] = []
        self.heats: deque[Heat] = deque()  # of those asked and not told

    def asked(self, items: Iterable[tuple]) -> Iterator[tuple]:
        """items: (weights, recipe, cost) -> (weights, recipe, heat)."""
        for weights, recipe, cost in items:
            self.heats.append(Heat(self.how, cost, rival_of(cost, self.front), self.references))
            yield weights, recipe, self.heats[-1]

    def told(self, results: Iterable[Sequence[float] | None]) -> Iterator[float | None]:
        """results: losses of the images that were seen, in the order asked, None where an evaluation failed -> loss of each."""
        for result in results:
            heat = self.heats.popleft()
            if result is None:
                yield None
                continue
            losses = np.array(result)
            decision = heat.decide(losses)
            if decision.promoted:
                self.front = with_rival(self.front, Rival(heat.cost, losses))
            yield float(losses.mean()) if decision.promoted else decision.loss
