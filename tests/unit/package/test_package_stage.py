"""The table's variants, and the stage on a tiny teacher with the graphs' export replaced by a stand-in."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.core import calibration
from tasks.core.artifacts import Inputs, read_json, write_json
from tasks.core.denoiser import Denoiser, build, save
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import spaced_timesteps
from tasks.core.sparsity import nm_mask
from tasks.package import stage
from tasks.package.variants import variants
from tasks.runtime.graph import export
from tasks.runtime.masks import hidden_units
from tasks.runtime.packed import PackedDenoiser, open_model

DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 10, "norm_elementwise_affine": False,
       "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}
SCHEDULE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction", "clip_sample": True}
DULL = ["dull_fp32", "dull_bf16", "dull_int8"]
NAMES = ["dense", "few_steps_ddim", "few_steps_dpm", "cache", "precision", "timesteps", *DULL, "sparse", "sparse_distilled",
         "compressed"]
PARAMS = stage.Params(dense_steps=8, calibration_states=128, seed=0)


@pytest.fixture(scope="module")
def teacher() -> Denoiser:
    torch.manual_seed(0)
    return build("DiTTransformer2DModel", DIT, SCHEDULE)


def plan_on(timesteps, sublayers) -> dict:
    rows = [[step % 2 == 0] * len(sublayers) for step in range(len(timesteps))]
    return {"timesteps": list(timesteps), "sublayers": sublayers, "compute": rows}


def write_upstream(root: Path, teacher: Denoiser, chosen: str = "unit") -> Inputs:
    """What the stages before would have left, by rule instead of by training."""
    folders = {name: root / name for name in stage.INPUTS}
    for folder in folders.values():
        folder.mkdir()
    weights = {name: p.detach().clone() for name, p in teacher.model.state_dict().items()}
    layers = [f"{name}.weight" for name in teacher.prunable_layers() if ".ff." in name]
    two_four = {name: nm_mask(weights[name], 2, 4) for name in layers}
    units = {f"{u.consumer}.weight": (torch.arange(u.count) < u.count // 2).repeat(len(weights[f"{u.consumer}.weight"]), 1)
             for u in hidden_units(teacher.model)}
    moved = {name: (m.roll(1, 0) if name == layers[0] else m) for name, m in two_four.items()}  # as training would
    save(teacher, folders["pretrain_load"] / "teacher")
    save_file({f"2:4/{name}": m.to(torch.uint8) for name, m in two_four.items()}, folders["mask_search"] / "masks.safetensors")
    for name, masks in (("2_4", moved), ("unit", units)):
        student = {k: w * masks[k] if k in masks else w for k, w in weights.items()}
        save_file(student, folders["distill"] / f"student_{name}.safetensors")
        save_file({k: m.to(torch.uint8) for k, m in masks.items()}, folders["distill"] / f"masks_{name}.safetensors")
    sublayers = [s.name for s in teacher.sublayers()]
    plan = plan_on(spaced_timesteps(teacher.schedule, 6), sublayers)
    write_json(folders["cache_learn"] / "plan.json", plan)
    precision = {name: "w8a8" for name in teacher.prunable_layers() if ".attn1." in name}
    few = Recipe(timesteps=(950, 600, 300, 20), solver="dpm2m")
    cache = CachePlan(sublayers=tuple(sublayers), compute=tuple(map(tuple, plan["compute"][:4])))
    bits = Recipe(timesteps=tuple(plan["timesteps"]), precision=precision)
    sparsity = chosen and {"grain": chosen, "density": {}}  # the densities are those of the masks
    best = replace(few, precision=precision, cache=cache, sparsity=sparsity)
    write_json(folders["finish"] / "recipe.json", best.to_json())
    write_json(folders["finish"] / "weights.json", weights_of(chosen))
    write_json(folders["evolve"] / "single.json", {"timesteps": few.to_json(), "precision": bits.to_json()})
    return Inputs(folders, "key")


def weights_of(grain: str | None) -> dict:
    """As finish writes it of the student of a grain."""
    name = grain and f"student_{grain.replace(':', '_')}"
    return {"name": name or "teacher", "file": name and f"{name}.safetensors", "grain": grain,
            "masks": name and f"{name.replace('student', 'masks')}.safetensors", "finished": False}


def run_stage(root: Path, inputs: Inputs, monkeypatch) -> tuple[Path, dict, list]:
    """-> packages, numbers, recipes whose graphs were exported."""
    exported = []

    def stand_in(model, recipe, folder):
        exported.append(recipe)
        folder.mkdir()
        (folder / "0.xml").write_text(f"{sum(p.numel() for p in model.parameters())}")

    monkeypatch.setattr(stage, "export", stand_in)
    monkeypatch.setattr(stage, "store", lambda folder: (folder / "0.xml").rename(folder / "graphs.zip"))
    root.mkdir()
    return root, stage.run(PARAMS, inputs, root).numbers, exported


@pytest.fixture(scope="module")
def packaged(teacher, tmp_path_factory):
    root = tmp_path_factory.mktemp("stage")
    inputs = write_upstream(root, teacher)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return inputs, *run_stage(root / "out", inputs, monkeypatch)


def test_every_variant_is_packaged_and_opens(packaged):
    _, out, numbers, _ = packaged
    assert sorted(p.name for p in out.iterdir()) == sorted(NAMES) == sorted(numbers)
    for name in NAMES:
        assert PackedDenoiser.from_pretrained(out / name / "denoiser").recipe["timesteps"]


def test_what_each_variant_is(packaged):
    _, out, numbers, _ = packaged
    recipes = {name: Recipe.from_json(read_json(out / name / "recipe.json")) for name in NAMES}
    assert {name: r.nfe for name, r in recipes.items()} == {
        "dense": 8, "few_steps_ddim": 4, "few_steps_dpm": 4, "sparse": 6, "sparse_distilled": 6, "cache": 6, "precision": 6,
        "timesteps": 4, "compressed": 4, **dict.fromkeys(DULL, 6)}
    assert [name for name, r in recipes.items() if r.solver == "dpm2m"] == ["few_steps_dpm", "timesteps", "compressed"]
    assert [name for name, r in recipes.items() if r.cache] == ["cache", "compressed"]
    assert {name: r.sparsity["grain"] for name, r in recipes.items() if r.sparsity} == {
        "sparse": "2:4", "sparse_distilled": "2:4", "compressed": "unit"}
    assert set(recipes["dull_int8"].precision.values()) == {"w8a8"} and len(recipes["dull_int8"].precision) == len(
        recipes["dull_bf16"].precision)
    assert set(recipes["compressed"].sparsity["density"].values()) == {0.5}
    assert numbers["dull_int8"]["weights_bytes"] < numbers["dull_bf16"]["weights_bytes"] < numbers["dense"]["weights_bytes"]


def test_the_distilled_student_keeps_the_masks_that_its_training_ended_with(packaged):
    inputs, out, _, _ = packaged
    student = load_file(inputs["distill"] / "student_2_4.safetensors")
    model = PackedDenoiser.from_pretrained(out / "sparse_distilled" / "denoiser").model
    assert all(torch.equal(tensor, student[name]) for name, tensor in model.state_dict().items())


def test_variants_with_the_same_network_and_cache_share_one_export(packaged):
    _, out, _, exported = packaged
    assert len(exported) == len(NAMES) - 4
    shared = ("dense", "few_steps_ddim", "few_steps_dpm", "timesteps", "dull_fp32")
    graphs = [(out / name / "openvino" / "graphs.zip").read_bytes() for name in shared]
    assert len(set(graphs)) == 1


def test_a_second_run_gives_the_same_bytes(packaged, tmp_path, monkeypatch):
    inputs, out, numbers, _ = packaged
    again, repeated, _ = run_stage(tmp_path / "again", inputs, monkeypatch)
    files = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert numbers == repeated and files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((out / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_graphs_are_the_same_bytes_whatever_was_exported_before(packaged, tmp_path):
    _, out, _, _ = packaged
    recipe = Recipe.from_json(read_json(out / "compressed" / "recipe.json"))
    for name in ("first", "second"):  # OpenVINO numbers its nodes on and on within a process
        export(open_model(out / "compressed" / "denoiser")[0], recipe, tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "first").iterdir())
    assert len(files) == len(recipe.cache.masks) + 3  # conditioning, weights, index
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in files)


def test_the_search_decides_the_weights_and_their_masks(teacher):
    def compressed(weights):
        few = Recipe(timesteps=(900, 100))
        plan = plan_on((900, 500), ["transformer_blocks.0.ff"])
        return variants(teacher.schedule, ["a"], 8, plan, few, {"precision": few, "timesteps": few}, weights)["compressed"]

    few_steps = {"name": "few_4", "file": "student_few_4.safetensors", "masks": None, "grain": None, "finished": False}
    finished = {**weights_of("unit"), "finished": True}
    found = [compressed(weights) for weights in (*map(weights_of, ("unit", "2:4", None)), few_steps, finished)]
    assert [(v.weights, v.grain, v.masks) for v in found] == [
        ("student_unit", "unit", "masks_unit.safetensors"), ("student_2_4", "2:4", "masks_2_4.safetensors"),
        ("teacher", None, None), ("student_few_4", None, None), ("finished", "unit", "masks_unit.safetensors")]


@pytest.mark.parametrize("nfe, images", [(4, 32), (50, 3)])
def test_ranges_come_from_enough_states_of_the_recipes_own_trajectories(teacher, monkeypatch, nfe, images):
    seen = []
    monkeypatch.setattr(calibration, "calibrate_ranges",
                        lambda model, batches, joins: seen.extend(batches) or {"layer": (0, 1)})
    layer = "transformer_blocks.0.attn1.to_q"
    recipe = Recipe(timesteps=spaced_timesteps(teacher.schedule, nfe), precision={layer: "w8a8"})
    assert calibration.ranges_on_trajectory(teacher, recipe, 128, seed=0) == {"layer": (0, 1)}
    assert [int(t[0]) for _, t, _ in seen] == list(recipe.timesteps)
    assert {len(x) for x, _, _ in seen} == {images}


def test_no_ranges_are_measured_where_nothing_is_rounded(teacher):
    recipe = Recipe(timesteps=(900,), precision={"transformer_blocks.0.attn1.to_q": "bf16"})
    assert calibration.ranges_on_trajectory(teacher, recipe, 128, seed=0) == {}


@pytest.mark.parametrize("key, value", [("dense_steps", 0), ("calibration_states", 127)])
def test_params_out_of_bounds_are_named(key, value):
    with pytest.raises(ValueError, match=f"{key}: {value} is not between"):
        replace(PARAMS, **{key: value})
