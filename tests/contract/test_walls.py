"""Who may import whom, and what no tracked file may name."""

import re
import sys
from pathlib import Path

import pytest

from tests.contract.reading import ROOT, USERS, committed, imports, tracked

HOME_OF = {"prefect": "flows/", "dvc": "flows/",
           "ray": ("tasks/core/cluster.py", "tasks/core/ray_")}  # the verbs; and what is behind each, too long for one file
NEVER = {"pickle", "dill", "joblib"}
SHIPPED = {"torch", "numpy", "diffusers", "safetensors", *sys.stdlib_module_names}
NOT_SHIPPED = {"graph.py", "graph_export.py", "graph_index.py", "graph_solver.py", "graph_store.py",  # for OpenVINO
               "compiling.py", "integer.py", "rounding.py"}  # and the search's kernels, learned rounding
MACHINE_PATH = re.compile(r"(?<![\w.~$-])/(?:root|work|tmp|home/(?!\$)\w+|Users/\w+)/[\w.-]+")
REGISTRY_HOST = re.compile(r"(?:pypi|pythonhosted|registry|artifactory|nexus|proxy)[\w-]*\.(?:org|com|io|net)"
                           r"|download\.pytorch|/simple\b")


def sources() -> list[Path]:
    return [p for p in tracked(".py") if p.relative_to(ROOT).parts[0] in ("flows", "tasks", "benchmarks", "examples")]


@pytest.mark.parametrize("library", HOME_OF)
def test_each_framework_stays_in_its_room(library):
    outside = [p for p in sources() if not p.relative_to(ROOT).as_posix().startswith(HOME_OF[library])
               and any(level == 0 and module.split(".")[0] == library for level, module in imports(p))]
    assert not outside


def test_nothing_below_the_flows_imports_them():
    assert not [p for p in sources() if p.relative_to(ROOT).parts[0] != "flows"
                and any(module.split(".")[0] == "flows" for _, module in imports(p))]


def test_nothing_is_unpickled():
    assert not [p for p in sources() if NEVER.intersection(module.split(".")[0] for _, module in imports(p))]
    loads = [call for p in sources() for call in re.findall(r"torch\.load\([^)]*\)", p.read_text())]
    assert all("weights_only=True" in call for call in loads)


def test_core_and_runtime_know_no_stage():
    for path in (p for p in sources() if p.relative_to(ROOT).parts[:2] in (("tasks", "core"), ("tasks", "runtime"))):
        rooms = {module.split(".")[1] for level, module in imports(path) if level == 0 and module.startswith("tasks.")}
        assert rooms <= {"core", "runtime"}, path


def test_what_a_package_ships_needs_no_diffpress():
    for path in (p for p in sources() if p.parent == ROOT / "tasks/runtime" and p.name not in NOT_SHIPPED):
        foreign = {module for level, module in imports(path) if level > 1 or level == 0 and module.split(".")[0] not in SHIPPED}
        assert not foreign, path


def test_there_is_no_room_without_a_name():
    assert not [p for p in tracked(".py") if p.stem in {"utils", "util", "helpers", "misc", "common"}]


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine path", "registry host"])
def test_no_tracked_file_names(pattern):
    paths = [p for p in tracked() if p.stat().st_size < 1_000_000 and p != Path(__file__)]
    texts = {name: committed(name) if name in USERS else p.read_text(errors="replace")
             for p in paths for name in [p.relative_to(ROOT).as_posix()]}
    assert not [(name, hit.group()) for name, text in texts.items() for hit in pattern.finditer(text)]


def test_the_patterns_see_what_they_are_for():
    home = "".join(("/", "root", "/"))  # in pieces, here too
    assert MACHINE_PATH.search(f"open('{home}.cache')") and not MACHINE_PATH.search(f"https://a.b{home}x $HOME{home}")
    assert REGISTRY_HOST.search("--index-url https://pypi.org/simple")
