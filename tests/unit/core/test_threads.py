"""How many threads a stage has: what was asked for, or what affinity and control groups leave, by files as Linux has them."""

import os
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info

from tasks.core import threads
from tests.contract.reading import ROOT


def machine(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("files, cpus", [
    ({}, inf),
    ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_max": "150000 100000\n"}, 1.5),
    ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_max": "max 100000\n"}, inf),
    ({"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__b__cpu_max": "max 100000\n",
      "sys__fs__cgroup__a__cpu_max": "400000 100000\n"}, 4),  # the group around it limits it, too
    ({"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__b__cpu_max": "200000 100000\n",
      "sys__fs__cgroup__a__cpu_max": "400000 100000\n"}, 2),
    ({"proc__self__cgroup": "0::/../elsewhere\n", "sys__fs__cgroup__cpu_max": "100000 50000\n"}, 2),
    ({"proc__self__cgroup": "4:cpu,cpuacct:/docker/1\n3:memory:/docker/1\n",
      "sys__fs__cgroup__cpu__cpu_cfs_quota_us": "300000\n", "sys__fs__cgroup__cpu__cpu_cfs_period_us": "100000\n"}, 3),
    ({"proc__self__cgroup": "4:cpu,cpuacct:/\n", "sys__fs__cgroup__cpu__cpu_cfs_quota_us": "-1\n",
      "sys__fs__cgroup__cpu__cpu_cfs_period_us": "100000\n"}, inf),
    ({"proc__self__cgroup": "2:cpuset:/\n", "sys__fs__cgroup__cpu__cpu_cfs_quota_us": "100000\n",
      "sys__fs__cgroup__cpu__cpu_cfs_period_us": "100000\n"}, inf)])
def test_the_quota_of_every_group_around_this_process(tmp_path, files, cpus):
    assert threads.quota(machine(tmp_path, **files)) == cpus


def test_affinity_and_quota_both_count(tmp_path, monkeypatch):
    root = machine(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu_max="250000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert threads.allowed(root) == 2.5
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert threads.allowed(root) == 1


@pytest.fixture
def put_back(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    yield
    threads.apply(before)


@pytest.mark.parametrize("asked, usable, own, number", [(None, 2.5, 8, 2), (None, 16, 4, 4), (None, 0.5, 8, 1), (3, 8, 8, 3)])
def test_null_takes_no_more_than_may_be_used(put_back, monkeypatch, asked, usable, own, number):
    monkeypatch.setattr(threads, "allowed", lambda: usable)
    torch.set_num_threads(own)
    assert threads.apply(asked) == torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) == number
    assert all(pool["num_threads"] == number for pool in threadpool_info() if pool["user_api"] == "blas")


def test_more_than_there_are_is_honoured_and_said(put_back, monkeypatch, capsys):
    monkeypatch.setattr(threads, "allowed", lambda: 2)
    assert threads.apply(5) == torch.get_num_threads() == 5
    assert capsys.readouterr().out == "threads: 5 are more than the 2 CPUs that this process may use: they take turns\n"


def test_a_process_that_is_bound_to_one_cpu_takes_one_thread():
    """Against the kernel: PyTorch alone would take what OMP_NUM_THREADS says."""
    code = ("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "from tasks.core import threads; print(threads.apply(None))")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "4"},
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
