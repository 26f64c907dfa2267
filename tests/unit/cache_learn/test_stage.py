"""The stage on a tiny random DiT: what it writes, that it writes the same bytes twice, and what it refuses."""

import csv
import json

import numpy as np
import pytest
import torch

from tasks.cache_learn import stage
from tasks.cache_learn.table import ReuseTable
from tasks.core.artifacts import Inputs
from tasks.core.denoiser import build, save
from tasks.core.recipe import CachePlan
from tasks.runtime.cache import TRUNK
from tasks.runtime.solver import solver_steps
from tests.unit.cache_learn.toy import CONFIG

DIT = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 1, "out_channels": 1, "num_layers": 2,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_type": "ada_norm_zero",
       "norm_elementwise_affine": False}
ROUTER = {"steps": 4, "batch": 2, "lr": 0.3, "lam": 1e-4, "reduction": "mean", "theta": 0.1, "label_dropout": 0.1}
PARAMS = {"base_steps": 6, "spacing": "uniform", "solver": "ddim", "grid": 4, "error_samples": 2, "max_gap": 2, "budget": 0.3,
          "max_masks": 3, "unit": "sublayer", "forecast": "taylor", "validation": 2, "seed": 0}
WEIGHTS = {"steps": 3, "batch": 2, "lr": 0.01, "window": 6}


def params(**changed) -> stage.Params:
    router, weights = {**ROUTER, **changed.pop("router", {})}, {**WEIGHTS, **changed.pop("weights", {})}
    refine = {"images": 2, "tries": 3, **changed.pop("refine", {})}
    return stage.Params(**{**PARAMS, **changed}, refine=stage.RefineParams(**refine),
                        router=stage.RouterParams(**router), weights=stage.WeightsParams(**weights))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(build("DiTTransformer2DModel", DIT, CONFIG), root / "teacher")
    np.save(root / "train.npy", rng.integers(0, 256, (12, 1, 8, 8), dtype=np.uint8))
    np.save(root / "train_labels.npy", np.arange(12) % 3)
    return {"data": root, "pretrain_load": root}


@pytest.fixture
def run(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # checkpoints live under the working directory

    def run(name="out", **changed):
        out = tmp_path / name
        out.mkdir()
        return stage.run(params(**changed), Inputs(folders, key=name.ljust(16, "_")), out), out

    return run


def test_what_it_writes_agrees_with_itself(run):
    report, out = run()
    errors, grid = np.load(out / "errors.npy"), json.loads((out / "grid.json").read_text())
    assert errors.shape == (4, 4, 4) and len(grid["timesteps"]) == 4 and len(grid["sublayers"]) == 4
    plan = json.loads((out / "plan.json").read_text())
    timesteps = plan.pop("timesteps")
    assert ReuseTable.read(out).costs(solver_steps(CONFIG, timesteps, "ddim")).shape == (4, 6, 6)
    shipped = CachePlan.from_json(plan)
    assert shipped.forecast == grid["forecast"] == "taylor"
    chosen = report.numbers["plans"][report.numbers["chosen"]]
    assert shipped.removed_share == chosen["removed_share"] >= 0.3 and len(shipped.masks) == chosen["masks"] <= 3
    other = report.numbers["plans"]["router" if report.numbers["chosen"] == "errors" else "errors"]
    assert chosen["rollout_mse_median"] <= other["rollout_mse_median"]
    with open(out / "router.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [1] * 4 + [3] * 4 + [5] * 4
    assert all(0 < float(r["beta"]) < 1 for r in rows)
    assert {int(r["timestep"]) for r in rows} == {timesteps[i] for i in (1, 3, 5)}


@pytest.mark.parametrize("forecast", ["taylor", "learned"])
def test_the_same_bytes_twice(run, forecast):
    (first, a), (second, b) = run("a", forecast=forecast), run("b", forecast=forecast)
    assert first == second
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_learned_weights_ship_and_other_lists_get_theirs_from_the_table(run):
    report, out = run(forecast="learned")
    shipped = json.loads((out / "plan.json").read_text())
    del shipped["timesteps"]
    assert CachePlan.from_json(shipped).forecast == "learned"
    assert json.loads((out / "grid.json").read_text())["forecast"] == "learned"
    with open(out / "forecast_curve.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3"]
    taylor = run("taylor")[0].numbers["plans"]
    assert report.numbers["plans"]["errors"]["rollout_mse_mean"] != taylor["errors"]["rollout_mse_mean"], "weights are live"


def test_all_blocks_are_one_unit(run):
    """Of what the table says; the router, as published, looks at every sublayer."""
    report, out = run(unit="trunk", forecast="learned")
    assert ReuseTable.read(out).sublayers == [TRUNK]
    assert {row.split(",")[2] for row in (out / "router.csv").read_text().splitlines()[1:]} == {
        f"transformer_blocks.{i}.{part}" for i in range(2) for part in ("attn1", "ff")}
    assert report.numbers["plans"]["refined"]["removed_share"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("changed", [{"budget": 0.0}, {"max_masks": 1}])
def test_where_nothing_may_be_skipped_nothing_is_learned(run, changed):
    refined = run(forecast="learned", **changed)[0].numbers["plans"]["refined"]
    assert refined["removed_share"] == 0 and refined["rollout_mse_mean"] == 0


def test_the_forecast_is_live_where_plans_are_compared(run):
    reuse, forecast = (run(name, forecast=name)[0].numbers["plans"]["errors"] for name in ("none", "taylor"))
    assert reuse["removed_share"] == forecast["removed_share"]
    assert reuse["rollout_mse_mean"] != forecast["rollout_mse_mean"]


def test_rules_without_learning_only_reuse(run):
    reuse, forecast = (run(name, forecast=name)[0].numbers["plans"] for name in ("none", "taylor"))
    for name in ("router_published", "uniform_interval", "time_threshold"):
        assert reuse[name] == forecast[name]


def test_no_budget_removes_nothing_and_costs_nothing(run):
    report, _ = run(budget=0.0)
    for name in ("errors", "router", "uniform_interval", "time_threshold"):
        nothing = {"removed_share": 0.0, "masks": 1, "rollout_mse_mean": 0.0, "rollout_mse_median": 0.0}
        assert report.numbers["plans"][name] == nothing


@pytest.mark.parametrize(("changed", "message"), [
    ({"budget": 1.0}, "budget: 1.0 is not between 0 and 0.95"),
    ({"max_gap": 4}, "max_gap: 4 is not between 1 and 3"),
    ({"base_steps": 1}, "base_steps: 1"),
    ({"spacing": "cosine"}, "spacing: 'cosine'"),
    ({"router": {"reduction": "max"}}, "router.reduction: 'max'"),
    ({"router": {"theta": 2.0}}, "router.theta: 2.0"),
    ({"forecast": "cubic"}, "forecast: 'cubic'"),
    ({"weights": {"window": 0}}, "weights.window: 0 is not between 1 and 1000"),
])
def test_params_out_of_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        params(**changed)


def unet(**changes) -> dict:
    return {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8],
            "norm_num_groups": 4, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], **changes}


def test_labels_are_dropped_only_where_there_is_a_null_label(folders, run, tmp_path):
    """A UNet whose rows are all classes; before, the label after the last one was looked up in its table."""
    save(build("UNet2DModel", unet(num_class_embeds=3), CONFIG), tmp_path / "classes/teacher")
    folders = folders | {"pretrain_load": tmp_path / "classes"}
    (tmp_path / "out").mkdir()
    report = stage.run(params(router={"label_dropout": 1.0}), Inputs(folders, key="u" * 16), tmp_path / "out")
    assert report.numbers["plans"]["router"]["removed_share"] > 0


def test_skip_blocks_are_planned_sublayer_by_sublayer_and_it_is_said(capsys):
    """Each of their blocks hands on an image beside its output: they are no trunk."""
    skips = build("UNet2DModel", unet(in_channels=3, out_channels=3, block_out_channels=[8, 8],
                                      down_block_types=["SkipDownBlock2D"] * 2, up_block_types=["SkipUpBlock2D"] * 2), CONFIG)
    assert stage.units_of(skips, "trunk") == stage.units_of(skips, "sublayer") == [s.name for s in skips.sublayers()]
    said = capsys.readouterr().out
    assert said.count("cache_learn.unit: trunk, but skip blocks hand on an image beside their output") == 1
    assert stage.units_of(build("UNet2DModel", unet(), CONFIG), "trunk") == [TRUNK]
