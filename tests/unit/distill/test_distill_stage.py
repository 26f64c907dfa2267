"""The stage, from files to files: a labelled DiT, and a UNet without labels."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.core.artifacts import Inputs
from tasks.core.denoiser import Denoiser, build, load, save
from tasks.core.learned import timesteps_of
from tasks.core.pairs import Pairs
from tasks.core.recipe import Recipe
from tasks.core.unroll import Weights
from tasks.data.features import FeatureNet
from tasks.distill import stage
from tasks.distill.few_steps import FewSteps
from tasks.mask_search.masks import unit_masks
from tasks.runtime.masks import hidden_units
from tasks.runtime.solver import SolverStep, solver_steps
from tests.unit.distill.toy import SETTINGS, two_four

LOSS = Weights(maps=1.0, pixels=4.0, moments=1.0)
FEW = FewSteps(evaluations=(2,), grains=("dense", "2of4"), start="shipped", recompute=True, steps=4, batch=4, lr=1e-3,
               solver_lr=0.01, warmup=1, ema_decay=0.5, judge_every=2, held=4, loss=LOSS)
PARAMS = stage.Params(start="made_up", method="sr_ste", holdout=8, few_steps=FEW,
                      **vars(SETTINGS) | {"steps": 4, "lr": 1e-3, "lam": 0.1, "bf16": True})


def tiny(kind: str) -> Denoiser:
    torch.manual_seed(0)
    if kind == "dit":
        return build("DiTTransformer2DModel", {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 1,
            "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_elementwise_affine": False,
            "norm_type": "ada_norm_zero"}, {"num_train_timesteps": 50})
    return build("UNet2DModel", {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8],
        "norm_num_groups": 4, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
        "num_class_embeds": 3 if kind == "labelled unet" else None}, {"num_train_timesteps": 50})


def artifacts(folder: Path, denoiser: Denoiser) -> Inputs:
    folders = {name: folder / name for name in stage.INPUTS}
    for path in folders.values():
        path.mkdir(parents=True)
    save(denoiser, folders["pretrain_load"] / "teacher")
    rng = np.random.default_rng(0)
    for stage_name, name in (("data", "train"), ("data", "holdout"), ("pretrain_load", "bank")):
        np.save(folders[stage_name] / f"{name}.npy", rng.integers(0, 256, (12, 1, 8, 8), dtype=np.uint8))
        if denoiser.num_classes:
            np.save(folders[stage_name] / f"{name}_labels.npy", np.arange(12) % 3)
    layers = {n: layer for n, layer in denoiser.prunable_layers().items() if ".ff." in n or ".resnets." in n}
    masks = {"2:4": two_four(layers),
             "unit": unit_masks(denoiser.model, {units.block: 0.5 for units in hidden_units(denoiser.model)})}
    save_file({f"{grain}/{name}": mask.to(torch.uint8) for grain, found in masks.items() for name, mask in found.items()},
              folders["mask_search"] / "masks.safetensors")
    weights = {f"{grain}/{name}": 2 * denoiser.model.get_parameter(name).detach() * mask for grain, found in masks.items()
               for name, mask in found.items() if name.endswith("weight")}
    save_file(weights, folders["mask_search"] / "weights.safetensors")
    net = {"trunk": "plain", "width": 4, "channels": 1, "classes": 3}
    save_file(FeatureNet(**net).state_dict(), folders["data"] / "features_search.safetensors")
    (folders["data"] / "data.json").write_text(json.dumps({"feature_nets": {"search": net}}))
    Pairs(np.load(folders["pretrain_load"] / "bank.npy"), 7, denoiser.num_classes).write(folders["solver_learn"])
    (folders["solver_learn"] / "solvers.json").write_text('{"dense": {}}')
    return Inputs(folders, key="k" * 16)


@pytest.mark.parametrize("kind", ["dit", "unet", "labelled unet"])
def test_run_writes_two_students_that_load(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = artifacts(tmp_path, tiny(kind))
    report = stage.run(PARAMS, inputs, tmp_path).numbers
    model = load(inputs["pretrain_load"] / "teacher").model
    assert set(report) == {"2:4", "unit", "few_steps"}
    for grain, name in (("2:4", "2_4"), ("unit", "unit")):
        student, masks = (load_file(tmp_path / f"{part}_{name}.safetensors") for part in ("student", "masks"))
        model.load_state_dict(student)
        for key, mask in masks.items():
            assert mask.dtype == torch.uint8 and (student[key][mask == 0] == 0).all()
        assert report[grain]["density"] == 0.5
        assert all(report[grain][key] > 0 for key in ("error_one_shot", "error_trained", "macs_share"))
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    assert [(row["grain"], row["step"]) for row in rows] == [("2:4", "2"), ("2:4", "4"), ("unit", "2"), ("unit", "4")]
    assert {row["flip_rate"] for row in rows if row["grain"] == "unit"} == {"0.0"}


def students(out: Path) -> dict[str, dict]:
    return {entry["name"]: entry for entry in json.loads((out / "students.json").read_text())}


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_few_step_students_are_never_worse_than_their_start_and_keep_their_masks(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = stage.run(PARAMS, artifacts(tmp_path, tiny(kind)), tmp_path).numbers["few_steps"]
    found = students(tmp_path)
    assert list(found) == ["few_2", "few_2_2_4"] == list(report)
    for name, entry in found.items():
        assert report[name]["loss"] <= report[name]["start_loss"] and report[name]["start"] == "a classical solver"
        weights = load_file(tmp_path / entry["file"])
        masks = load_file(tmp_path / entry["masks"]) if entry["masks"] else {}
        assert bool(masks) == (name == "few_2_2_4")
        assert all((weights[layer][mask == 0] == 0).all() for layer, mask in masks.items())
        Recipe(timesteps=tuple(entry["timesteps"]), solver="learned", rows=tuple(map(SolverStep.from_json, entry["rows"])))


def test_a_student_starts_from_the_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs, teacher = artifacts(tmp_path, tiny("dit")), tiny("dit")
    (inputs["pretrain_load"] / "few_steps").mkdir()
    rows = solver_steps(teacher.schedule.config, (40, 20), "ddim")
    shipped = {name: (value + 0.25).half() for name, value in teacher.model.state_dict().items()}
    save_file(shipped, inputs["pretrain_load"] / "few_steps" / "few_2.safetensors")
    card = {"timesteps": timesteps_of(rows), "rows": [row.to_json() for row in rows]}
    (inputs["pretrain_load"] / "few_steps" / "few_2.json").write_text(json.dumps(card))
    few = replace(FEW, steps=0, grains=("dense",))
    report = stage.run(replace(PARAMS, few_steps=few), inputs, tmp_path).numbers["few_steps"]
    assert report["few_2"]["start"] == "shipped"
    weights = load_file(tmp_path / students(tmp_path)["few_2"]["file"])
    assert all(torch.equal(value, shipped[name].float()) for name, value in weights.items())
    assert [row["t"] for row in students(tmp_path)["few_2"]["rows"]] == [40, 20]


def test_a_shipped_student_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs, teacher = artifacts(tmp_path, tiny("dit")), tiny("dit")
    folder = inputs["pretrain_load"] / "few_steps"
    folder.mkdir()
    rows = solver_steps(teacher.schedule.config, (40, 20), "ddim")
    (folder / "few_2.json").write_text(json.dumps({"timesteps": [40, 20], "rows": [row.to_json() for row in rows]}))
    save_file({name: torch.full_like(value, 1e6).half() for name, value in teacher.model.state_dict().items()},
              folder / "few_2.safetensors")
    with pytest.raises(ValueError, match=r"few_2.safetensors: .* is not finite"):
        stage.run(PARAMS, inputs, tmp_path)


def test_a_shipped_student_of_another_network_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = artifacts(tmp_path, tiny("dit"))
    (inputs["pretrain_load"] / "few_steps").mkdir()
    save_file({"a": torch.zeros(2)}, inputs["pretrain_load"] / "few_steps" / "few_2.safetensors")
    with pytest.raises(ValueError, match=r"few_2.safetensors: its weights are not those of the teacher's network"):
        stage.run(PARAMS, inputs, tmp_path)


@pytest.mark.parametrize("method", ["fixed", "ste", "progressive"])
def test_every_method_leaves_masks_of_the_same_density(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = stage.run(replace(PARAMS, method=method), artifacts(tmp_path, tiny("dit")), tmp_path).numbers
    assert [report[grain]["density"] for grain in ("2:4", "unit")] == [0.5, 0.5]
    assert report["2:4"]["flip_rate_freeze"] == 0 or method != "fixed"


def test_data_free_training_reads_no_training_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = artifacts(tmp_path, tiny("dit"))
    for name in ("train", "train_labels"):
        (inputs["data"] / f"{name}.npy").unlink()
    assert stage.run(replace(PARAMS, bank_share=1.0), inputs, tmp_path).numbers["2:4"]["density"] == 0.5
    with pytest.raises(FileNotFoundError):
        stage.run(PARAMS, inputs, tmp_path)


def test_without_steps_the_student_is_the_masked_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = stage.run(replace(PARAMS, steps=0, start="teacher"), artifacts(tmp_path, tiny("dit")), tmp_path).numbers
    assert all(report[grain]["error_trained"] == report[grain]["error_one_shot"] for grain in ("2:4", "unit"))
    assert all(report[grain]["flip_rate_last"] == 0 for grain in ("2:4", "unit"))


def test_training_starts_from_the_weights_that_mask_search_made_up(tmp_path, monkeypatch):
    """Here they are twice the teacher's."""
    monkeypatch.chdir(tmp_path)
    inputs = artifacts(tmp_path, tiny("dit"))
    stage.run(replace(PARAMS, steps=0), inputs, tmp_path)
    student, name = load_file(tmp_path / "student_2_4.safetensors"), "transformer_blocks.0.ff.net.2.weight"
    teacher = load(inputs["pretrain_load"] / "teacher").model.get_parameter(name)
    mask = load_file(tmp_path / "masks_2_4.safetensors")[name]
    assert torch.equal(student[name], 2 * teacher * mask)


def test_a_file_without_the_grain_is_an_error_with_the_path(tmp_path):
    save_file({"2:4/a.weight": torch.ones(1, dtype=torch.uint8)}, tmp_path / "masks.safetensors")
    with pytest.raises(ValueError, match=r"masks.safetensors: holds nothing of grain 'unit'"):
        stage.read_tensors(tmp_path / "masks.safetensors", "unit")


def test_params_name_key_value_and_bound():
    with pytest.raises(ValueError, match=r"distill.holdout: 0 is not between 1 and"):
        replace(PARAMS, holdout=0)
    with pytest.raises(ValueError, match=r"distill.method: 'dense' is not one of fixed, ste, sr_ste, progressive"):
        replace(PARAMS, method="dense")


def test_without_units_that_can_go_there_is_one_student(tmp_path, monkeypatch):
    """mask_search found masks of 2:4 alone, and has said so."""
    monkeypatch.chdir(tmp_path)
    inputs = artifacts(tmp_path, tiny("unet"))
    for name in ("masks", "weights"):
        path = inputs["mask_search"] / f"{name}.safetensors"
        save_file({key: tensor for key, tensor in load_file(path).items() if key.startswith("2:4/")}, path)
    assert set(stage.run(PARAMS, inputs, tmp_path).numbers) == {"2:4", "few_steps"}
    assert not list(tmp_path.glob("*_unit.safetensors"))
