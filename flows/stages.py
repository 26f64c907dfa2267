"""The one Prefect task: run a DVC stage as a child, stream what it prints, publish what it claims."""

import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows.child import python_path, run_child
from flows.freshness import put_back
from flows.screen import SHOWN, is_progress
from tasks.core.artifacts import ARTIFACTS, REPORTS, read_json
from tasks.core.machine import TIMED

SUMMARY, REPORT_PAGE = ARTIFACTS / "report/summary.txt", ARTIFACTS / "report/report.html"
KILLED = "Killed"         # state of a stage that a signal ended: its checkpoint makes one more try worth it
TRIES_AGAIN = 1
LAST_LINES = 200          # kept to find out why a stage failed
PROGRESS_TO_SERVER_S = 15.0  # a bar moves every second on the screen; the server's log is told this often

DVC_CHATTER = ("Running stage '", "> python -m ", "Updating lock file", "Generating lock file", "To track the changes with git",
               "git add ", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`",
               "WARNING: Process '")  # that held a lock was killed: after every run that was stopped
DVC_FAILED = re.compile(r"^ERROR: failed to reproduce '[^']+': (?P<why>.*)$")
EXITED = re.compile(r"failed to run: .*, exited with (?P<status>-?\d+)$")
NOT_CACHED = "ERROR: failed to transfer "  # DVC says so once per file, and exits with 0
UNTOUCHED = ("didn't change, skipping", "is cached - skipping run")


def worth_another_try(task, run, state: State) -> bool:
    return state.name == KILLED


@task(name="stage", retries=TRIES_AGAIN, retry_delay_seconds=5, retry_condition_fn=worth_another_try, cache_policy=NO_CACHE,
      persist_result=False)
def run_stage(stage: str, timeout_s: float, fresh: bool = False, force: bool = False) -> State:
    """Bring one stage up to date with `dvc repro -s`. DVC alone decides whether its command runs, unless it is to by `force`.

    A failure is a state with the stage's own last word as its message, not an exception: nobody needs a stack trace of the
    plumbing. What DVC deleted before a failed stage is put back.
    """
    if fresh:
        say(f"{stage}: fresh")
        return Completed(name="Cached", message="DVC: up to date")
    say(f"{stage}: running")
    stood, started = (ARTIFACTS / stage).exists(), time.monotonic()
    last: deque[str] = deque(maxlen=LAST_LINES)
    tell = teller()
    status: int | None = None
    try:
        status = run_child(command(stage, force), lambda line: (last.append(line), tell(line)), timeout_s, environment(stage))
    finally:  # after Ctrl-C and a cancelled run, too
        if status != 0 and (lost := put_back(stage, stood)):
            say(lost)
    return done(stage, last, time.monotonic() - started) if status == 0 else failure(stage, status, last, timeout_s)


def command(stage: str, force: bool = False) -> list[str]:
    return [sys.executable, "-m", "flows.repro", *(["-f"] if force else []), stage]


def environment(stage: str) -> dict[str, str]:
    """Stages run under this interpreter, unbuffered; a bar on a terminal wants a line a second.

    OpenMP's threads sleep while they wait, but where time is measured: on a machine that has other work a training step of two
    spinning threads takes ten times as long (11.6 s in place of 1.2 s: 6 steps each in one run, 2 threads on 2 busy cores).
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    lively = {"DIFFPRESS_PROGRESS_S": "1"} if sys.stdout.isatty() else {}
    patient = {} if stage in TIMED else {"OMP_WAIT_POLICY": "passive"}
    return {**lively, **patient, **os.environ, "PATH": path, "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}


def teller() -> Callable[[str], None]:
    """-> a function that passes a stage's line to the run's log and to the screen; it may be called from another thread."""
    log, told = get_run_logger(), 0.0

    def tell(line: str) -> None:
        nonlocal told
        if line.strip().startswith((*DVC_CHATTER, NOT_CACHED)):
            return
        bar = is_progress(line)
        to_server = not bar or time.monotonic() - told > PROGRESS_TO_SERVER_S
        if bar and to_server:
            told = time.monotonic()
        log.info("%s", line, extra={SHOWN: True, "send_to_api": to_server})

    return tell


def say(line: str) -> None:
    get_run_logger().info("%s", line, extra={SHOWN: True})


def done(stage: str, lines: Sequence[str], seconds: float) -> State:
    if lost := [line for line in lines if line.startswith(NOT_CACHED)]:
        why = lost[0].removeprefix(NOT_CACHED).partition(" - ")[2]
        return Failed(message=f"{stage}: artifacts/{stage} is whole, but {len(lost)} of its files did not get into DVC's cache "
                              f"({why}); mend that, then `dvc commit -f {stage}` keeps the result, another run makes it again")
    publish(stage)
    if any(mark in line for line in lines for mark in UNTOUCHED):
        say(f"{stage}: fresh")
        return Completed(name="Cached", message="DVC: the same as an earlier run")
    say(f"{stage}: done in {seconds:.0f} s")
    return Completed(message=f"done in {seconds:.0f} s")


def failure(stage: str, status: int | None, lines: Sequence[str], timeout_s: float) -> State:
    """Why a stage failed, in one line: its own last word before DVC's, or DVC's where the command never ran.

    DVC 3.67 ends with "ERROR: failed to reproduce 'fid': failed to run: python -m tasks.fid, exited with 1".
    """
    if status is None:
        why = f"stopped after {timeout_s:.0f} s, its time limit; the next run goes on from its checkpoint"
        return Failed(name="TimedOut", message=f"{stage}: {why}")
    own, verdict = [], ""
    for line in lines:
        if found := DVC_FAILED.match(line):
            verdict = found["why"]
        elif not verdict and not is_progress(line):
            own.append(line)
    ran = EXITED.search(verdict)
    killer = signal_of(int(ran["status"]) if ran else status)
    if killer:  # some shells add their own last word: "Killed", "sh: line 1: 7 Killed python -m ..."
        own = [line for line in own if signal.strsignal(killer) not in line]
    word = own[-1].removeprefix("error: ") if own and (ran or not verdict) else verdict or f"exit status {status}"
    if killer:
        return Failed(name=KILLED, message=f"{stage}: killed ({verdict or f'signal {-status}'}); its last line: {word}")
    return Failed(message=f"{stage}: {word}")


def signal_of(status: int) -> int | None:
    """The signal that ended a process: negative from subprocess, 128 + signal from a shell; None: it exited by itself."""
    if status < 0:
        return -status
    return status - 128 if 128 < status < 128 + 65 else None


def publish(stage: str) -> None:
    """What the stage claims, for people who watch in Prefect's UI."""
    key = stage.replace("_", "-")
    if (report := REPORTS / f"{stage}.json").exists():
        create_table_artifact(key=f"{key}-numbers", table=rows(read_json(report)), description=str(report))
    if stage == "report" and SUMMARY.exists():
        create_markdown_artifact(key="summary", markdown=f"```\n{SUMMARY.read_text()}\n```", description="The result table")
        create_link_artifact(key="report", link=REPORT_PAGE.resolve().as_uri(), link_text="report.html")


def rows(numbers: Any, prefix: str = "") -> list[dict[str, Any]]:
    """Nested JSON -> one row per number, its keys joined by dots."""
    if not isinstance(numbers, dict):
        return [{"number": prefix, "value": numbers}]
    return [row for key, value in numbers.items() for row in rows(value, f"{prefix}.{key}" if prefix else key)]


def run_stages(stages: dict[str, tuple[str, ...]], stale: set[str], timeout_s: float, forced: Collection[str] = ()) -> State:
    """All stages in DAG order, one at a time: two at once on one machine would spoil each other's timings.

    What makes work wide is inside a stage (the cluster), not beside it. Stops at the first failure.
    """
    states: dict[str, State] = {}
    for stage, upstream in stages.items():
        step = run_stage.with_options(name=stage, task_run_name=stage)
        states[stage] = step(stage, timeout_s, fresh=stage not in stale, force=stage in forced, return_state=True,
                             wait_for=[states[name] for name in upstream if name in states])
        if not states[stage].is_completed():
            return Failed(message=states[stage].message)
    return Completed(message=f"{len(stages)} stages up to date")
