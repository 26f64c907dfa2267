"""Which points the study compares: who goes on, our fastest, and the fastest dull one that is as good. Pure."""

from collections.abc import Iterable, Mapping, Sequence

CLEARLY_WORSE = 1.5  # times the dense teacher's FID on as few samples: such a point is not judged on more


def nearest(distances: Mapping[str, float], kept: int) -> list[str]:
    """Names of the `kept` least distances, nearest first."""
    return sorted(distances, key=distances.get)[:kept]


def finalist(fids: Mapping[str, float], dense: float) -> str | None:
    """Of one number of steps, by FID on few samples: the best, if it is not clearly worse than dense."""
    best = min(fids, key=fids.get, default=None)
    return None if best is None or fids[best] > CLEARLY_WORSE * dense else best


def fastest(speeds: Mapping[str, float], names: Iterable[str]) -> str | None:
    """None where there is no name."""
    return max(names, key=lambda name: (speeds[name], name), default=None)


def our_fastest(speeds: Mapping[str, float], bounds: Mapping[str, float], margin: float) -> str | None:
    """Of those whose upper 95 % bound of the FID over dense is at most `margin`; where none is, the one of the least bound."""
    good = [name for name, bound in bounds.items() if bound <= margin]
    return fastest(speeds, good) or min(bounds, key=bounds.get, default=None)


def not_worse(lower: Mapping[str, float]) -> list[str]:
    """lower: 95 % lower bound of the relative FID over ours. Those that are not shown to be worse."""
    return [name for name, bound in lower.items() if bound <= 0]


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """points: name -> (images/s, FID). Names that no other is as fast and as good as, slowest first."""
    found: list[str] = []
    for name in sorted(points, key=lambda name: (-points[name][0], points[name][1])):
        if not found or points[name][1] < points[found[-1]][1]:
            found.append(name)
    return found[::-1]


def by_steps(names: Sequence[str], steps: Mapping[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(steps[name], []).append(name)
    return found
