"""Ours against every opponent at equal sublayer evaluations: paired distances, interpolated along our curve. Pure."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from tasks.core.quality import Difference, holm

LEAST = 0.02      # removed share below which a cell saves nothing that could be compared
DECIDED = 0.025   # p-value below which ours is nearer: an opponent has two chances, the first pairs and further ones


def distances(found: np.ndarray, uncached: np.ndarray) -> np.ndarray:
    """(N, D) features of the same seeds -> (N,) distance of every pair."""
    return np.linalg.norm(found - uncached, axis=1)


def at_share(curve: Sequence[tuple[float, np.ndarray]], removed: float) -> np.ndarray | None:
    """curve: (removed share, (N,) distances) of one arm's strengths -> (N,) at this share, pair by pair and linear between the
    two neighbours, from (0, no distance) on. None beyond the curve's end: nothing is extrapolated."""
    points = sorted([(0.0, np.zeros_like(curve[0][1])), *curve], key=lambda point: point[0])
    shares = [share for share, _ in points]
    if not 0 <= removed <= shares[-1]:
        return None
    above = int(np.searchsorted(shares, removed))
    if above == 0:
        return points[0][1]
    (low, near), (high, far) = points[above - 1], points[above]
    weight = (removed - low) / (high - low)
    return (1 - weight) * near + weight * far


def nearer(curve: Sequence[tuple[float, np.ndarray]], opponents: Mapping[str, tuple[float, np.ndarray]],
           batch: int) -> dict[str, tuple[float, float]]:
    """curve: ours; opponents: name -> (removed share, (N,) distances), all of the same pairs under one setting. batch: pairs
    that were sampled together.

    -> name -> mean distance of the opponent less ours at its share, in the distances' unit; p-value of "ours is as far or
    farther", Holm's, for the number of opponents. Left out: who removes next to nothing, or more than any of ours.
    """
    ours = {name: at_share(curve, removed) for name, (removed, _) in opponents.items() if removed >= LEAST}
    differences = {name: paired(found - opponents[name][1], batch) for name, found in ours.items() if found is not None}
    adjusted = holm({name: p_not_nearer(d, clusters=-(-len(curve[0][1]) // batch)) for name, d in differences.items()})
    return {name: (-d.estimate, adjusted[name]) for name, d in differences.items()}


def left_open(rows: Iterable[Mapping]) -> set[tuple[str, str]]:
    """rows: of results.csv. -> (teacher, variant) of opponents that the first pairs do not show ours to be nearer than."""
    return {(row["teacher"], row["variant"]) for row in rows
            if row["metric"] == "behind_p_holm" and float(row["value"]) >= DECIDED}


def paired(difference: np.ndarray, batch: int) -> Difference:
    """Mean of (N,) differences. Some caches decide for a whole batch at once, so only batches are independent: the error is
    that of their sums."""
    starts = np.arange(0, len(difference), batch)
    sums = np.add.reduceat(difference - difference.mean(), starts)
    scale = len(starts) / (len(starts) - 1)
    return Difference(float(difference.mean()), float(np.sqrt(scale * sums @ sums) / len(difference)))


def p_not_nearer(difference: Difference, clusters: int) -> float:
    """p-value of "ours less theirs is 0 or more", Student's t: there are few batches."""
    if difference.error == 0:
        return float(difference.estimate >= 0)
    return float(stats.t.cdf(difference.estimate / difference.error, clusters - 1))
