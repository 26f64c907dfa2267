"""What multi-fidelity promotion would have saved a search, and what it would have lost: a replay on every image's loss."""

from collections.abc import Sequence
from statistics import mean

from tasks.evolve.promote import Rival, decide, rival_of, with_rival
from tasks.evolve.search import Evaluation, hypervolume, pareto_front


def replay(stream: Sequence[Rival], few: int, z: float) -> dict[str, float]:
    """stream: candidates in the order in which they were asked, with the losses of all images.

    -> images_share: of the images that were evaluated; front_missed: share of the whole front that was not promoted;
    hypervolume_share: of the front of the promoted over the whole one, in the box of all.
    """
    front: list[Rival] = []
    promoted: list[Rival] = []
    for rival in stream:
        if decide(rival.losses[:few], rival_of(rival.cost, front), z).promoted:
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
