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
from tasks.core.denoiser import Denoiser, build, inspect, load, save
from tasks.core.params import Goal
from tasks.mask_search import stage
from tasks.runtime.masks import hidden_units, shrink_units

GOAL = Goal(target="latency", max_quality_loss=0.05, min_speedup=2.0, max_bitops=0.1, max_size=1000)
PARAMS = stage.Params(cover=("*.attn1.*", "*.ff.*", "*_blocks.*", "mid_block.*"), densities=(0.25, 0.5), grains=("2of4",),
                      grain_densities=(0.5,), unit_share=0.4, unit_multiple=8, saliency="magnitude", images=8, steps=4,
                      inputs=16, gram_mb=64, min_gain=0.02, backend="openvino", batch=8, seed=0, goal=GOAL)
# Time of a pruned layer over its dense time, of layer after layer in turn. cpu: the spread of a real profile's rows, whose
# kernels compute the zeros of 2:4; gpu: semi-structured kernels, units as on the cpu.
CPU = {("unit", 0.5): (0.5, 0.55), ("unit", 0.25): (0.25, 0.3), ("2:4", 0.5): (1.03, 0.94, 1.08, 1.0)}
GPU = CPU | {("2:4", 0.5): (0.55, 0.6, 0.58)}


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


def artifacts(folder: Path, denoiser: Denoiser, machine: dict = CPU) -> Inputs:
    folders = {name: folder / name for name in stage.INPUTS}
    for path in folders.values():
        path.mkdir(parents=True)
    save(denoiser, folders["pretrain_load"] / "teacher")
    rng = np.random.default_rng(0)
    np.save(folders["pretrain_load"] / "bank.npy", rng.integers(0, 256, (16, 1, 8, 8), dtype=np.uint8))
    if denoiser.num_classes:
        np.save(folders["pretrain_load"] / "bank_labels.npy", np.arange(16) % 3)
    write_profile(folders["profile"], denoiser, machine)
    return Inputs(folders, key="k" * 16)


def write_profile(folder: Path, denoiser: Denoiser, machine: dict) -> None:
    """A layer takes as many microseconds as it has weights, the rest of the model 1000."""
    times = {name: layer.weight.numel() for name, layer in denoiser.prunable_layers().items()}
    rows = ["layer,kind,backend,precision,grain,density,batch,time_us"]
    for i, (name, time) in enumerate(times.items()):
        factors = {("dense", 1.0): (1.0,), **machine}
        rows += [f"{name},linear,openvino,fp32,{grain},{density},8,{time * turns[i % len(turns)]}"
                 for (grain, density), turns in factors.items()]
    (folder / "layers.csv").write_text("\n".join(rows))
    (folder / "model.csv").write_text(f"backend,precision,batch,time_us\nopenvino,fp32,8,{1000 + sum(times.values())}\n")


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
    blocks = [units.block for units in hidden_units(model)]
    assert all(set(report["sensitivity"][block]["unit"]) <= {"0.25", "0.333333", "0.5"} for block in blocks)
    assert {layer for layer, row in report["sensitivity"].items() if "2:4" in row} == {
        name.removeprefix("2:4/").removesuffix(".weight") for name in masks if name.startswith("2:4/")}
    unit = {name.removeprefix("unit/"): mask.bool() for name, mask in masks.items() if name.startswith("unit/")}
    assert shrink_units(model, unit)
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["chosen"] == report["chosen"] == "unit" and choice["by_target"]["latency"] == "unit"
    assert set(choice["predicted"]) == {"2:4", "unit"}
    rows = list(csv.DictReader((tmp_path / "density.csv").read_text().splitlines()))
    assert {row["grain"] for row in rows} == {"2:4", "unit"} and all(0 < float(row["density"]) <= 1 for row in rows)
    weights = load_file(tmp_path / "weights.safetensors")
    assert weights.keys() <= masks.keys() and {name.partition("/")[0] for name in weights} == {"2:4", "unit"}
    assert all((weight[masks[name] == 0] == 0).all() for name, weight in weights.items())
    assert all(report[grain]["error_made_up"] < report[grain]["error"] for grain in ("2:4", "unit"))
    said = capsys.readouterr().out
    if kind == "unet":  # six channels are no multiple of four
        assert "2:4 leaves down_blocks.0.resnets.0.conv1 dense: 6 inputs are no multiple of 4" in said
        assert report["left_dense"]["conv_in"] == "not in mask_search.cover"
        assert report["left_dense"]["down_blocks.0.resnets.0.conv1"] == "2:4: 6 inputs are no multiple of 4"


def test_same_inputs_same_bytes(tmp_path):
    inputs = artifacts(tmp_path, tiny("dit"))
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
    assert stage.run(PARAMS, inputs, tmp_path / "a") == stage.run(PARAMS, inputs, tmp_path / "b")
    for name in ("masks.safetensors", "weights.safetensors", "density.csv", "choice.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("kind", ["activation", "second_order"])
def test_saliency_of_inputs_chooses_other_weights_of_the_same_number(kind, tmp_path):
    inputs = artifacts(tmp_path, tiny("dit"))
    masks, error = {}, {}
    for name in ("magnitude", kind):
        (tmp_path / name).mkdir()
        report = stage.run(replace(PARAMS, saliency=name), inputs, tmp_path / name).numbers
        found = load_file(tmp_path / name / "masks.safetensors")
        masks[name] = torch.cat([mask.flatten() for key, mask in sorted(found.items()) if key.startswith("2:4/")])
        error[name] = report["sensitivity"]["transformer_blocks.0.ff.net.2"]["2:4"]["0.5"]
    assert masks["magnitude"].sum() == masks[kind].sum() and not torch.equal(masks["magnitude"], masks[kind])
    assert error["magnitude"] != error[kind], "each cut's error is that of the masks that ship"


def choice_of(machine: dict, tmp_path: Path, kind: str = "dit", **changes) -> dict:
    stage.run(replace(PARAMS, **changes), artifacts(tmp_path, tiny(kind), machine), tmp_path)
    return json.loads((tmp_path / "choice.json").read_text())


def grains_of(plan: dict) -> set[str]:
    return {cut["grain"] for cut in plan["layers"].values()}


def test_with_this_cpus_times_units_pay_and_two_four_does_not(tmp_path):
    choice = choice_of(CPU, tmp_path)
    assert choice["chosen"] == "unit" and choice["predicted"]["2:4"]["latency"] == pytest.approx(1, abs=0.02)
    assert choice["plans"]["mixed"] == choice["plans"]["unit"] and grains_of(choice["plans"]["uniform"]) == {"unit"}


def test_with_semi_structured_kernels_two_four_pays(tmp_path):
    choice = choice_of(GPU, tmp_path)
    plans = choice["plans"]
    assert choice["chosen"] == "2:4"
    assert grains_of(plans["mixed"]) == {"2:4"} and grains_of(plans["unit"]) == {"unit"}
    assert plans["mixed"]["error"]["predicted"] < plans["unit"]["error"]["predicted"]
    assert plans["mixed"]["error"]["measured"] < plans["unit"]["error"]["measured"]


@pytest.mark.parametrize("kind", ["dit", "unet"])
@pytest.mark.parametrize("target", ["bitops", "size", "latency"])
def test_every_plan_keeps_the_one_budget(kind, target, tmp_path):
    choice = choice_of(CPU, tmp_path, kind, goal=replace(GOAL, target=target), grains=("2of4", "fine", "kernel"))
    budget, plans = choice["budget"], choice["plans"]
    assert budget["target"] == target and set(plans) == {"unit", "unit_uniform", "mixed", "uniform"}
    for plan in plans.values():
        assert plan["saved"] >= budget["saved"] * (1 - 1e-6)
        assert plan["cost"] == pytest.approx(1 - plan["saved"] / budget["dense"])
        assert plan["error"]["measured"] > 0 and plan["error"]["predicted"] > 0
    assert plans["mixed"]["error"]["predicted"] <= plans["unit"]["error"]["predicted"]
    assert choice["predicted"]["unit"][target] == pytest.approx(plans["unit"]["cost"])  # counted from the masks themselves


def test_densities_that_take_no_unit_name_the_highest_that_does(tmp_path):
    with pytest.raises(ValueError, match=r"mask_search.densities: \[0.9\] take no unit .* the highest that does is 0.75$"):
        choice_of(CPU, tmp_path, densities=(0.9,), unit_multiple=16, unit_share=0.05)
    (tmp_path / "b").mkdir()
    assert choice_of(CPU, tmp_path / "b", densities=(0.75,), unit_multiple=16, unit_share=0.05)["plans"]["unit"]


def test_a_budget_out_of_reach_names_the_nearest(tmp_path):
    """One head of two stays, and a quarter of the feed-forwards."""
    how = {"goal": replace(GOAL, target="bitops"), "densities": (0.25,)}
    with pytest.raises(ValueError, match=r"^mask_search.unit_share: 0.74 is out of reach for target bitops; the nearest "
                                         r"feasible is 0.\d+, with densities \[0.25\]$") as refused:
        choice_of(CPU, tmp_path, unit_share=0.74, **how)
    nearest = float(str(refused.value).partition("feasible is ")[2].partition(",")[0])
    assert 0.5 < nearest < 0.74
    assert choice_of(CPU, tmp_path / "again", unit_share=nearest, **how)["plans"]["unit"]["saved"] > 0


def test_where_units_save_too_little_time_macs_decide_and_it_is_said(tmp_path, capsys):
    slow = CPU | {("unit", 0.5): (0.9,), ("unit", 0.25): (0.8,)}
    choice = choice_of(slow, tmp_path)
    assert "removed units save 0.17 of their blocks' time in this machine's profile at most, unit_share is 0.4" in (
        capsys.readouterr().out)
    assert choice["budget"]["counted"] == "MACs of an image"
    assert choice["plans"]["unit"]["saved"] >= choice["budget"]["saved"]



def test_a_block_that_no_density_cuts_says_so(tmp_path, capsys):
    choice = choice_of(CPU, tmp_path, "unet", densities=(0.5, 0.75), unit_multiple=16, unit_share=0.1)
    said = capsys.readouterr().out
    assert "mask_search: unit leaves down_blocks.1.resnets.0 dense: no density takes any of 16 units, 16 at a time" in said
    assert "unit leaves down_blocks.0.resnets.0 " not in said  # of 6 channels: 16 does not divide them, a group is 3
    assert {layer.rpartition(".resnets")[0] for layer in choice["plans"]["unit"]["layers"]} <= {"down_blocks.0", "up_blocks.1"}


def test_a_grain_that_does_not_divide_a_layer_says_so(tmp_path, capsys):
    choice_of(CPU, tmp_path, "unet", grains=("kernel",))
    said = capsys.readouterr().out
    assert ("mask_search: kernel leaves up_blocks.0.resnets.1.conv_shortcut dense: a weight of (16, 22, 1, 1) is not divided "
            "by grains of (8, 8, 1, 1)") in said
    assert "kernel leaves up_blocks.0.resnets.1.conv1 " not in said  # 3 x 3: a kernel is a grain


def test_params_name_key_value_and_bound():
    with pytest.raises(ValueError, match=r"mask_search.densities: 1.5 is not between 0.01 and 0.99"):
        replace(PARAMS, densities=(1.5,))
    with pytest.raises(ValueError, match=r"unit_share: 0.8 is more than densities \[0.25, 0.5\] remove, 0.75 at most"):
        replace(PARAMS, unit_share=0.8)


@pytest.mark.parametrize("changes, message", [
    ({"grains": ("2of4", "kernels")}, r"mask_search.grains: 'kernels' is not one of .*did you mean kernel"),
    ({"grains": ("4of4",)}, r"mask_search.grains: 4of4 removes nothing; N of NofM is below M"),
    ({"grains": ("4of2",)}, r"mask_search.grains: 4of2 removes nothing"),
    ({"grains": ("0of4",)}, r"mask_search.grains: '0of4' is not one of fine, vector, kernel, filter, NofM such as 2of4"),
    ({"grains": ("2:4",)}, r"mask_search.grains: '2:4' is written 2of4 here: `dvc exp run -S` drops the quotes"),
    ({"densities": ()}, "mask_search.densities: empty"),
    ({"grain_densities": (0.0,)}, "mask_search.grain_densities: 0.0 is not between 0.01 and 0.99")])
def test_grains_and_densities_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PARAMS, **changes)


def without_units() -> Denoiser:
    """All channels of a resnet are one group of its norm, so none of them can go."""
    torch.manual_seed(0)
    return build("UNet2DModel", {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8, 16],
        "norm_num_groups": 1, "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "add_attention": False}, {"num_train_timesteps": 50})


def test_a_network_without_removable_units_goes_on_with_two_four(tmp_path, capsys):
    report = stage.run(PARAMS, artifacts(tmp_path, without_units(), GPU), tmp_path).numbers
    said = capsys.readouterr().out
    assert "unit leaves mid_block.resnets.0 dense: no density takes any of 16 units, 16 at a time" in said
    assert "mask_search: no block has units that can go, 8 at a time (unit_multiple), so there are no plans" in said
    assert {name.partition("/")[0] for name in load_file(tmp_path / "masks.safetensors")} == {"2:4"}
    assert report["2:4"]["density"] == 0.5 and "unit" not in report and report["plans"] == {} and report["unit_density"]
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["chosen"] == "2:4" and set(choice["predicted"]) == {"2:4"} and choice["budget"]["saved"] == 0


@pytest.mark.parametrize("target", ["bitops", "size"])
def test_a_budget_out_of_reach_is_known_before_anything_ran(target, tmp_path):
    """As the stage itself says it, to the digit."""
    params = replace(PARAMS, goal=replace(GOAL, target=target), densities=(0.25,), unit_share=0.74)
    inputs = artifacts(tmp_path, tiny("dit"))
    found = []
    for look in (lambda: stage.preflight(params, {"pretrain_load": inspect(inputs["pretrain_load"] / "teacher").denoiser}),
                 lambda: stage.run(params, inputs, tmp_path)):
        with pytest.raises(ValueError, match=rf"^mask_search.unit_share: 0.74 is out of reach for target {target}; the near"):
            try:
                look()
            except ValueError as error:
                found.append(str(error))
                raise
    assert found[0] == found[1]


def test_the_preflight_knows_shapes(tmp_path):
    """Of a network whose parameters are on the meta device."""
    save(tiny("unet"), tmp_path)
    known = {"pretrain_load": inspect(tmp_path).denoiser}
    assert stage.preflight(PARAMS, known) is None and stage.preflight(PARAMS, {"pretrain_load": None}) is None
    with pytest.raises(ValueError, match="mask_search.cover: none of transformer.* matches a layer of the model"):
        stage.preflight(replace(PARAMS, cover=("transformer*",)), known)
    with pytest.raises(ValueError, match=r"mask_search.cover: conv_in match no layer whose inputs are a multiple of 4, as 2:4"):
        stage.preflight(replace(PARAMS, cover=("conv_in",)), known)
    with pytest.raises(ValueError, match=r"mask_search.densities: \[0.95\] take no unit .* the highest that does is 0.5$"):
        stage.preflight(replace(PARAMS, densities=(0.95,), unit_share=0.05), known)
