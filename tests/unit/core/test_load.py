"""Other work on this machine, from /proc as Linux writes it: made by hand, and the real one beside a child that is busy."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.core import load
from tasks.core.load import busy_seconds, process, watched

TICKS = load.TICKS


def stat(pid, name, parent, group, seconds=0.0, reaped=0.0):
    """A line of /proc/<pid>/stat: half of the time in user mode, half in the kernel."""
    own, gone = (int(x * TICKS / 2) for x in (seconds, reaped))
    return f"{pid} ({name}) S {parent} {group} {group} 0 -1 4194560 9 9 0 0 {own} {own} {gone} {gone} 20 0 1 0 77 1 1\n"


def write(proc: Path, cpus, processes):
    """cpus: busy seconds of each, the first third of them user, a third system, a third steal; 1,000 s idle."""
    for path in proc.glob("[0-9]*/stat"):
        path.unlink()
        path.parent.rmdir()
    thirds = [int(seconds * TICKS / 3) for seconds in cpus]
    rows = [f"cpu{i} {part} 0 {part} {1000 * TICKS} 5 0 0 {part} 0 0" for i, part in enumerate(thirds)]
    (proc / "stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 5 0", "ctxt 9"]) + "\n")
    for each in processes:
        folder = proc / each.split()[0]
        folder.mkdir()
        (folder / "stat").write_text(each)


@pytest.fixture
def two_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def seen(proc, before, after, seconds=10.0):
    clock = iter((100.0, 100.0 + seconds))
    write(proc, *before)
    with watched(proc, root=10, clock=lambda: next(clock)) as watch:
        write(proc, *after)
    return watch


def test_what_is_busy_and_not_ours_is_foreign(tmp_path, two_cpus):
    """In 10 s the CPUs are busy for 9 + 6 s; our tree of 10 has 6 s of it, 1.5 s of which a child did that has ended."""
    before = ([30, 30], [stat(1, "init", 0, 1), stat(10, "python", 1, 10, 5), stat(11, "worker", 10, 10, 2, 0),
                         stat(20, "train (v2) x", 1, 20, 50), stat(21, "helper", 20, 20, 3), stat(30, "cron", 1, 30, 1)])
    after = ([39, 36], [stat(1, "init", 0, 1), stat(10, "python", 1, 10, 8, 0), stat(11, "worker", 10, 10, 3.5, 1.5),
                        stat(20, "train (v2) x", 1, 20, 55), stat(21, "helper", 20, 20, 6), stat(30, "cron", 1, 30, 1.5)])
    watch = seen(tmp_path, before, after)
    assert watch.found.cpus == pytest.approx(0.9) and watch.found.name == "train (v2) x"
    assert watch.numbers() == {"foreign_cpus": 0.9, "cpus": 2}
    assert watch.found.worth_saying and str(watch.found) == "0.9 of 2 CPUs are busy with other work, most of it train (v2) x"


def test_our_own_work_is_not_foreign_however_much_it_is(tmp_path, two_cpus):
    watch = seen(tmp_path, ([30, 30], [stat(10, "python", 1, 10, 5), stat(12, "ray", 10, 12, 5)]),
                 ([40, 40], [stat(10, "python", 1, 10, 15), stat(12, "ray", 10, 12, 15)]))
    assert watch.found.cpus == pytest.approx(0) and watch.found.name is None and not watch.found.worth_saying


def test_work_that_nobody_here_does_is_seen_all_the_same(tmp_path, two_cpus):
    """Of a hypervisor's other guests, or of processes outside of this container."""
    watch = seen(tmp_path, ([30, 30], [stat(10, "python", 1, 10, 5)]), ([36, 36], [stat(10, "python", 1, 10, 5)]))
    assert watch.found.cpus == pytest.approx(1.2) and str(watch.found) == "1.2 of 2 CPUs are busy with other work"


def test_the_group_with_most_work_is_named_by_its_busiest_process(tmp_path, two_cpus):
    before = ([30, 30], [stat(10, "python", 1, 10), stat(20, "bash", 1, 20), stat(30, "alone", 1, 30)])
    after = ([40, 40], [stat(10, "python", 1, 10), stat(20, "bash", 1, 20), stat(21, "cc1", 20, 20, 4),
                        stat(22, "ld", 20, 20, 3), stat(30, "alone", 1, 30, 6)])
    assert seen(tmp_path, before, after).found.name == "cc1"


def test_cpus_that_we_may_not_use_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    watch = seen(tmp_path, ([30, 30], []), ([40, 31], []))
    assert watch.found.cpus == pytest.approx(0.1, abs=0.01) and watch.found.of == 1


def test_fields_by_hand():
    assert busy_seconds("cpu 9 9 9 9\ncpu0 100 20 30 4000 50 6 7 8 90 10\ncpu1 1 1 1 1 1 1 1 1 1 1\n", {0}) * TICKS == 171
    found = process("7 (a) b) c) R 3 5 5 0 -1 0 0 0 0 0 100 50 25 12 20 0 1 0 0 0 0\n")
    assert (found.pid, found.name, found.parent, found.group) == (7, "a) b) c", 3, 5)
    assert (found.own * TICKS, found.reaped * TICKS) == (150, 37)
    assert process("") is None


def test_without_proc_nothing_is_known(tmp_path):
    with watched(tmp_path) as watch:
        pass
    assert watch.found is None and watch.numbers() == {}


@pytest.mark.parametrize("cpus, said", [(0.19, False), (0.21, True)])
def test_a_tenth_of_the_machine_is_worth_a_line(monkeypatch, cpus, said):
    monkeypatch.setattr(load, "between", lambda *_: load.Foreign(cpus, 2, "cc1"))
    line = load.warning(window_s=0.01)
    assert (line is not None) == said
    if said:
        assert line.startswith("0.2 of 2 CPUs are busy with other work, most of it cc1: training may") and "\n" not in line


def test_a_busy_child_is_ours_and_a_busy_stranger_is_not():
    """The kernel's own account, on a machine that other tests share: only what differs between the two views is compared."""
    spin = "import time\nend = time.time() + 3\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin], start_new_session=True) as child:
        time.sleep(0.3)
        cpus = os.sched_getaffinity(0)
        before = load.snapshot(load.PROC, cpus, time.perf_counter)
        time.sleep(1.0)
        after = load.snapshot(load.PROC, cpus, time.perf_counter)
        child.kill()
    ours = load.between(before, after, os.getpid(), len(cpus)).cpus
    theirs = load.between(before, after, -1, len(cpus)).cpus  # nobody's tree: all is foreign
    spent = after.processes[child.pid].own - before.processes[child.pid].own
    assert spent > 0 and theirs - ours >= 0.9 * spent / (after.at - before.at)
