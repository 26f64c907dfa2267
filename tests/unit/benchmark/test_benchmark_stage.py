"""The stage on packages of a tiny teacher: paper costs against arithmetic by hand, timings by shape only."""

import csv
from dataclasses import replace
from functools import partial

import pytest
import torch

from tasks.benchmark import stage
from tasks.core.artifacts import Inputs, write_json
from tasks.core.cost import layer_costs
from tasks.core.denoiser import build, save
from tasks.core.params import Goal
from tasks.core.recipe import CachePlan, Recipe
from tasks.package.write import write_package

DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 10, "norm_elementwise_affine": False,
       "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}
SCHEDULE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction", "clip_sample": True}
GOAL = Goal(target="latency", max_quality_loss=0.05, min_speedup=1.0, max_bitops=0.5, max_size=None)
PARAMS = stage.Params(batches=(1, 3), warmup=1, min_repeats=2, max_repeats=2, budget_s=0.0, timed_steps=2, memory=(),
                      backend="openvino", batch=3, undecided_budget_s=100.0, goal=GOAL)
LAYER = "transformer_blocks.0.ff.net.2"
STEPS = (900, 600, 300, 100)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Every variant is dense but `compressed` (bf16 in one layer, cached every other step) and `dull_best` (two steps)."""
    torch.manual_seed(0)
    teacher = build("DiTTransformer2DModel", DIT, SCHEDULE)
    root = tmp_path_factory.mktemp("inputs")
    folders = {name: root / name for name in stage.INPUTS}
    save(teacher, folders["pretrain_load"] / "teacher")
    dense = Recipe(timesteps=STEPS)
    names = tuple(s.name for s in teacher.sublayers())
    cache = CachePlan(sublayers=names, compute=tuple((step % 2 == 0,) * len(names) for step in range(len(STEPS))))
    for name in (*(v for v in stage.VARIANTS if v != "dull_best"), "dull_fp32"):
        recipe = replace(dense, precision={LAYER: "bf16"}, cache=cache) if name == "compressed" else dense
        write_package(teacher, recipe, {}, {}, folders["package"] / name)
    folders["fid"].mkdir()
    few = replace(dense, timesteps=(900, 400))
    write_json(folders["fid"] / "dull_best.json", {"package": "dull_fp32", "recipe": few.to_json()})
    return Inputs(folders, "key")


def eager(opened, folder, backend, batch, threads):
    return opened(folder, "eager", batch, threads)


@pytest.fixture(scope="module")
def measured(inputs, tmp_path_factory):
    """The stage with the graphs replaced by the torch form."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stage, "open_backend", partial(eager, stage.open_backend))
        return stage.run(PARAMS, inputs, out), out


def test_every_variant_backend_and_batch_is_timed(measured):
    report, out = measured
    for name in stage.VARIANTS:
        for backend in stage.BACKENDS:
            assert sorted(report.timings[name][backend]) == ["b1", "b3"]
            for batch, b in report.timings[name][backend].items():
                assert b["images_per_s"] > 0 and b["latency_ms_p95"] >= b["latency_ms_p50"] > 0
                judged = (backend, batch) == ("openvino", "b3") and name in ("dense", "dull_best", "compressed")
                assert b["repeats"] >= 8 if judged else b["repeats"] == 2
    with open(out / "benchmark.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(stage.VARIANTS) * 4 and {row["nfe"] for row in rows if row["variant"] == "dull_best"} == {"2"}


def test_a_verdict_has_its_intervals_where_it_is_asked_for(measured):
    timings = measured[0].timings
    ours, dense, dull = (timings[name]["openvino"]["b3"] for name in ("compressed", "dense", "dull_best"))
    for name, base in (("speedup", dense), ("over_dull_best", dull)):
        assert ours[f"{name}_low"] <= ours["images_per_s"] / base["images_per_s"] <= ours[f"{name}_high"]
    assert "speedup_low" not in timings["compressed"]["openvino"]["b1"], "two rounds have none"
    assert not any(key.startswith("speedup") for key in dense)
    assert "95 %" in timings["protocol"]["intervals"] and "goal" not in timings["protocol"]


@pytest.mark.parametrize("change, asked", [({}, 2), ({"backend": "eager"}, 0), ({"batch": 1}, 0),
                                           ({"goal": replace(GOAL, target="bitops")}, 0)])
def test_timing_goes_on_for_a_goal_of_latency_at_the_reports_setting(change, asked):
    found = stage.questions(replace(PARAMS, **change), "openvino", 3)
    assert [(q.base, q.ours, q.bound) for q in found] == [
        ("dense.openvino.b3", "compressed.openvino.b3", 1.0), ("dull_best.openvino.b3", "compressed.openvino.b3", 1.0)][:asked]


def test_timings_carry_machine_and_protocol(measured):
    timings = measured[0].timings
    assert timings["machine"]["cores"] >= 1 and timings["protocol"]["threads"] == torch.get_num_threads()
    assert timings["protocol"]["batches"] == (1, 3)
    assert 0 <= timings["load"]["foreign_cpus"] <= timings["load"]["cpus"] + 0.5


def test_costs_on_paper_by_hand(measured, inputs):
    numbers = measured[0].numbers
    torch.manual_seed(0)
    costs = {c.name: c for c in layer_costs(build("DiTTransformer2DModel", DIT, SCHEDULE))}
    once = sum(c.macs for c in costs.values())
    inside = sum(c.macs for c in costs.values() if c.sublayer)
    assert numbers["dense"]["macs"] == 4 * once and numbers["dense"]["bitops"] == 4 * once * 32 * 32
    assert numbers["dull_best"]["macs"] == 2 * once
    assert numbers["compressed"]["macs"] == 4 * once - 2 * inside
    narrow = 2 * costs[LAYER].macs * (32 * 32 - 16 * 16)  # computed at two of the four steps
    assert numbers["compressed"]["bitops"] == (4 * once - 2 * inside) * 32 * 32 - narrow
    folder = inputs["package"] / "dense"
    files = [folder / "recipe.json", *(folder / "denoiser" / n for n in ("config.json", "packing.json", "weights.safetensors"))]
    assert numbers["dense"]["size_bytes"] == sum(f.stat().st_size for f in files) > numbers["compressed"]["size_bytes"]


def test_which_steps_are_timed():
    dense = Recipe(timesteps=STEPS)
    cached = replace(dense, cache=CachePlan(sublayers=("a",), compute=((True,),) * 4))
    assert [stage.timed_steps(r, batch, 2) for r, batch in ((dense, 1), (dense, 8), (cached, 8))] == [4, 2, 4]
    assert stage.timed_steps(dense, 8, 10) == 4


def test_sampling_takes_the_first_steps_of_the_recipe():
    taken = []

    def predict(x, t, labels, step):
        taken.append((step, t.tolist(), labels.tolist()))
        return x

    shipped = stage.Shipped(folder=None, recipe=Recipe(timesteps=STEPS), shape=(1, 8, 8), num_classes=10, schedule=SCHEDULE)
    stage.sampling(predict, shipped, batch=2, steps=3)()
    assert taken == [(i, [t, t], [0, 1]) for i, t in enumerate(STEPS[:3])]


@pytest.mark.parametrize("change, message", [
    ({"batches": ()}, r"batches: \[\] is empty"),
    ({"batches": (0,)}, r"batches\[0\]: 0 is not between 1"),
    ({"memory": ("compresed",)}, "did you mean compressed"),
    ({"batch": 2}, r"benchmark.batch: 2 is not one of benchmark.batches: \[1, 3\]"),
    ({"backend": "cuda"}, "benchmark.backend: 'cuda' is not one of eager, openvino"),
    ({"undecided_budget_s": -1.0}, "undecided_budget_s: -1.0 is not between 0"),
    ({"min_repeats": 3}, "min_repeats: 3 is not between 1 and 2"),
])
def test_params_out_of_bounds_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PARAMS, **change)
