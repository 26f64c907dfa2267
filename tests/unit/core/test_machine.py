"""Times stay valid as the machine's that they were taken on; whoever runs elsewhere is told, once, in a line."""

import pytest

from tasks.core import machine
from tasks.core.artifacts import write_json

CPUINFO = "processor : 0\nmodel name : Example 9 CPU\nflags : fpu avx2 avx512f avx512_vnni\n\nmodel name : Other\n"


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """-> write(profile, benchmark): each descriptor with what the stages add, None: no result."""
    monkeypatch.chdir(tmp_path)

    def write(profile=None, benchmark=None):
        for folder in ("artifacts/profile", "reports"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        if profile:
            write_json("artifacts/profile/machine.json", {**profile, "threads": 1, "torch": "2"})
        if benchmark:
            write_json("reports/benchmark.timings.json", {"machine": benchmark, "dense": {}})
    return write


def test_the_description_is_the_systems_own_words(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/information").write_text("Model: \t\t Example GPU\nIRQ: 5\n")
    found = machine.describe(CPUINFO, tmp_path)
    assert found["cpu"] == "Example 9 CPU" and found["flags"] == ["avx2", "avx512f", "avx512_vnni"]
    assert found["gpus"] == ["Example GPU"] and machine.named(found).endswith("cores, Example GPU)")


def test_nothing_is_said_where_nothing_was_timed_or_all_of_it_here(timed):
    assert machine.elsewhere() is None
    timed(machine.describe(), machine.describe())
    assert machine.elsewhere() is None


def test_times_of_another_machine_are_named_with_what_to_do(timed):
    here = machine.describe()
    timed(here | {"cpu": "Example", "cores": 64}, here)
    said = machine.elsewhere()
    assert said.startswith(f"the times in profile are of Example (64 cores), this is {here['cpu']}")
    assert "make run RETIME=1" in said and "\n" not in said
    timed(benchmark=here | {"cpu": "Example", "cores": 64})
    assert machine.elsewhere().startswith("the times in profile and benchmark are of Example (64 cores), this is")
    assert machine.elsewhere(["data"]) is None


@pytest.mark.parametrize("change", [{"flags": ["none"]}, {"cores": -1}, {"gpus": ["Example GPU"]}])
def test_any_part_of_the_descriptor_makes_another_machine(timed, change):
    timed(machine.describe() | change)
    assert machine.elsewhere()


def test_two_machines_of_one_name(timed):
    timed(machine.describe() | {"flags": ["none"]})
    assert "this is one of that name with other instructions" in machine.elsewhere()
