"""One word per stage, everywhere: dvc.yaml, params.yaml, tasks/, artifacts/, reports/ and the flow agree, and in one order."""

import dataclasses
import importlib
import inspect
import subprocess
from pathlib import Path

import pytest
import yaml

from tasks.core.machine import TIMED
from tasks.core.params import SCALES, SHARED, STAGES, validate_all
from tasks.core.sampler import SPACINGS
from tasks.report.picture import PICTURE
from tests.contract.reading import ROOT, imports

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
ALWAYS = ("tasks/core", "tasks/runtime", "tasks/__init__.py", "constraints.txt")
SHELL = "from tasks.core.shell import main\nfrom tasks.{0} import stage\n\nmain(stage)\n"


def stage_of(name: str):
    return importlib.import_module(f"tasks.{name}.stage")


def upstream(name: str) -> list[str]:
    return [dep.removeprefix("artifacts/") for dep in PIPELINE["stages"][name]["deps"] if dep.startswith("artifacts/")]


def test_dvc_params_rooms_and_flow_name_the_same_stages_in_order():
    from flows import freshness
    assert tuple(PIPELINE["stages"]) == STAGES
    assert tuple(key for key in yaml.safe_load(Path("params.yaml").read_text()) if key not in SHARED) == STAGES
    assert tuple(freshness.dag()) == STAGES
    assert {p.parent.name for p in Path("tasks").glob("*/stage.py")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
class TestStage:
    def test_writes_one_folder_and_its_reports(self, name):
        spec = PIPELINE["stages"][name]
        assert spec["cmd"] == f"python -m tasks.{name}"
        assert spec["outs"] == [f"artifacts/{name}"]
        timed = [f"reports/{name}.timings.json"] if name in TIMED else []
        assert spec["metrics"] == [f"reports/{name}.json", *timed]

    def test_depends_on_its_room_and_on_shared_code(self, name):
        deps = PIPELINE["stages"][name]["deps"]
        assert {f"tasks/{name}", *ALWAYS} <= set(deps)
        assert len(deps) == len(set(deps))

    def test_reads_what_dvc_says(self, name):
        assert list(stage_of(name).INPUTS) == upstream(name)

    def test_borrowed_code_is_a_dependency(self, name):
        """A room that imports from another one is stale when that file changes."""
        deps = PIPELINE["stages"][name]["deps"]
        borrowed = {module for path in Path("tasks", name).glob("*.py") for level, module in imports(path)
                    if level == 0 and module.startswith("tasks.") and module.split(".")[1] not in ("core", "runtime", name)}
        for module in borrowed - {"tasks"}:
            parts = module.split(".")
            assert {"/".join(parts[:2]), "/".join(parts) + ".py"} & set(deps), f"{module} is imported, but not a dep of {name}"

    def test_tracks_its_params(self, name):
        fields = {f.name for f in dataclasses.fields(stage_of(name).Params)}
        assert PIPELINE["stages"][name]["params"] == [name, "scale", *(["goal"] if "goal" in fields else [])]

    def test_has_the_shape_of_a_stage(self, name):
        stage, room = stage_of(name), Path("tasks", name)
        assert (room / "__main__.py").read_text() == SHELL.format(name)
        assert (room / "__init__.py").read_text() == ""
        assert all(word in stage.__doc__ for word in ("Reads:", "Writes:", "Left out:"))
        assert stage.Params.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(stage.Params))
        assert list(inspect.signature(stage.run).parameters) == ["params", "inputs", "out"]

    def test_stays_readable(self, name):
        long = {str(p): n for p in Path("tasks", name).glob("*.py") if (n := len(p.read_text().splitlines())) > 400}
        assert not long


@pytest.mark.parametrize("scale", SCALES)
def test_params_are_valid(scale):
    assert validate_all(scale=scale)["scale"] == scale


@pytest.mark.parametrize("scale", SCALES)
def test_the_dull_front_holds_all_that_the_search_starts_from(scale):
    """Else the search would be compared with less than anyone has, the search itself included."""
    params = validate_all(scale=scale)
    dull, evolve = params["fid"]["dull"], params["evolve"]
    assert set(SPACINGS) <= set(dull["spacings"]) and set(evolve["solvers"]) <= set(dull["solvers"])
    assert max(dull["steps"]) >= evolve["steps"][1]


def test_template_paths_exist_by_default():
    """DVC cannot resolve an empty path, so `dvc repro` alone needs defaults that are there."""
    from flows import freshness
    assert freshness.check_paths(validate_all()) is None


def test_git_ignores_what_a_run_reports_and_tracks_what_was_published():
    written = [str(out) for spec in PIPELINE["stages"].values() for out in spec["metrics"]]
    published = [f"reports/{scale}/{Path(out).name}" for scale in SCALES for out in written]
    asked = subprocess.run(["git", "check-ignore", *written, *published], cwd=ROOT, capture_output=True, text=True, check=False)
    assert asked.stdout.splitlines() == written
    listed = set(subprocess.check_output(["git", "ls-files", "reports"], cwd=ROOT, text=True).splitlines())
    pictures = {f"reports/{scale}/{PICTURE}" for scale in SCALES}
    assert listed - pictures <= set(published), "a report of no stage"
    assert {path for path in published if "/quick/" in path} <= listed  # the last full run may be of fewer stages


def test_no_param_has_a_name_that_dvc_forgets():
    """DVC 3.67 drops every key of these names, params included, from what it looks up earlier runs by: with another value the
    old result would come back as a cached one."""
    def keys(value) -> set:
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()
    assert not {"size", "nfiles"} & keys(yaml.safe_load(Path("params.yaml").read_text()))
