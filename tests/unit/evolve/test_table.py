"""The log of a search as a DataFrame."""

import json

import pytest

from tasks.core.recipe import CachePlan, Recipe
from tasks.evolve.search import Evaluation, pareto_front
from tasks.evolve.table import COLUMNS, read_evaluations

PLAN = CachePlan(sublayers=("a", "b"), compute=((True, True), (False, True)))
RECIPES = (Recipe(timesteps=(9, 0), precision={"x": "w8a8", "y": "w4a6"}, cache=PLAN),
           Recipe(timesteps=(9, 5, 0), solver="dpm2m", precision={"x": "bf16"}, sparsity={"grain": "unit", "density": {}}),
           Recipe(timesteps=(9,)))
POINTS = ((0.3, 2.0), (0.1, 4.0), (0.2, None))


def write(path, points=POINTS):
    weights = ("teacher", "few_4", "teacher")
    rows = [{"asked": len(points) - 1 - k, "cost": cost, "distance": distance, "weights": weights[k % 3],
             "recipe": RECIPES[k % 3].to_json()}
            | ({"failed": "RuntimeError: no"} if distance is None else {}) for k, (cost, distance) in enumerate(points)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_for_each_candidate_in_the_order_asked(tmp_path):
    table = read_evaluations(write(tmp_path / "e.jsonl"))
    assert tuple(table.columns) == COLUMNS and table["asked"].tolist() == [0, 1, 2]
    last = table.iloc[2]
    assert (last["cost"], last["distance"], last["steps"], last["solver"], last["weights"]) == (0.3, 2.0, 2, "ddim", "teacher")
    assert (last["w_bits"], last["a_bits"], last["int8_share"], last["removed_share"]) == (6.0, 7.0, 0.5, 0.25)
    assert Recipe.from_json(last["recipe"]) == RECIPES[0]
    assert table.iloc[1][["weights", "w_bits", "steps"]].tolist() == ["few_4", 24.0, 3]  # bf16 and, unnamed, fp32


def test_a_failed_one_has_its_reason_and_is_on_no_front(tmp_path):
    table = read_evaluations(write(tmp_path / "e.jsonl"))
    assert table["failed"].isna().tolist() == [False, True, True] and table["failed"][0] == "RuntimeError: no"
    assert table["distance"].isna().tolist() == [True, False, False]
    assert table["on_front"].tolist() == [False, True, True]


def test_the_front_is_that_of_the_search(tmp_path):
    points = [(3.0, 3.0), (1.0, 5.0), (2.0, 5.0), (1.0, None), (5.0, 1.0), (1.0, 5.0), (4.0, 3.0), (0.5, None), (6.0, 1.0)]
    table = read_evaluations(write(tmp_path / "e.jsonl", points))
    expected = pareto_front([Evaluation(None, *point) for point in points])
    front = table[table["on_front"]].sort_values("cost")
    assert list(zip(front["cost"], front["distance"], strict=True)) == [(e.cost, e.loss) for e in expected]


def test_a_line_that_is_none_is_named(tmp_path):
    path = write(tmp_path / "e.jsonl")
    path.write_text(path.read_text() + '{"asked": 7}\n')
    with pytest.raises(ValueError, match=r"e.jsonl: line 4 is no evaluation: 'recipe'"):
        read_evaluations(path)
