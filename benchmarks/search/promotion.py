"""What multi-fidelity promotion would have saved a search, and what it would have lost: a replay on every image's loss."""

from collections.abc import Sequence
from statistics import mean

import numpy as np

from tasks.core.quality import paired_distance
from tasks.evolve.promote import Rival, decide, with_rival
from tasks.evolve.search import Evaluation, hypervolume, pareto_front


def image_losses(found: np.ndarray, references: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(images,) whose mean is the candidate's distance."""
    return np.linalg.norm(found - references[0], axis=1) / paired_distance(references[1], references[0])


def replay(stream: Sequence[Rival], few: int, z: float) -> dict[str, float]:
    """stream: candidates in the order in which they were asked, with the losses of all images.

    -> images_share: of the images that were evaluated; front_missed: share of the whole front that was not promoted;
    hypervolume_share: of the front of the promoted over the whole one, in the box of all.
    """
    front: list[Rival] = []
    promoted: list[Rival] = []
    for rival in stream:
        if decide(rival.cost, rival.losses[:few], front, z).promoted:
            promoted.append(rival)
            front = with_rival(front, rival)
    images = len(stream[0].losses)
    corner = max(rival.cost for rival in stream), max(rival.losses.mean() for rival in stream)
    whole, found = (as_told(part) for part in (stream, promoted))
    kept = {(e.cost, e.loss) for e in found}
    return {"images_share": (few * len(stream) + (images - few) * len(promoted)) / (images * len(stream)),
            "front_missed": mean((e.cost, e.loss) not in kept for e in pareto_front(whole)),
            "hypervolume_share": hypervolume(found, corner) / hypervolume(whole, corner)}


def as_told(rivals: Sequence[Rival]) -> list[Evaluation]:
    return [Evaluation(None, rival.cost, float(rival.losses.mean())) for rival in rivals]
