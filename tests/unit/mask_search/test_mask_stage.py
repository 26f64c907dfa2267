"""The stage, from files to files, on a tiny labelled DiT and a tiny unconditional UNet."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks.core.artifacts import Inputs
from tasks.core.denoiser import Denoiser, build, load, save
from tasks.core.params import Goal
from tasks.mask_search import stage
from tasks.runtime.masks import shrink_units

GOAL = Goal(target="latency", max_quality_loss=0.05, min_speedup=2.0, max_bitops=0.1, max_size=1000)
PARAMS = stage.Params(cover=("*.attn1.*", "*.ff.*", "*_blocks.*", "mid_block.*"), densities=(0.25, 0.5), unit_share=0.5,
                      unit_multiple=8, images=8, min_gain=0.02, backend="openvino", batch=8, seed=0, goal=GOAL)


def tiny(kind: str) -> Denoiser:
    torch.manual_seed(0)
    if kind == "dit":
        return build("DiTTransformer2DModel", {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
            "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_elementwise_affine": False,
            "norm_type": "ada_norm_zero"}, {"num_train_timesteps": 50})
    return build("UNet2DModel", {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [6, 16],
        "norm_num_groups": 2, "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"]}, {"num_train_timesteps": 50})


def artifacts(folder: Path, denoiser: Denoiser) -> Inputs:
    folders = {name: folder / name for name in stage.INPUTS}
    for path in folders.values():
        path.mkdir(parents=True)
    save(denoiser, folders["pretrain_load"] / "teacher")
    rng = np.random.default_rng(0)
    np.save(folders["pretrain_load"] / "bank.npy", rng.integers(0, 256, (16, 1, 8, 8), dtype=np.uint8))
    if denoiser.num_classes:
        np.save(folders["pretrain_load"] / "bank_labels.npy", np.arange(16) % 3)
    rows = ["layer,kind,backend,precision,grain,density,batch,time_us"]
    rows += [f"{name},linear,openvino,fp32,{grain},8,{time}" for name in denoiser.prunable_layers()
             for grain, time in (("dense,1.0", 10), ("unit,0.5", 5), ("2:4,0.5", 10))]
    (folders["profile"] / "layers.csv").write_text("\n".join(rows))
    (folders["profile"] / "model.csv").write_text("backend,precision,batch,time_us\nopenvino,fp32,8,500\n")
    return Inputs(folders, key="k" * 16)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_run_writes_masks_that_fit_and_a_choice(kind, tmp_path, capsys):
    inputs = artifacts(tmp_path, tiny(kind))
    report = stage.run(PARAMS, inputs, tmp_path).numbers
    model = load(inputs["pretrain_load"] / "teacher").model
    parameters = dict(model.named_parameters())
    masks = load_file(tmp_path / "masks.safetensors")
    assert {name.partition("/")[0] for name in masks} == {"2:4", "unit"}
    for name, mask in masks.items():
        assert mask.shape == parameters[name.partition("/")[2]].shape and mask.dtype == torch.uint8
    assert report["2:4"]["density"] == 0.5
    assert all(0 < report[grain]["error"] < 2 and 0.3 < report[grain]["macs_share"] < 1 for grain in ("2:4", "unit"))
    assert all(set(row) == {"0.25", "0.5"} for row in report["sensitivity"].values())
    unit = {name.removeprefix("unit/"): mask.bool() for name, mask in masks.items() if name.startswith("unit/")}
    assert shrink_units(model, unit)
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["chosen"] == report["chosen"] == "unit" and choice["by_target"]["latency"] == "unit"
    assert set(choice["predicted"]) == {"2:4", "unit"}
    rows = list(csv.DictReader((tmp_path / "density.csv").read_text().splitlines()))
    assert {row["grain"] for row in rows} == {"2:4", "unit"} and all(0 < float(row["density"]) <= 1 for row in rows)
    said = capsys.readouterr().out
    if kind == "unet":  # six channels are no multiple of four
        assert "2:4 leaves down_blocks.0.resnets.0.conv1 dense: 6 inputs are no multiple of 4" in said
        assert report["left_dense"]["conv_in"] == "not in mask_search.cover"


def test_same_inputs_same_bytes(tmp_path):
    inputs = artifacts(tmp_path, tiny("dit"))
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
    assert stage.run(PARAMS, inputs, tmp_path / "a") == stage.run(PARAMS, inputs, tmp_path / "b")
    for name in ("masks.safetensors", "density.csv", "choice.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_params_name_key_value_and_bound():
    with pytest.raises(ValueError, match=r"mask_search.densities: 1.5 is not between 0.01 and 0.99"):
        replace(PARAMS, densities=(1.5,))
    with pytest.raises(ValueError, match=r"unit_share: 0.8 is more than densities \[0.25, 0.5\] remove"):
        replace(PARAMS, unit_share=0.8)
