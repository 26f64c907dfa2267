"""The pipeline: check everything, ask DVC what is stale, run that in DAG order, show the verdict.

`python -m flows.compress` needs no server; with PREFECT_API_URL set it reports to that one. A worker runs the same flow.
"""

import sys

from flows import ending
from tasks.core import preflight

if __name__ == "__main__":
    ending.heed()  # before the imports that take seconds
    if refused := preflight.main(sys.argv[1:]):
        sys.exit(refused)

import argparse
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from dvc.exceptions import DvcException
from prefect import flow
from prefect.states import Failed, State

from flows import freshness
from flows.screen import take_over
from flows.stages import SUMMARY, run_stages, say
from tasks.core import disk, leftovers, load, machine, turns
from tasks.core.cluster import Cluster
from tasks.core.params import PARAMS_FILE, SCALES, check_choice, validate_all

STAGE_TIMEOUT_H = 12.0


@dataclass(frozen=True)
class Plan:
    scale: str
    stages: dict[str, tuple[str, ...]]  # in DAG order, each with what it reads from
    stale: set[str]
    forced: tuple[str, ...] = ()        # run although nothing that they depend on changed


@flow(name="compress", validate_parameters=False)
def compress(scale: str | None = None, until: str | None = None, stage_timeout_h: float = STAGE_TIMEOUT_H,
             retime: bool = False) -> State:
    """scale: write it into params.yaml first; until: the last stage to run, with all it needs; retime: time anew, on this
    machine, and choose by that."""
    ending.heed_again()
    with one_at_a_time(say):
        return bring_up_to_date(scale, until, stage_timeout_h, retime)


def bring_up_to_date(scale: str | None, until: str | None, stage_timeout_h: float, retime: bool = False) -> State:
    """`compress` without its lock, for a flow that holds it and goes on with what was made."""
    try:
        plan = prepare(scale, until, retime)
    except ValueError as error:
        return Failed(message=str(error))
    say(f"scale {plan.scale}: {len(plan.stages)} stages, {len(plan.stages) - len(plan.stale)} of them fresh")
    if plan.stale and (busy := load.warning()):
        say(busy)
    state = run_stages(plan.stages, plan.stale, stage_timeout_h * 3600, plan.forced)
    if not state.is_completed():
        return state
    if again := freshness.to_run(plan.stages):
        names = ", ".join(stage for stage in plan.stages if stage in again)
        return Failed(message=f"{PARAMS_FILE}, data or code changed while this ran: {names} would run anew, so the results do "
                              f"not belong together; run again")
    if other := machine.elsewhere(plan.stages):
        say(other)
    return state


def prepare(scale: str | None = None, until: str | None = None, retime: bool = False) -> Plan:
    """The preflight: when it raises ValueError (file, value, bound), nothing has started and nothing was deleted. It may
    write `scale`, so whoever calls it holds the lock: stages of a run that is at work read params.yaml one by one."""
    if scale is not None:
        set_scale(scale)
    params = validate_all()
    freshness.check_paths(params)
    stages = freshness.dag(until)
    forced = tuple(stage for stage in machine.TIMED if retime and stage in stages)
    stale = freshness.to_run(stages, forced)
    if stale:
        freshness.check_space()
        Cluster.from_params(params["cluster"]).check()
    return Plan(params["scale"], stages, stale, forced)


def set_scale(scale: str) -> None:
    """Change the one line of params.yaml that `dvc exp run -S scale=...` would: params, dvc.lock and results stay in step."""
    check_choice("scale", scale, SCALES)
    text = PARAMS_FILE.read_text(encoding="utf-8")
    changed, found = re.subn(r"^scale: *(['\"]?)\w+\1", f"scale: {scale}", text, count=1, flags=re.MULTILINE)
    if not found:
        raise ValueError(f"{PARAMS_FILE}: no line `scale: quick` or `scale: full` that could be changed to {scale}")
    disk.write_whole(PARAMS_FILE, changed)


@contextmanager
def one_at_a_time(tell: Callable[[str], object]) -> Iterator[None]:
    """Two runs in one working copy would delete each other's artifacts. A stage of a run that was killed may still be at work,
    for seconds; once it has ended, what both left behind goes."""
    with turns.one_at_a_time(turns.RUN_LOCK, "another run is at work in this folder; waiting for it to end", tell):
        with turns.one_at_a_time(turns.STAGE_LOCK, "a stage is at work in this folder; waiting for it to end", tell):
            leftovers.clear(leftovers.OF_RUNS)
            freshness.clear_broken_lock()
        yield


def show_result(plan: Plan, seconds: float) -> None:
    if "report" in plan.stages:
        print(f"\n{SUMMARY.read_text().rstrip()}")
    print(f"\nscale {plan.scale}, {seconds:.0f} s")


def run(asked: argparse.Namespace, until: str | None) -> int:
    """-> exit status. Prefect is started only where there is something for it to run."""
    started = time.monotonic()
    with one_at_a_time(partial(print, flush=True)):
        plan = prepare(asked.scale, until, asked.retime)
    if not plan.stale:
        print("everything is fresh, nothing to run")
        if other := machine.elsewhere(plan.stages):
            print(other)
    else:
        due = ", ".join(stage for stage in plan.stages if stage in plan.stale)
        print(f"scale {plan.scale}, to run: {due}. Starting Prefect.", flush=True)
        take_over()
        from flows.server import start_server  # seconds, which a run with nothing to do has no need of
        try:
            start_server()
            state = compress(asked.scale, until, asked.stage_timeout_h, asked.retime, return_state=True)
        except RuntimeError as error:  # raised before the flow began: inside, it would be a state
            print(f"error: Prefect did not start ({error}); `make repro` does the same work without it", file=sys.stderr)
            return 1
        if not state.is_completed():
            print(f"error: {state.message}", file=sys.stderr)
            return 1
    show_result(plan, time.monotonic() - started)
    return 0


def main(arguments: list[str] | None = None, until: str | None = None) -> int:
    """-> exit status: 0, 1 a stage failed, 2 params.yaml is wrong, 128 + n stopped by signal n (130: Ctrl-C)."""
    parser = argparse.ArgumentParser(description="Bring every stage up to date and show the verdict.")
    parser.add_argument("--scale", choices=SCALES, help="written into params.yaml, where it stays")
    parser.add_argument("--stage-timeout-h", type=float, default=STAGE_TIMEOUT_H, help="hours after which a stage is stopped")
    parser.add_argument("--retime", action="store_true", help=f"time {' and '.join(machine.TIMED)} anew, on this machine")
    asked = parser.parse_args(arguments)
    try:
        with ending.heeded():
            return run(asked, until)
    except (ValueError, OSError, DvcException) as error:  # DVC's: dvc.lock with conflict markers, no repository, a bad config
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ending.Stopped as stopped:
        return stopped.code


if __name__ == "__main__":
    sys.exit(main())
