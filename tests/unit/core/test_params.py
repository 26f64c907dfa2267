"""params.yaml: one clear line for every mistake a user can make."""

from dataclasses import dataclass

import pytest
import yaml

from tasks.core.params import STAGES, Goal, construct, read_params, resolve

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
    blocks = {"goal": GOAL, "scale": "quick", "cluster": None, "resources": None, **{s: {} for s in STAGES}, **changes}
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
