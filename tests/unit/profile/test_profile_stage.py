"""The stage on a tiny model, and the additive model of time on a table worked out by hand."""

import json

import pandas as pd
import pytest
import torch

from tasks.core.artifacts import Inputs
from tasks.core.cost import layer_costs
from tasks.core.denoiser import build, load, save
from tasks.core.latency import WHOLE, additive_latency, column, load_layers
from tasks.pretrain_load.architectures import SCHEDULE, dit
from tasks.profile import stage

COLUMNS = ["layer", "kind", "backend", "precision", "grain", "density", "batch", "time_us"]


@pytest.fixture
def table():
    """Two layers and a remainder: 100 = 60 + 30 + 10 in fp32, 50 = 20 + 10 + 20 in int8."""
    def row(layer, precision, time_us, grain="dense", density=1.0):
        return {"layer": layer, "kind": "linear", "backend": "openvino", "precision": precision, "grain": grain,
                "density": density, "batch": 8, "time_us": time_us}
    return pd.DataFrame([row("a", "fp32", 60.0), row("b", "fp32", 30.0), row(WHOLE, "fp32", 100.0),
                         row("a", "int8", 20.0), row("b", "int8", 10.0), row(WHOLE, "int8", 50.0),
                         row("a", "fp32", 34.0, "unit", 0.5), row("a", "fp32", 20.0, "unit", 0.25),
                         row("a", "fp32", 60.0, "2:4", 0.5)])


def test_uniform_precision_is_the_whole_model(table):
    assert additive_latency(table, {}, {}, "openvino", 8) == pytest.approx(100)
    assert additive_latency(table, {"a": "w8a8", "b": "w4a8"}, {}, "openvino", 8) == pytest.approx(50)


def test_a_mixed_plan_by_hand(table):
    """a in int8: 20 + 30, and the remainders 20 and 10 weighted 60 : 30."""
    assert additive_latency(table, {"a": "w8a8"}, {}, "openvino", 8) == pytest.approx(50 + (60 * 20 + 30 * 10) / 90)


def test_density_by_hand(table):
    at = lambda density, grain="unit": additive_latency(table, {}, {"a": density}, "openvino", 8, grain)  # noqa: E731
    assert at(0.5) == pytest.approx(74) and at(0.75) == pytest.approx(100 - 60 + 47)
    assert at(0.1) == at(0.25) == pytest.approx(60)  # nothing was measured below
    assert at(0.5, "2:4") == pytest.approx(100)
    assert additive_latency(table, {}, {"b": 0.5}, "openvino", 8) == pytest.approx(100)  # no pruned form of b was measured


def test_tokens_and_missing_rows(table):
    assert [column(t) for t in ("fp32", "bf16", "w8a8", "w3a5")] == ["fp32", "bf16", "int8", "int8"]
    with pytest.raises(ValueError, match=r"nothing for backend eager at batch 8; it holds \[\('openvino', 8\)\]"):
        additive_latency(table, {}, {}, "eager", 8)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    torch.manual_seed(0)
    save(build("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=2, heads=2, patch=2), SCHEDULE), folder / "teacher")
    params = stage.Params(batches=(2,), densities=(0.5,), repeats=3)
    report = stage.run(params, Inputs({"pretrain_load": folder}, key=""), folder)
    return folder, report


def test_every_layer_has_every_row(profiled):
    folder, report = profiled
    rows = pd.read_csv(folder / "layers.csv")
    costs = layer_costs(load(folder / "teacher"))
    assert list(rows.columns) == COLUMNS and report.numbers["rows"] == len(rows)
    dense = rows[rows.grain == "dense"]
    assert len(dense) == 6 * len(costs) and set(dense.layer) == {c.name for c in costs} and (dense.density == 1).all()
    narrowed = {f"transformer_blocks.{i}.ff.net.{part}" for i in (0, 1) for part in ("0.proj", "2")}
    narrowed |= {f"transformer_blocks.{i}.attn1.{part}" for i in (0, 1)
                 for part in ("to_q", "to_k", "to_v", "to_out.0", "qk", "av")}
    assert set(rows[rows.grain == "unit"].layer) == narrowed
    assert (rows[rows.grain != "dense"].density == 0.5).all()
    assert (rows.time_us >= 0).all() and (rows[(rows.kind == "linear") & (rows.backend == "eager")].time_us > 0).all()


def test_whole_models_are_timed_and_predicted(profiled):
    folder, report = profiled
    whole, table = pd.read_csv(folder / "model.csv"), load_layers(folder)
    assert list(whole.columns) == ["backend", "precision", "batch", "time_us", "spread"] and len(whole) == 12
    names = [c.name for c in layer_costs(load(folder / "teacher"))]
    for row in whole.itertuples():
        assert report.timings[f"{row.backend}.{row.precision}.b2.time_us"] == row.time_us
        if row.precision in stage.TURNS:
            continue
        plan = dict.fromkeys(names, stage.TOKENS[row.precision])
        assert additive_latency(table, plan, {}, row.backend, 2) == pytest.approx(row.time_us)
        parts = table[(table.backend == row.backend) & (table.precision == row.precision) & (table.grain == "dense")]
        assert parts[parts.layer != WHOLE].time_us.sum() < 1.1 * row.time_us  # medians of parts, so not exactly


def test_slow_counters_are_scaled_to_the_whole_and_fast_ones_left():
    parts = {"a": [60.0, 50.0, 70.0], "b": [40.0], "": [20.0]}
    assert stage.scale(parts, [90.0, 80.0, 200.0]) == 90 / 120
    assert stage.scale(parts, [300.0]) == 1.0


def test_the_machine_is_described_without_its_name(profiled):
    machine = json.loads((profiled[0] / "machine.json").read_text())
    assert set(machine) == {"cpu", "cores", "flags", "gpus", "threads", "torch", "openvino"}


@pytest.mark.parametrize(("change", "message"), [
    ({"batches": (0,)}, "profile.batches: 0"), ({"densities": (1.0,)}, "profile.densities: 1.0"),
    ({"repeats": 1}, "profile.repeats: 1")])
def test_params_out_of_bounds(change, message):
    with pytest.raises(ValueError, match=message):
        stage.Params(**({"batches": (8,), "densities": (0.5,), "repeats": 5} | change))
