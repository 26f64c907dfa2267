"""params.yaml: one clear line for every mistake a user can make."""

from dataclasses import dataclass

import pytest
import yaml

from tasks.core.params import STAGES, Goal, construct, read_params, read_yaml, resolve

GOAL = {"target": "latency", "max_quality_loss": 0.05, "min_speedup": 3, "max_bitops": None, "max_size": None}


@dataclass(frozen=True, kw_only=True)
class Example:
    steps: int
    lr: float
    name: str | None
    grid: tuple[int, ...]
    weights: dict[str, float]


GOOD = {"steps": 3, "lr": 1, "name": None, "grid": [1, 2], "weights": {"a": 1}}


def write(tmp_path, **changes):
    path = tmp_path / "params.yaml"
    shared = {"goal": GOAL, "scale": "quick", "threads": None, "cluster": None, "resources": None}
    blocks = {**shared, **{s: {} for s in STAGES}, **changes}
    path.write_text(yaml.safe_dump(blocks))
    return path


def test_lists_become_tuples_and_whole_numbers_floats():
    found = construct(Example, GOOD, "x")
    assert found == Example(steps=3, lr=1.0, name=None, grid=(1, 2), weights={"a": 1.0})
    assert isinstance(found.lr, float)


@pytest.mark.parametrize("change, message", [
    ({"steps": "3"}, r"x\.steps: '3' is not of type int"),
    ({"steps": True}, r"x\.steps: True is not of type int"),
    ({"steps": 3.5}, r"x\.steps: 3\.5 is not of type int"),
    ({"grid": [1, "b"]}, r"x\.grid\[1\]: 'b' is not of type int"),
    ({"stpes": 4}, r"x: unknown key 'stpes' \(did you mean steps\?\)"),
])
def test_a_mistake_names_the_key_and_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        construct(Example, GOOD | change, "x")


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="x: missing lr"):
        construct(Example, {k: v for k, v in GOOD.items() if k != "lr"}, "x")


@pytest.mark.parametrize("change, message", [
    ({"target": "latncy"}, "goal.target: 'latncy' is not one of latency, bitops, size .did you mean latency"),
    ({"max_quality_loss": -1}, "goal.max_quality_loss: -1.0 is not between 0 and 10"),
    ({"min_speedup": None}, "goal.min_speedup: null, but goal.target 'latency' needs a number there"),
])
def test_goal_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        construct(Goal, GOAL | change, "params.yaml: goal")


def test_scale_picks_among_quick_and_full_anywhere():
    tree = {"a": {"quick": 1, "full": 2}, "b": [{"quick": 3, "full": 4}], "c": {"quick": 1}}
    assert resolve(tree, "full") == {"a": 2, "b": [4], "c": {"quick": 1}}


def test_the_file_itself(tmp_path):
    assert read_params(write(tmp_path, fid={"n": {"quick": 1, "full": 9}}), "full")["fid"] == {"n": 9}
    with pytest.raises(ValueError, match="unknown key 'distil' .did you mean distill"):
        read_params(write(tmp_path, distil={}))
    with pytest.raises(ValueError, match="scale: 'fast' is not one of quick, full"):
        read_params(write(tmp_path, scale="fast"))
    with pytest.raises(ValueError, match="none.yaml: not found"):
        read_params(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="broken.yaml: not YAML"):
        read_params(tmp_path / "broken.yaml")


@pytest.mark.parametrize("text, value", [
    ("1e-05", 1e-5), ("5.e3", 5000.0), ("1e5", 1e5), ("on", "on"), ("No", "No"), ("1:30", "1:30"), ("017", 17), ("0o17", 15),
    ("1_000", 1000), ("2of4", "2of4"), ("[2of4, 1of4]", ["2of4", "1of4"]), ("", None), ("~", None), ("'on'", "on"), ("é", "é")])
def test_values_are_what_dvc_reads(tmp_path, text, value):
    """YAML 1.2, which DVC hashes and fills into dvc.yaml; YAML 1.1 reads the first eight otherwise."""
    from dvc.utils.serialize import load_yaml
    path = tmp_path / "params.yaml"
    path.write_text(f"a: {text}\n", encoding="utf-8")
    found = read_yaml(path)["a"]
    assert found == value == load_yaml(str(path))["a"] and type(found) is type(value)


@pytest.mark.parametrize("text, message", [
    ("a: 1\nb: 2\na: 3", 'line 3: key "a" stands twice'), ("a: {b: 1, b: 2}", 'key "b" stands twice'),
    ("a: [2:4]", "line 1: found unexpected ':'"), ("a: !!int x", "invalid literal for int"), ("a: *b", "undefined alias"),
    ("a: !!bool x", "'x'"), ("a: !!python/object:os.system x", "could not determine a constructor"),
    ("a: \x07", "control characters"), ("? [{a: 1}]\n: 3", "unhashable"), ("a: 1\n---\na: 2", "found another document")])
def test_what_is_no_yaml_is_one_line(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ValueError) as failure:
        read_yaml(tmp_path / "params.yaml")
    said = str(failure.value)
    assert said.startswith(f"{tmp_path / 'params.yaml'}: not YAML: ") and message in said and "\n" not in said


def test_an_anchor_inside_itself_is_one_line(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text().replace("fid: {}", "fid: &a {b: *a}"))
    with pytest.raises(ValueError, match="holds an alias .* of itself"):
        read_params(path)
