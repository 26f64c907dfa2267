"""Workers that die, hang or raise under `Cluster.map` over a real Ray of this machine: the results are the serial ones."""

import functools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.core.cluster import Cluster, ClusterParams
from tasks.core.serial import Failed
from tests.faults.jobs import (
    make_deadly,
    make_hung_once,
    make_killed_once,
    make_nothing,
    make_product,
    make_reciprocal,
    make_uneven,
)

SERIAL = ClusterParams(address=None, workers=1, cpus_per_worker=1, gpus_per_worker=0.0, max_attempts=2, max_object_mb=64,
                       storage_uri=None, connect_timeout_s=20.0, start_timeout_s=300.0)

PARALLEL = Cluster(replace(SERIAL, workers=2))  # one for all: its warm workers hold the CPUs


@pytest.fixture(scope="module", autouse=True)
def give_back():
    yield
    PARALLEL.close()


def told_and_asked(cluster: Cluster, make) -> list[int]:
    """Ask and tell: each item is made from the results so far."""
    told = []

    def ask():
        for k in range(12):
            yield k + 10 * len(told) + sum(told) % 7

    for result in cluster.map(make, ask(), "t", lookahead=3):
        told.append(result)
    return told


def test_workers_compute_what_this_process_does():
    assert list(PARALLEL.map(make_product, range(8), "t")) == list(Cluster(SERIAL).map(make_product, range(8), "t"))


@pytest.mark.slow
def test_asking_from_results_does_not_depend_on_timing():
    assert told_and_asked(PARALLEL, make_uneven) == told_and_asked(Cluster(SERIAL), make_uneven)


def test_what_an_item_raises_is_its_result():
    assert list(PARALLEL.map(make_reciprocal, [1, 0, 2], "t")) == [1.0, Failed("ZeroDivisionError: division by zero"), 0.5]


@pytest.mark.slow
def test_what_make_raises_is_raised():
    with pytest.raises(ValueError, match="teacher: not found"):
        list(PARALLEL.map(make_nothing, [1], "t"))


def test_prepared_workers_are_those_of_the_next_map():
    PARALLEL.prepare(make_uneven)
    prepared = PARALLEL.workers
    assert len(prepared.jobs) == PARALLEL.params.workers, "all are starting"
    assert list(PARALLEL.map(make_uneven, range(6), "t")) == list(range(6)) and PARALLEL.workers is prepared


def test_killed_worker_is_replaced_and_its_item_asked_again(tmp_path, capsys):
    results = list(PARALLEL.map(functools.partial(make_killed_once, tmp_path), range(8), "t", lookahead=2))
    assert results == [x * x for x in range(8)]
    assert "the worker of item 3 died (ActorDiedError), 1 of 2 times" in capsys.readouterr().out


def test_short_items_travel_together_and_those_of_a_killed_worker_are_asked_again(tmp_path, capsys):
    results = list(PARALLEL.map(functools.partial(make_killed_once, tmp_path), range(40), "t", lookahead=40))
    assert results == [x * x for x in range(40)]
    said = r"the worker of items \[.*\b3\b.*\] died \(ActorDiedError\); each is asked again alone"
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [2, 40])
def test_item_that_kills_every_worker_fails_alone(lookahead):
    failed = Failed("the worker of item 1 died (ActorDiedError), 2 times")
    assert list(PARALLEL.map(make_deadly, range(30), "t", lookahead=lookahead)) == [0, failed, *range(2, 30)]


def test_hung_item_is_killed_and_asked_again(tmp_path, capsys):
    results = list(PARALLEL.map(functools.partial(make_hung_once, tmp_path), range(6), "t", timeout_s=1.0, lookahead=2))
    assert results == [x * x for x in range(6)]
    assert "the worker of item 2 hung, 1 of 2 times" in capsys.readouterr().out


def test_a_result_is_settled_before_its_turn():
    order = []
    PARALLEL.warm_workers(make_uneven).warm()
    results = list(PARALLEL.map(make_uneven, range(6), "t", settle=lambda k, result: order.append(k) or result))
    assert results == list(range(6)) == sorted(order) and order[0] != 0, "item 0 is slow"


@pytest.mark.slow
def test_an_abandoned_map_frees_its_workers():
    results = PARALLEL.map(make_uneven, range(100), "t")
    assert next(results) == 0
    results.close()
    assert list(PARALLEL.map(make_uneven, range(3), "t")) == [0, 1, 2]


@pytest.mark.slow
def test_nothing_but_results_on_the_screen():
    code = ("from tests.faults.test_cluster_faults import *; results = PARALLEL.map(make_uneven, iter(range(9)), 't')\n"
            "print([next(results) for _ in range(3)])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONPATH": "."})
    assert (done.stdout, done.stderr) == ("[0, 1, 2]\n", "")


@pytest.mark.slow
def test_a_killed_worker_is_one_line_on_the_screen(tmp_path):
    """Ray's own account of it comes seconds later, to whoever is the driver, and has a thousand letters."""
    code = ("import sys, time; from pathlib import Path; from tests.faults.test_cluster_faults import *\n"
            "print(list(PARALLEL.map(functools.partial(make_killed_once, Path(sys.argv[1])), range(8), 't', lookahead=2)))\n"
            "time.sleep(5)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONPATH": "."})
    lines = done.stdout.splitlines()
    assert [line for line in lines if "died" in line] == ["t: the worker of item 3 died (ActorDiedError), 1 of 2 times"]
    assert lines[-1] == str([x * x for x in range(8)]) and done.stderr == ""
