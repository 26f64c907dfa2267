"""From features and seconds to the study's answers: our gain over the dull front, composition, effects. -> metric -> value."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.front.factorial import effects, intervals, resampled_medians
from benchmarks.front.points import Point
from benchmarks.front.selection import fastest, not_worse, our_fastest
from tasks.benchmark.certain import interval
from tasks.benchmark.measure import Case
from tasks.core.quality import NORMAL_95, Difference

RESAMPLES = 1000  # of rounds
ERROR = 0.05      # of an interval of a ratio of times

Over = Callable[[str, str], Difference]  # relative FID of one point over another's, paired
Times = Mapping[str, Sequence[float]]    # `Case.key` -> seconds of every round


def speeds(times: Times, batch: int) -> dict[str, float]:
    """Point -> images/s, of the median round."""
    found = {}
    for key, seconds in times.items():
        name, _, of = key.rsplit(".", 2)
        if of == f"b{batch}":
            found[name] = float(batch / np.median(seconds))
    return found


def gain(bounds: Mapping[str, float], dull: Mapping[str, Point], margin: float, over: Over, times: Times,
         batch: int) -> tuple[str, str, dict[str, float], dict[str, Difference]] | None:
    """bounds: of our points, 95 % bounds of the FID over dense. dull: those judged on as many samples.

    -> our fastest, the fastest dull point that is not shown to be worse, the ratio of their images/s; every dull point's FID
    over ours. Where all are worse, the least bad one stands for them. None where nothing of the two was timed.
    """
    found = speeds(times, batch)
    ours = our_fastest(found, {name: bound for name, bound in bounds.items() if name in found}, margin)
    there = [name for name in dull if name in found]
    if ours is None or not there:
        return None
    differences = {name: over(name, ours) for name in there}
    lower = {name: lower95(d) for name, d in differences.items()}
    best = fastest(found, not_worse(lower)) or min(lower, key=lower.get)
    seconds = [times[Case.key_of(name, "openvino", batch)] for name in (best, ours)]
    numbers = {f"gain_over_dull_b{batch}": found[ours] / found[best]}
    if (sure := interval(*seconds, error=ERROR)) is not None:
        numbers |= {f"gain_over_dull_b{batch}_low95": sure[0], f"gain_over_dull_b{batch}_high95": sure[1]}
    return ours, best, numbers, differences


def lower95(found: Difference) -> float:
    return found.estimate - NORMAL_95 * found.error


def speed_effects(times: Times, points: Sequence[Point], factors: Sequence[str],
                  batch: int) -> dict[str, tuple[float, float, float]]:
    """On log images/s, intervals over rounds."""
    seconds = np.array([times[Case.key_of(point.name, point.backend, batch)] for point in points]).T
    drawn = resampled_medians(seconds, RESAMPLES, np.random.default_rng(0))
    return intervals(effects(-np.log(np.median(seconds, axis=0)), factors), effects(-np.log(drawn), factors))


def quality_effects(fids: Sequence[float], drawn: Sequence[np.ndarray],
                    factors: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """On log FID. drawn: (B,) of every package, of the same resamples of samples and real images."""
    return intervals(effects(np.log(np.array(fids)), factors), effects(np.log(np.array(drawn)).T, factors))
