"""The stage on a tiny model."""

import json

import pandas as pd
import pytest
import torch

from tasks.core.artifacts import Inputs
from tasks.core.cost import layer_costs
from tasks.core.denoiser import build, load, save
from tasks.core.latency import read_times
from tasks.pretrain_load.architectures import SCHEDULE, dit
from tasks.profile import stage

COLUMNS = ["layer", "kind", "backend", "precision", "grain", "density", "batch", "time_us"]


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
    whole = pd.read_csv(folder / "model.csv")
    assert list(whole.columns) == ["backend", "precision", "batch", "time_us", "spread"] and len(whole) == 12
    names = [c.name for c in layer_costs(load(folder / "teacher"))]
    for row in whole.itertuples():
        assert report.timings["load"]["foreign_cpus"] >= 0
        assert report.timings[f"{row.backend}.{row.precision}.b2.time_us"] == row.time_us
        if row.precision in stage.TURNS:
            continue
        times, token = read_times(folder, row.backend, 2, None), stage.TOKENS[row.precision]
        layers = sum(times.of(name, token) for name in names)
        assert times.whole(token) == pytest.approx(row.time_us)
        assert layers + times.remainder(dict.fromkeys(names, token)) == pytest.approx(row.time_us)
        assert layers < 1.1 * row.time_us  # medians of parts, so not exactly


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
