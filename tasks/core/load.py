"""How busy this machine is with work that is not this run's: threads that share a core wait for one another, and timings are of
both. Read from /proc (Linux); elsewhere nothing is known and nothing is said.

Ours is the process tree below this process. What the machine did is the CPUs' own account, on the CPUs that this process may
use, the time that a hypervisor took away (steal) included; other work is the rest, whoever does it, seen from here or not.
"""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.core.machine import read_text

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")  # of /proc's times, a second
WORTH_SAYING = 0.1                # of the CPUs, from which on other work is named
WINDOW_S = 0.7


@dataclass(frozen=True)
class Process:
    """A line of /proc/<pid>/stat. own: CPU seconds; reaped: those of children that have ended."""

    pid: int
    name: str
    parent: int
    group: int
    own: float
    reaped: float


@dataclass(frozen=True)
class Snapshot:
    at: float                    # s, of the clock that took it
    busy: float                  # CPU seconds since the machine started
    processes: dict[int, Process]


@dataclass(frozen=True)
class Foreign:
    """Other work between two snapshots: CPUs that it kept busy, of how many, and by its name the process that did most of it in
    the process group that did most."""

    cpus: float
    of: int
    name: str | None

    @property
    def worth_saying(self) -> bool:
        return self.cpus >= WORTH_SAYING * self.of

    def __str__(self) -> str:
        by = f", most of it {self.name}" if self.name else ""
        return f"{self.cpus:.1f} of {self.of} CPUs are busy with other work{by}"


def warning(window_s: float = WINDOW_S) -> str | None:
    """One line where other work keeps this machine busy now; it takes window_s to see."""
    with watched() as seen:
        time.sleep(window_s)
    if seen.found is None or not seen.found.worth_saying:
        return None
    return f"{seen.found}: training may take several times as long here, and timings are of a machine that is not idle"


def warn(stage: str) -> None:
    if line := warning():
        print(f"{stage}: {line}", flush=True)


@dataclass
class Watch:
    found: Foreign | None = None  # once it is over

    def numbers(self) -> dict[str, float]:
        """For a stage's timings."""
        return {} if self.found is None else {"foreign_cpus": round(self.found.cpus, 2), "cpus": self.found.of}


@contextlib.contextmanager
def watched(proc: Path = PROC, root: int | None = None, clock: Callable[[], float] = time.perf_counter) -> Iterator[Watch]:
    """Fills `found` with the other work of the time that the block took. root: the process whose tree is ours, this one."""
    watch, cpus = Watch(), os.sched_getaffinity(0)
    before = snapshot(proc, cpus, clock)
    yield watch
    after = snapshot(proc, cpus, clock)
    if before and after and after.at > before.at:
        watch.found = between(before, after, root or os.getpid(), len(cpus))


def snapshot(proc: Path, cpus: set[int], clock: Callable[[], float]) -> Snapshot | None:
    """None without /proc/stat."""
    stat = read_text(proc / "stat")
    if not stat:
        return None
    found = (process(read_text(path / "stat")) for path in proc.iterdir() if path.name.isdigit())
    return Snapshot(clock(), busy_seconds(stat, cpus), {each.pid: each for each in found if each})


def busy_seconds(stat: str, cpus: set[int]) -> float:
    """Of the CPUs, from their lines: user nice system idle iowait irq softirq steal guest guest_nice, guests being in user."""
    rows = (line.split() for line in stat.splitlines())
    times = [list(map(int, row[1:])) for row in rows if row and row[0].startswith("cpu") and row[0][3:].isdigit()
             and int(row[0][3:]) in cpus]
    return sum(sum(row[:3]) + sum(row[5:8]) for row in times) / TICKS


def process(stat: str) -> Process | None:
    """None of one that ended meanwhile. The name stands in brackets and may hold any character."""
    head, _, tail = stat.rpartition(")")
    if not head:
        return None
    pid, _, name = head.partition(" (")
    fields = tail.split()
    parent, group = int(fields[1]), int(fields[2])
    user, system, reaped_user, reaped_system = map(int, fields[11:15])
    return Process(int(pid), name, parent, group, (user + system) / TICKS, (reaped_user + reaped_system) / TICKS)


def between(before: Snapshot, after: Snapshot, root: int, cpus: int) -> Foreign:
    """Seconds of a child that ended go to its parent, so our tree's sum is whole without it."""
    spent = after.busy - before.busy - (seconds_below(after, root) - seconds_below(before, root))
    ours = below(after, root)
    others = [each for pid, each in after.processes.items() if pid not in ours]
    return Foreign(max(0.0, spent / (after.at - before.at)), cpus, busiest(others, before.processes))


def busiest(processes: Sequence[Process], before: Mapping[int, Process]) -> str | None:
    spent = {each.pid: each.own - (before[each.pid].own if each.pid in before else 0.0) for each in processes}
    groups: dict[int, float] = defaultdict(float)
    for each in processes:
        groups[each.group] += spent[each.pid]
    top = max(groups, key=groups.get, default=None)
    if top is None or groups[top] <= 0:
        return None
    return max((each for each in processes if each.group == top), key=lambda each: spent[each.pid]).name


def seconds_below(seen: Snapshot, root: int) -> float:
    return sum(seen.processes[pid].own + seen.processes[pid].reaped for pid in below(seen, root))


def below(seen: Snapshot, root: int) -> set[int]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for each in seen.processes.values():
        children[each.parent].append(each.pid)
    found, due = set(), [root] if root in seen.processes else []
    while due:
        pid = due.pop()
        found.add(pid)
        due += children[pid]
    return found
