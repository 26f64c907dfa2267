"""Timing that survives a noisy machine: cases take turns, every round starts with another one, medians are reported."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the table: `run()` makes `batch` images, or the share of the work that `scale` completes.

    scale: what the measured time is multiplied by; 1 when `run` is a whole sampling loop, NFE / timed steps otherwise.
    """

    variant: str
    backend: str
    batch: int
    run: Callable[[], object]
    scale: float = 1.0

    @property
    def key(self) -> str:
        return self.key_of(self.variant, self.backend, self.batch)

    @staticmethod
    def key_of(variant: str, backend: str, batch: int) -> str:
        return f"{variant}.{backend}.b{batch}"


def rounds(cases: Sequence[Case], clock: Callable[[], float] = time.perf_counter) -> Iterator[dict[str, float]]:
    """Endless rounds of {case key: seconds}. Round r starts at case r, so no case always follows the same neighbour
    at the same clock speed and cache state."""
    turn = 0
    while True:
        shift = turn % len(cases)
        yield {case.key: _seconds(case, clock) for case in (*cases[shift:], *cases[:shift])}
        turn += 1


def _seconds(case: Case, clock: Callable[[], float]) -> float:
    started = clock()
    case.run()
    return (clock() - started) * case.scale


def interleaved(cases: Sequence[Case], *, warmup: int, min_repeats: int, max_repeats: int, budget_s: float,
                clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of every case, by key, from `min_repeats` rounds on until `max_repeats` or the budget is spent.

    The first `warmup` rounds are run and thrown away (allocator, kernel selection, clock ramp-up); they do spend budget.
    """
    started = clock()
    times: dict[str, list[float]] = {case.key: [] for case in cases}
    for done, measured in enumerate(rounds(cases, clock), start=1 - warmup):
        if done > 0:
            for key, seconds in measured.items():
                times[key].append(seconds)
        if done >= max_repeats or (done >= min_repeats and clock() - started >= budget_s):
            return times
    raise AssertionError("rounds() is endless")


def summary(seconds: Sequence[float], batch: int) -> dict[str, float | int]:
    """Median throughput and latency of one case; latency is from the noise to the whole finished batch.

    spread: interquartile range over the median. The 95th percentile of few repeats is close to their maximum.
    """
    low, median, high, slow = np.percentile(np.asarray(seconds), [25, 50, 75, 95])
    return {"images_per_s": float(batch / median), "latency_ms_p50": float(1e3 * median),
            "latency_ms_p95": float(1e3 * slow), "spread": float((high - low) / median), "repeats": len(seconds)}
