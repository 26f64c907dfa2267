"""How certain a ratio of two timings is, and timing on while a verdict hangs on it.

Rounds are pairs: in each of them both variants run within moments of one another, so what slows the machine for a while slows
both, and their ratio of that round keeps. The interval is one of order statistics for the median of these ratios, whatever
their distribution is: each of n rounds falls below the true median with probability 1/2, so [r_(k), r_(n+1-k)] leaves it out
with probability 2 P(Bin(n, 1/2) < k) (the sign test turned round: David and Nagaraja, Order Statistics, 2003, section 7.1).
Few rounds have none: the true median lies outside of all that three rounds span one time in four. The table shows the ratio of
two medians, which need not be the median of the ratios: the interval is widened to hold it, where it does not.

Who looks at an interval again and again, and stops when he likes it, sees what he wants. So there are LOOKS looks at most, each
at an interval of error ERROR / LOOKS: with probability 1 - ERROR all of them hold together (Bonferroni), stopped anywhere. The
rule is the same on both sides of the bound. Timing goes on while the interval holds the bound, and ends when it lies above,
when it lies below, or when the time that was allowed is spent: then the verdict says that it is not certain.
Left out: rounds that depend on one another, as under a load that lasts longer than many rounds.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from tasks.benchmark.measure import Case, rounds

ERROR = 0.05  # of all looks together, both sides
LOOKS = 5     # the one after the rounds that every variant gets, and four more, each at twice the rounds


@dataclass(frozen=True)
class Question:
    """Whether `ours` is `bound` times as fast as `base`: keys of cases."""

    base: str
    ours: str
    bound: float

    def decided(self, times: Mapping[str, Sequence[float]]) -> bool:
        found = interval(times[self.base], times[self.ours])
        return found is not None and not found[0] <= self.bound <= found[1]


def interval(base: Sequence[float], ours: Sequence[float], error: float = ERROR / LOOKS) -> tuple[float, float] | None:
    """How many times as fast `ours` is as `base`, from seconds of the same rounds: (low, high) that leave the true median ratio
    out with probability `error` at most; None where the rounds are too few. Rounds that one of the two lacks do not count."""
    ratios = np.sort([b / o for b, o in zip(base, ours, strict=False)])
    below = int(binom.ppf(error / 2, len(ratios), 0.5))  # the least k with P(Bin <= k) >= error / 2, so P(Bin < k) is less
    if below < 1:
        return None
    of_medians = float(np.median(base) / np.median(ours))
    return min(float(ratios[below - 1]), of_medians), max(float(ratios[-below]), of_medians)


def rounds_needed(error: float = ERROR / LOOKS) -> int:
    """The fewest that have an interval."""
    return next(n for n in itertools.count(1) if binom.ppf(error / 2, n, 0.5) >= 1)


def settle(cases: Sequence[Case], times: Mapping[str, list[float]], questions: Sequence[Question], budget_s: float,
           clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """The times and those of further rounds, of the cases alone that an undecided question is about.

    times: seconds by case key, of rounds that all cases ran in. Each further look comes at twice the rounds; no round begins
    once budget_s is spent.
    """
    found, end = {key: list(seconds) for key, seconds in times.items()}, clock() + budget_s
    for _ in range(LOOKS - 1):
        concerned = {key for question in questions if not question.decided(found) for key in (question.base, question.ours)}
        turns = [case for case in cases if case.key in concerned]
        if not turns:
            break
        done, source = min(len(found[case.key]) for case in turns), rounds(turns, clock)
        for _ in range(max(done, rounds_needed() - done)):
            if clock() >= end:
                return found
            for key, seconds in next(source).items():
                found[key].append(seconds)
    return found
