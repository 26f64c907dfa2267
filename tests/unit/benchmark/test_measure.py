"""Turn taking, budgets and percentiles, on a clock that moves only when a case runs."""

import pytest

from tasks.benchmark.measure import Case, interleaved, summary


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def cases_on(clock, order, **seconds):
    def case(name, duration, scale=1.0):
        def run():
            order.append(name)
            clock.now += duration
        return Case(variant=name, backend="eager", batch=2, run=run, scale=scale)
    return [case(name, *(s if isinstance(s, tuple) else (s,))) for name, s in seconds.items()]


def test_every_round_starts_with_another_case():
    clock, order = Clock(), []
    interleaved(cases_on(clock, order, a=1, b=1, c=1), warmup=0, min_repeats=3, max_repeats=3, budget_s=0, clock=clock)
    assert "".join(order) == "abc" "bca" "cab"


def test_warm_up_rounds_are_run_and_thrown_away():
    clock, order = Clock(), []
    times = interleaved(cases_on(clock, order, a=1), warmup=2, min_repeats=3, max_repeats=3, budget_s=100, clock=clock)
    assert len(order) == 5 and times == {"a.eager.b2": [1, 1, 1]}


@pytest.mark.parametrize("budget, rounds", [(0, 2), (5, 3), (7, 4), (1000, 6)])
def test_rounds_stop_at_the_budget_between_the_least_and_the_most(budget, rounds):
    clock = Clock()
    times = interleaved(cases_on(clock, [], a=1.5, b=0.5), warmup=0, min_repeats=2, max_repeats=6, budget_s=budget, clock=clock)
    assert [len(t) for t in times.values()] == [rounds, rounds]


def test_a_partly_timed_loop_is_scaled_to_the_whole():
    clock = Clock()
    times = interleaved(cases_on(clock, [], a=(2.0, 2.5)), warmup=0, min_repeats=1, max_repeats=1, budget_s=0, clock=clock)
    assert times == {"a.eager.b2": [5.0]}


def test_summary_by_hand():
    assert summary([0.1, 0.2, 0.3, 0.4, 0.5], batch=6) == pytest.approx(
        {"images_per_s": 20.0, "latency_ms_p50": 300.0, "latency_ms_p95": 480.0, "spread": 0.2 / 0.3, "repeats": 5})
