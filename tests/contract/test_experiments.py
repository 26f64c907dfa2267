"""`dvc exp run -S`: DVC rewrites params.yaml, and every other value, every comment and every block is still what it was.

DVC's own code changes the file (Hydra's overrides, ruamel.yaml's dumper) and reads it (what goes into dvc.lock and its paths).
"""

import random
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import load_yaml

from tasks.core.params import SCALES, read_params, read_yaml, validate_all
from tests.contract.reading import ROOT, committed


def leaves(value, prefix: str = "") -> dict:
    """`a.b` -> value of everything that is no block; {} counts as a value."""
    if isinstance(value, dict) and value:
        return {path: leaf for key, below in value.items() for path, leaf in leaves(below, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def written(value) -> str:
    """As a user types it behind `-S key=`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return f"'{value}'" if isinstance(value, str) else "{}" if value == {} else repr(value)


def another(value):
    """A value of the same type, where there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, value[0]] if len(value) < 4 else value[1:]
    if isinstance(value, str):
        return f"{value}_2"
    return 1e-5 if isinstance(value, float) else 7 if value is None else value + 1


PARAMS = committed("params.yaml")
LEAVES = leaves(yaml.safe_load(PARAMS))
CHANGEABLE = {key: value for key, value in LEAVES.items() if value != {}}


@pytest.fixture
def params(tmp_path):
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path / "params.yaml"


def comments(path: Path) -> list[str]:
    return sorted(re.findall(r"# .*", path.read_text()))


def check_one(params: Path, key: str, value) -> None:
    params.write_text(PARAMS)
    before = comments(params)
    apply_overrides(str(params), [f"{key}={written(value)}"])
    found = leaves(read_yaml(params))
    assert found == LEAVES | {key: value} and type(found[key]) is type(value), key
    assert leaves(load_yaml(str(params))) == found, "what DVC puts into dvc.lock is what the stage runs with"
    assert leaves(yaml.safe_load(params.read_text())).keys() == found.keys(), "other readers see the same tree"
    assert comments(params) == before, key


@pytest.mark.parametrize("key", random.Random(0).sample(sorted(CHANGEABLE), 8))
def test_one_key_changes_and_nothing_else(params, key):
    check_one(params, key, another(LEAVES[key]))


@pytest.mark.slow
@pytest.mark.parametrize("change", [another, lambda value: value], ids=["another value", "the same value"])
def test_every_key_changes_alone(params, change):
    for key, value in CHANGEABLE.items():
        check_one(params, key, change(value))


@pytest.mark.parametrize("change", [another, lambda value: value], ids=["other values", "the same values"])
def test_all_keys_at_once(params, change):
    wanted = {key: change(value) for key, value in CHANGEABLE.items()}
    apply_overrides(str(params), [f"{key}={written(value)}" for key, value in wanted.items()])
    assert leaves(read_yaml(params)) == LEAVES | wanted == leaves(load_yaml(str(params)))


def test_a_rewritten_file_is_valid_and_is_rewritten_again(params):
    """What DVC wrote once it reads, changes and writes again: nothing creeps."""
    before = {scale: validate_all(params, scale) for scale in SCALES}
    for _ in range(2):
        apply_overrides(str(params), ["evolve.seed=0"])
    assert {scale: validate_all(params, scale) for scale in SCALES} == before


@pytest.mark.parametrize("override, key, value", [
    ("distill.lr=1e-5", "distill.lr", 1e-5),                    # written 1e-05, a string in YAML 1.1
    ("evolve.evaluations.quick=5", "evolve.evaluations", 5),
    ("evolve.evaluations={quick: 5, full: 9}", "evolve.evaluations", 5),
    ("evolve.evaluations=5", "evolve.evaluations", 5),          # one value for both scales
    ("mask_search.grains.quick=[2of4,1of4,fine]", "mask_search.grains", ["2of4", "1of4", "fine"]),
    ("evolve.steps.quick=[4,12]", "evolve.steps", [4, 12]),
    ("goal.max_size=1_000_000", "goal.max_size", 1_000_000),
    ("goal.max_size=null", "goal.max_size", None),
    ("data.inception=on", "data.inception", "on"),              # true in YAML 1.1
    ("pretrain_load.revision='12e4567'", "pretrain_load.revision", "12e4567"),  # a commit that looks like a number
    ("pretrain_load.revision='0123456'", "pretrain_load.revision", "0123456"),
    ("cluster.address='10.0.0.1:6379'", "cluster.address", "10.0.0.1:6379"),
    ("cluster.storage_uri='s3://bucket/press'", "cluster.storage_uri", "s3://bucket/press"),
    ("+resources.distill={cpus: 8, gpus: 1}", "resources.distill", {"cpus": 8, "gpus": 1}),
])
def test_what_a_user_types_arrives(params, override, key, value):
    apply_overrides(str(params), [override])
    found = read_params(params, "quick")
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


def test_no_string_of_params_needs_quotes_that_dvc_drops():
    """DVC writes 2:4 in a list bare and cannot read that back."""
    strings = [v for value in LEAVES.values() for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
    assert strings and not [s for s in strings if yaml.safe_load(f"[{s}]") != [s] and not s.startswith("*")]

@pytest.mark.parametrize("line, named", [
    ('cluster: {address: "10.0.0.1:6379", workers: 2}', "cluster: {address: 10.0.0.1:6379, workers: 2}"),
    ('grains: {quick: ["2:4"]}', "grains: {quick: [2:4]}"),
    ('grains: ["2:4"]', None), ("cluster:\n  address: '10.0.0.1:6379'", None)])  # which it writes one entry a line
def test_doctor_says_what_dvc_could_not_read_back(tmp_path, monkeypatch, line, named):
    from flows import doctor
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(f"scale: quick\n{line}\n")
    found = list(doctor.experiments())
    assert [verdict for verdict, _ in found] == (["note"] if named else [])
    assert named is None or f"would fail on `{named}`" in found[0][1]


def test_no_dependency_is_ignored_by_git():
    """A second clone, `dvc exp run --temp` and `--queue` have only what git tracks and what DVC makes."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    deps = {dep for stage in stages for dep in stage["deps"] if not dep.startswith(("artifacts/", "${"))}
    ignored = subprocess.run(["git", "check-ignore", *sorted(deps)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ignored.returncode, ignored.stdout) == (1, "")
    assert not [dep for dep in deps if not subprocess.check_output(["git", "ls-files", dep], cwd=ROOT)]
