"""Order, look-ahead and outcomes of `Cluster.map`; the serial path here, the same promises over Ray in tests/faults."""

import io
import os
import subprocess
import sys
import tarfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.core.artifacts import Inputs, Report
from tasks.core.cluster import Cluster, ClusterParams
from tasks.core.parcel import Parcel, files_of, pack
from tasks.core.ray_map import Workers
from tasks.core.serial import Failed, Known

SERIAL = ClusterParams(address=None, workers=1, cpus_per_worker=1, gpus_per_worker=0.0, max_attempts=3, max_object_mb=64,
                       storage_uri=None, connect_timeout_s=20.0, start_timeout_s=60.0)


def make_square():
    return lambda x: x * x


def make_reciprocal():
    return lambda x: 1 / x


def make_nothing():
    raise ValueError("teacher: not found")


def test_what_is_settled_is_handed_out_instead():
    settled = []

    def settle(k, result):
        settled.append((k, result))
        return k

    results = Cluster(SERIAL).map(make_reciprocal, [Known(7), 0, 2], "t", settle=settle)
    assert list(results) == [7, 1, 2], "known results are settled already"
    assert settled == [(1, Failed("ZeroDivisionError: division by zero")), (2, 0.5)]


def test_results_come_in_the_order_of_the_items():
    assert list(Cluster(SERIAL).map(make_square, range(5), "t")) == [0, 1, 4, 9, 16]


def test_item_k_is_taken_after_result_k_minus_lookahead():
    seen, results = [], []

    def items():
        for k in range(6):
            seen.append(len(results))
            yield k

    for result in Cluster(SERIAL).map(make_square, items(), "t", lookahead=3):
        results.append(result)
    assert seen == [0, 0, 0, 1, 2, 3]


def test_what_an_item_raises_is_its_result():
    results = list(Cluster(SERIAL).map(make_reciprocal, [1, 0, 2], "t"))
    assert results == [1.0, Failed("ZeroDivisionError: division by zero"), 0.5]


def test_what_make_raises_is_raised():
    with pytest.raises(ValueError, match="teacher: not found"):
        list(Cluster(SERIAL).map(make_nothing, [1], "t"))


@pytest.mark.parametrize("workers", [1, 2])
def test_known_results_keep_their_place_and_need_no_worker(workers):
    cluster = Cluster(replace(SERIAL, workers=workers))
    assert list(cluster.map(make_nothing, [Known(3), Known(1)], "t")) == [3, 1]


def test_short_items_travel_together_and_the_last_ones_are_shared_out():
    """Four workers, one of them idle, 64 items asked ahead: two calls of eight items each for every worker."""
    workers = Workers(make_square, lambda: None, {}, 4, 2, 10.0)
    workers.begin("t", None, None, lookahead=64)
    workers.idle, workers.item_s = ["actor"], 0.01

    def size(queued: int) -> int:
        return len(workers.bundle(deque(enumerate(range(queued)))))

    assert [size(queued) for queued in (40, 16, 3, 1)] == [8, 8, 3, 1]
    workers.ending = True
    assert [size(queued) for queued in (40, 16, 3, 1)] == [8, 4, 1, 1]


@pytest.mark.parametrize("key, value", [("workers", 0), ("cpus_per_worker", 0), ("max_attempts", 0), ("address", "head")])
def test_params_name_the_bad_value(key, value):
    with pytest.raises(ValueError, match=f"cluster.{key}: .*{value}"):
        replace(SERIAL, **{key: value})


def test_parcel_brings_a_folder_back(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "x.npy").write_bytes(b"123")
    packed = pack(tmp_path / "a", files_of(tmp_path / "a"), 100, None)
    packed.unpack_into(tmp_path / "b")
    assert (tmp_path / "b" / "deep" / "x.npy").read_bytes() == b"123"


def test_large_parcel_travels_through_the_store(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(bytes(200))
    with pytest.raises(ValueError, match="cluster.storage_uri: null.*200 bytes.*100"):
        pack(tmp_path / "a", files_of(tmp_path / "a"), 100, None)
    packed = pack(tmp_path / "a", files_of(tmp_path / "a"), 100, f"file://{tmp_path}/store")
    assert packed.data is None
    packed.unpack_into(tmp_path / "b")
    assert (tmp_path / "b" / "x").read_bytes() == bytes(200)


def test_opening_twice_unpacks_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    packed = pack(tmp_path / "a", files_of(tmp_path / "a"), 100_000, None)
    first = packed.open()
    stamp = first.stat().st_ino
    assert packed.open() == first and first.stat().st_ino == stamp and (first / "x").read_text() == "1"


def test_links_travel_as_what_they_point_to_and_nothing_leaves_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "x").write_text("1")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "x")  # as DVC links to its cache
    assert (pack(tmp_path / "a", files_of(tmp_path / "a"), 100_000, None).open() / "link").read_text() == "1"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(tmp_path / "x", "../evil")
    with pytest.raises(ValueError, match=r"parcel p: \.\./evil is not a file inside the folder"):
        Parcel("p", data=buffer.getvalue()).open()


@pytest.mark.parametrize("name", ["/evil", "a/../../evil", "C:\\evil", "..\\evil", "a//b"])
def test_a_member_of_a_parcel_lies_inside_the_folder(tmp_path, monkeypatch, name):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    member, buffer = tarfile.TarInfo("a"), io.BytesIO()
    member.name = name  # as it is, which tar.add would not leave it
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(member)
    with pytest.raises(ValueError, match="parcel p: .*evil is not a file inside the folder|a//b is not a file inside"):
        Parcel("p", data=buffer.getvalue()).open()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_parcel_with_another_content_than_was_sent_is_refused(tmp_path, monkeypatch):
    """As a store gives it back that holds a damaged object."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temp"))
    (tmp_path / "a").mkdir()
    (tmp_path / "temp").mkdir()
    (tmp_path / "a" / "x").write_text("one")
    sent = pack(tmp_path / "a", files_of(tmp_path / "a"), 100_000, None)
    with pytest.raises(ValueError, match=f"parcel {sent.name}: holds something else than what was sent"):
        replace(sent, data=sent.data.replace(b"one", b"two")).open()
    assert [p for p in (tmp_path / "temp").rglob("*") if p.is_file()] == []
    assert (sent.open() / "x").read_text() == "one"


def test_shipping_on_this_machine_is_the_folder_itself(tmp_path):
    parcel = Cluster(SERIAL).ship(tmp_path)
    assert isinstance(parcel, Parcel) and parcel.open() == tmp_path.resolve()


def test_run_without_a_cluster_calls_the_stage(tmp_path):
    class Stage:
        @staticmethod
        def run(params, inputs, out):
            return Report({"seen": params, "wanted": inputs.resources["cpus"]})

    inputs = Inputs({}, "key", None, {"cpus": 2})
    assert Cluster(SERIAL).run(Stage, 7, inputs, tmp_path).numbers == {"seen": 7, "wanted": 2}


def test_unreachable_address_is_one_line_and_starts_nothing():
    code = ("from tasks.core.cluster import Cluster; from tests.unit.core.test_cluster import *; import dataclasses, sys\n"
            "import ray\n"
            "cluster = Cluster(dataclasses.replace(SERIAL, address='127.0.0.1:9', connect_timeout_s=3.0))\n"
            "try: list(cluster.map(make_square, [1], 't'))\n"
            "except ValueError as error: print(error)\n"
            "print(ray.is_initialized())")
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[3], env=os.environ | {"PYTHONPATH": ".", "RAY_AUTH_TOKEN": "0" * 64})
    line, running = done.stdout.splitlines()
    assert line.startswith("cluster.address: 127.0.0.1:9: no answer within 3 s") and running == "False"
    assert time.monotonic() - started < 30
