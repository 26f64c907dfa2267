"""The whole stage on real 8 x 8 digits: packages are fakes whose network shows a digit of its label, each a little off."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tasks.core.artifacts import Inputs, read_json, write_json
from tasks.core.cluster import Cluster, ClusterParams
from tasks.core.denoiser import Schedule
from tasks.core.params import Goal
from tasks.core.recipe import Recipe
from tasks.data import stage as data_stage
from tasks.fid import stage
from tasks.fid.sampling import sample_jobs as draw
from tasks.runtime import graph

GOAL = Goal(target="latency", max_quality_loss=0.05, min_speedup=2.0, max_bitops=None, max_size=None)
DULL = stage.DullParams(precisions=("fp32", "int8"), solvers=("ddim",), spacings=("uniform",), steps=(2, 6), heat=20,
                        kept=1, rounds=(40, 80), seed=7, batch=8)
PARAMS = stage.Params(samples=100, pairs=20, batch=20, seed=1, resamples=50, dull=DULL, goal=GOAL)
HERE = Cluster(ClusterParams(address=None, workers=1, cpus_per_worker=1, gpus_per_worker=0, max_attempts=1, max_object_mb=1,
                             storage_uri=None, connect_timeout_s=1, start_timeout_s=1))
INT8 = {"layer": "w8a8"}
RECIPES = {
    "dense": Recipe(timesteps=(999, 833, 666, 500, 333, 166)),
    "few_steps_ddim": Recipe(timesteps=(999, 500, 250)),
    "precision": Recipe(timesteps=(999, 500, 250), precision=INT8),
    "compressed": Recipe(timesteps=(999, 500, 250), precision=INT8),
    "dull_fp32": Recipe(timesteps=(999, 0)),
    "dull_int8": Recipe(timesteps=(999, 0), precision=INT8),
}
WEIGHTS = {name: {"bytes": 100 if recipe.precision else 400, "blake2b": name} for name, recipe in RECIPES.items()}
HARM = {"precision": 0.1, "compressed": 0.5, "dull_int8": 0.2}  # share of noise in what the network shows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Artifacts of data (real), profile, package and pretrain_load (as far as the stage reads them)."""
    folders = {name: tmp_path_factory.mktemp("artifacts") / name for name in stage.INPUTS}
    for folder in folders.values():
        folder.mkdir()
    params = data_stage.Params(source="digits", path=None, side=8, channels=1, holdout=297, seed=0, epochs=3, batch=64, lr=4e-3,
                               judge="small", inception=None)
    data_stage.run(params, Inputs({}, "key"), folders["data"])
    (folders["profile"] / "model.csv").write_text(
        "backend,precision,batch,time_us\nopenvino,fp32,8,4000\nopenvino,int8,8,1000\n")
    for name, recipe in RECIPES.items():
        (folders["package"] / name).mkdir()
        write_json(folders["package"] / name / "recipe.json", recipe.to_json())
        write_json(folders["package"] / name / "package.json", {"files": {"denoiser/weights.safetensors": WEIGHTS[name]}})
    return Inputs(folders, "key", HERE)


@pytest.fixture
def fakes(inputs, monkeypatch, tmp_path):
    """-> names of the packages opened."""
    digits, labels = (np.load(inputs["data"] / f"holdout{part}.npy") for part in ("", "_labels"))
    shown = torch.stack([torch.from_numpy(digits[labels == k][0]) for k in range(10)]).float() / 127.5 - 1
    opened = []

    def open_graph(folder: Path, batch: int, threads: int):
        opened.append(folder.parent.name)
        harm = HARM.get(folder.parent.name, 0.0)
        static = torch.randn(shown.shape[1:], generator=torch.Generator().manual_seed(0))
        return lambda x, t, y, step: 0.9 * shown[y] + 0.1 * x.clamp(-1, 1) + harm * static

    config = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "sample"}
    teacher = SimpleNamespace(schedule=Schedule.from_config(config), sample_shape=(1, 8, 8), num_classes=10)
    monkeypatch.setattr(graph, "open_graph", open_graph)
    monkeypatch.setattr(stage, "load", lambda folder: teacher)
    monkeypatch.chdir(tmp_path)  # checkpoints
    return opened


def run(inputs, out: Path, params=PARAMS) -> dict:
    out.mkdir()
    return stage.run(params, inputs, out).numbers


def test_every_variant_has_its_row_and_samples(inputs, fakes, tmp_path):
    numbers = run(inputs, tmp_path / "fid")
    variants = {"dense", "few_steps_ddim", "precision", "compressed", "dull_best"}
    assert set(numbers) == variants | {"dull", "protocol"}
    for name in variants:
        assert {"fid_100", "kid", "precision", "recall", "fidelity", "nfe", "solver", "class_accuracy"} <= set(numbers[name])
        assert np.load(tmp_path / "fid" / "samples" / f"{name}.npy").shape == (40, 1, 8, 8)
    assert numbers["dense"]["nfe"] == 6 and numbers["dense"]["class_accuracy"] == 1.0
    assert {"nn_train", "nn_holdout", "memorised"} <= set(numbers["compressed"])
    assert len((tmp_path / "fid" / "fid.csv").read_text().splitlines()) == 1 + len(variants)


def test_more_harm_is_less_quality_and_less_fidelity(inputs, fakes, tmp_path):
    numbers = run(inputs, tmp_path / "fid")
    few, precision, compressed = (numbers[name] for name in ("few_steps_ddim", "precision", "compressed"))
    assert few["fid_100"] < precision["fid_100"] < compressed["fid_100"]
    assert 0 < precision["fidelity_same_solver"] < compressed["fidelity_same_solver"]
    assert "fidelity_same_solver" not in few and numbers["dense"]["fidelity"] == 0
    assert compressed["loss"] > PARAMS.goal.max_quality_loss and compressed["loss_p_holm"] > 0.5


def test_dull_best_is_the_fastest_that_is_as_good_as_compressed(inputs, fakes, tmp_path):
    """int8 harms less than `compressed` does, so its two steps qualify, and they are the fastest."""
    numbers = run(inputs, tmp_path / "fid")
    best = read_json(tmp_path / "fid" / "dull_best.json")
    assert (best["package"], best["point"]) == ("dull_int8", "ddim_uniform_2_int8")
    assert best["recipe"]["precision"] == INT8 and len(best["recipe"]["timesteps"]) == 2
    assert numbers["dull_best"]["as_good_as_compressed"] and numbers["dull_best"]["nfe"] == 2
    assert len(numbers["dull"]) == 1 and numbers["dull"][0]["best"] and numbers["dull"][0]["fid_80"] > 0
    assert (tmp_path / "fid" / "dull.csv").read_text().splitlines()[-1].startswith("compressed,")


def test_points_that_are_clearly_worse_or_dearer_drop_out_after_few_samples(inputs, fakes, tmp_path, monkeypatch):
    monkeypatch.setitem(HARM, "dull_int8", 0.9)
    points = {point["name"]: point for point in run(inputs, tmp_path / "fid")["dull"]}
    assert {name: point["samples"] for name, point in points.items()} == {
        "ddim_uniform_2_fp32": 80, "ddim_uniform_2_int8": 40, "ddim_uniform_6_int8": 40}, "6 steps in fp32 are the dearest"
    assert {name for name, point in points.items() if "fid_80" in point} == {"ddim_uniform_2_fp32"}
    assert points["ddim_uniform_2_int8"]["kid_above"] > 3 * points["ddim_uniform_2_int8"]["kid_above_error"]


def test_a_front_below_compressed_is_said_so(inputs, fakes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(HARM, "compressed", 0.0)
    monkeypatch.setitem(HARM, "dull_fp32", 0.3)
    monkeypatch.setitem(HARM, "dull_int8", 0.6)
    numbers = run(inputs, tmp_path / "fid")
    assert not numbers["dull_best"]["as_good_as_compressed"]
    assert numbers["dull_best"]["selection_samples"] == 80
    assert "no point of the dull front reached compressed's quality on 80 selection samples" in capsys.readouterr().out
    assert numbers["dull_best"]["point"].endswith("fp32")


def test_what_is_small_counts_where_size_is_the_target(inputs, fakes, tmp_path, monkeypatch):
    """fp32 is the fastest here, int8 the smallest."""
    monkeypatch.setattr(stage.dull, "read_times", lambda *_: {"fp32": 1.0, "int8": 1000.0})
    fast, small = (run(inputs, tmp_path / target, replace(PARAMS, goal=replace(GOAL, target=target, max_size=200)))
                   for target in ("latency", "size"))
    assert fast["dull_best"]["point"].endswith("fp32") and small["dull_best"]["point"].endswith("int8")
    assert {point["cost"] for point in small["dull"]} == {100}


def test_solvers_and_spacings_far_from_the_converged_image_do_not_race(inputs, fakes, tmp_path, monkeypatch):
    """The heats are held at the fastest precision, one for each number of steps that comes to its turn; who wins them races at
    every precision. Here x0 is a share of x, and a list that ends at a noisier level leaves more of it."""
    monkeypatch.setitem(HARM, "dull_int8", 0.9)
    dull = replace(DULL, solvers=("ddim", "ipndm"), spacings=("uniform", "logsnr"), kept=2)
    asked = []
    monkeypatch.setattr(stage, "sample_jobs", lambda jobs, *more: asked.extend(jobs) or draw(jobs, *more))
    numbers = run(inputs, tmp_path / "fid", replace(PARAMS, dull=dull))
    heats = [job for job in asked if job.name.startswith("heat_")]
    assert {job.package for job in heats} == {"dull_int8"} and {job.n for job in heats} == {20}
    assert sorted(job.recipe.nfe for job in heats) == [2] * 4 + [6] * 5 + [18]
    raced = {(point["solver"], point["spacing"], point["nfe"], point["precision"]) for point in numbers["dull"]}
    assert {row[3] for row in raced if row[2] == 2} == {"fp32", "int8"}
    for steps in (2, 6):
        assert len({row[:2] for row in raced if row[2] == steps}) == 2
    assert {row[:2] for row in raced if row[2:] == (2, "fp32")} == {row[:2] for row in raced if row[2:] == (2, "int8")}


def test_variants_of_the_same_network_and_sampling_are_drawn_once(inputs, fakes, tmp_path, monkeypatch):
    """Here `precision` holds compressed's network; it has its recipe as it is."""
    drawn, holds = [], {"precision": "compressed"}
    monkeypatch.setattr(stage, "read_networks", lambda packages, names: {name: holds.get(name, name) for name in names})
    monkeypatch.setattr(stage, "sample_jobs", lambda jobs, *more: drawn.extend(job.name for job in jobs) or draw(jobs, *more))
    numbers = run(inputs, tmp_path / "fid")
    assert len({"precision", "compressed"} & set(drawn)) == 1
    assert numbers["precision"] == {k: v for k, v in numbers["compressed"].items() if k in numbers["precision"]}
    first, second = (np.load(tmp_path / "fid" / "samples" / f"{name}.npy") for name in ("precision", "compressed"))
    assert np.array_equal(first, second)


def test_the_same_run_writes_the_same_bytes(inputs, fakes, tmp_path):
    assert run(inputs, tmp_path / "a") == run(inputs, tmp_path / "b")
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) == 8 and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": 7}, "fid.seed: 7 is fid.dull.seed too"),
    ({"pairs": 101}, "fid.pairs: 101 is not between 2 and 100"),
    ({"samples": 5}, "fid.samples: 5 is not between 10"),
])
def test_a_users_mistake_names_key_value_and_bound(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PARAMS, **change)


@pytest.mark.parametrize(("change", "message"), [
    ({"precisions": ("fp16",)}, "fid.dull.precisions: 'fp16' is not one of fp32, bf16, int8"),
    ({"solvers": ()}, r"fid.dull.solvers: \[\] is empty"),
    ({"steps": (0,)}, "fid.dull.steps: 0 is not between 1"),
    ({"heat": 1}, "fid.dull.heat: 1 is not between 2"),
    ({"kept": 0}, "fid.dull.kept: 0 is not between 1"),
    ({"rounds": ()}, r"fid.dull.rounds: \[\] is empty"),
    ({"rounds": (500, 250)}, r"fid.dull.rounds: \[500, 250\] does not rise"),
])
def test_a_mistake_in_the_grid_does_too(change, message):
    with pytest.raises(ValueError, match=message):
        replace(DULL, **change)
