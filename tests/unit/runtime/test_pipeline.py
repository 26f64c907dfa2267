"""Packages opened by plain diffusers in another process, without this repository, against the live models here."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tasks.core.denoiser import Denoiser, build
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import cached_network, initial_noise, labels_for, sample
from tasks.core.sparsity import kept_shares, nm_mask
from tasks.package.write import write_package
from tasks.runtime.masks import apply_masks, hidden_units, shrink_units
from tasks.runtime.packed import PackedDenoiser
from tasks.runtime.pipeline import agreed_count
from tasks.runtime.precision import apply_precision, calibrate_ranges, live_precision, remove_precision

DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 10, "norm_elementwise_affine": False,
       "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1, "attention_head_dim": 4}
SCHEDULE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction", "clip_sample": True}
STEPS = (980, 700, 400, 100)

OPEN_ALL = """
import json, sys
from pathlib import Path
sys.modules["tasks"] = None  # an editable install must not help
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
given = load_file(sys.argv[1])
out = {}
for folder in sys.argv[3:]:
    name = Path(folder).name
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    labels = given["labels"] if pipe.denoiser.num_classes else None
    out[name] = pipe(noise=given["noise"], class_labels=labels, output_type="latent").images
    if name == "dense":
        out["guided"] = pipe(noise=given["noise"], class_labels=labels, guidance_scale=2.0, output_type="latent").images
        drawn = {kind: pipe(class_labels=[1, 2], generator=torch.Generator().manual_seed(3), output_type=kind).images
                 for kind in ("pt", "np")}
        out |= {kind: torch.as_tensor(images) for kind, images in drawn.items()}
        assert [image.size for image in pipe(batch_size=3).images] == [(8, 8)] * 3
        pipe.save_pretrained(str(Path(folder).parent / "copy"))
        again = DiffusionPipeline.from_pretrained(str(Path(folder).parent / "copy"), trust_remote_code=True)
        out["copy"] = again(noise=given["noise"], class_labels=labels, output_type="latent", return_dict=False)[0]
save_file({name: images.contiguous() for name, images in out.items()}, sys.argv[2])
"""


def tiny(name: str, config: dict) -> Denoiser:
    """Random weights, the zero-initialised ones included: every layer and every label must matter."""
    rng = torch.Generator().manual_seed(0)
    denoiser = build(name, config, SCHEDULE)
    for parameter in denoiser.model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=rng)
    return Denoiser(denoiser.model.eval().requires_grad_(False), denoiser.schedule)


def given_noise(denoiser: Denoiser):
    return initial_noise(denoiser.sample_shape, range(3), 0), labels_for(range(3), denoiser.num_classes)


def here(denoiser: Denoiser, recipe: Recipe, ranges: dict, guidance: float = 1.0) -> torch.Tensor:
    """The live model in this process: precision and cache as the recipe says; masks are the caller's affair."""
    apply_precision(denoiser.model, recipe.precision, ranges)
    noise, labels = given_noise(denoiser)
    return sample(cached_network(denoiser, recipe), denoiser.schedule, recipe, noise, labels, guidance, denoiser.null_label)


def everything_live(denoiser: Denoiser) -> tuple[Recipe, dict, dict]:
    """A recipe with masks, a cache and every kind of precision; its ranges and masks."""
    names = tuple(s.name for s in denoiser.sublayers())
    compute = tuple(tuple(step % 2 == 0 or i % 2 == 0 for i in range(len(names))) for step in range(len(STEPS)))
    layers = [name for name, layer in denoiser.prunable_layers().items() if layer.weight.shape[1] % 4 == 0]
    tokens = ("w8a8", "w4a8", "bf16", "w3a6", "fp32")
    precision = {name: tokens[i % len(tokens)] for i, name in enumerate(layers)}
    masks = {f"{name}.weight": nm_mask(denoiser.model.get_submodule(name).weight, 2, 4) for name in layers}
    recipe = Recipe(timesteps=STEPS, solver="dpm2m", cache=CachePlan(sublayers=names, compute=compute), precision=precision,
                    sparsity={"grain": "2:4", "density": kept_shares(denoiser.model, "2:4", masks)})
    noise, labels = given_noise(denoiser)
    ranges = calibrate_ranges(denoiser.model, [(noise, torch.full((3,), t), labels) for t in STEPS], denoiser.joins())
    return recipe, ranges, masks


def half_the_units(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    """Masks of the consumers' columns: the second half of the units of every feed-forward, attention and resnet goes."""
    masks = {}
    for units in hidden_units(denoiser.model):
        weight = denoiser.model.get_submodule(units.consumer).weight
        masks[f"{units.consumer}.weight"] = torch.ones_like(weight, dtype=torch.bool)
        masks[f"{units.consumer}.weight"][:, units.count // 2:] = False
    return masks


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Images by package, from plain diffusers in another process and from the live models in this one."""
    root = tmp_path_factory.mktemp("packages")
    expected = {}
    for kind, make in (("dit", lambda: tiny("DiTTransformer2DModel", DIT)), ("unet", lambda: tiny("UNet2DModel", UNET))):
        dense = Recipe(timesteps=STEPS)
        name = "dense" if kind == "dit" else "unet_dense"
        write_package(make(), dense, {}, {}, root / name)
        expected[name] = here(make(), dense, {})

        recipe, ranges, masks = everything_live(make())
        write_package(make(), recipe, ranges, masks, root / f"{kind}_all")
        live = make()
        apply_masks(live.model, masks)
        expected[f"{kind}_all"] = here(live, recipe, ranges)

        live, masks = make(), half_the_units(make())
        shares = kept_shares(live.model, "unit", masks)
        write_package(make(), replace(dense, sparsity={"grain": "unit", "density": shares}), {}, masks, root / f"{kind}_units")
        apply_masks(live.model, masks)
        expected[f"{kind}_units"] = here(live, dense, {})

        small = make()
        shrink_units(small.model, masks)
        recipe = replace(recipe, sparsity={"grain": "unit", "density": shares})
        write_package(make(), recipe, ranges, masks, root / f"{kind}_units_all")
        expected[f"{kind}_units_all"] = here(small, recipe, ranges)
    expected["copy"] = expected["dense"]
    expected["guided"] = here(tiny("DiTTransformer2DModel", DIT), Recipe(timesteps=STEPS), {}, guidance=2.0)

    noise, labels = given_noise(tiny("DiTTransformer2DModel", DIT))
    save_file({"noise": noise, "labels": labels}, root / "given.safetensors")
    folders = [str(p) for p in sorted(root.iterdir()) if p.is_dir()]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules"), "PYTHONPATH": "",
           "OMP_NUM_THREADS": str(torch.get_num_threads())}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-c", OPEN_ALL, root / "given.safetensors", root / "images.safetensors", *folders],
                   check=True, cwd=elsewhere, env=env)
    from safetensors.torch import load_file
    return load_file(root / "images.safetensors"), expected, root


@pytest.mark.parametrize("name", ["dense", "unet_dense", "dit_all", "unet_all", "guided", "copy", "dit_units_all",
                                  "unet_units_all"])
def test_plain_diffusers_gives_the_same_image_bit_by_bit(opened, name):
    there, expected, _ = opened
    assert torch.equal(there[name], expected[name])


@pytest.mark.parametrize("name", ["dit_units", "unet_units"])
def test_a_shrunk_package_gives_the_masked_models_image_up_to_the_order_of_its_sums(opened, name):
    there, expected, _ = opened
    torch.testing.assert_close(there[name], expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "attention", "heads"), [
    ("dit_units_all", "transformer_blocks.1.attn1", 1), ("unet_units_all", "mid_block.attentions.0", 2)])
def test_half_of_the_heads_are_in_a_shrunk_package(opened, name, attention, heads):
    _, _, root = opened
    model = PackedDenoiser.from_pretrained(root / name / "denoiser").model
    assert model.get_submodule(attention).heads == heads
    assert json.loads((root / name / "denoiser" / "packing.json").read_text())["kept"][attention] == 8


def test_the_compressed_images_are_not_the_dense_ones(opened):
    there, _, _ = opened
    assert (there["dit_all"] - there["dense"]).abs().max() > 0.01
    assert (there["dit_units"] - there["dense"]).abs().max() > 0.01
    assert (there["guided"] - there["dense"]).abs().max() > 0.01


def test_output_types_agree(opened):
    there, _, root = opened
    pt = there["pt"]
    assert pt.shape == (2, 1, 8, 8) and 0 <= pt.min() <= pt.max() <= 1
    np.testing.assert_array_equal(there["np"].numpy(), pt.permute(0, 2, 3, 1).numpy())
    denoiser = PackedDenoiser.from_pretrained(root / "dense" / "denoiser")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    dit = tiny("DiTTransformer2DModel", DIT)
    latent = sample(denoiser, dit.schedule, Recipe(timesteps=STEPS), noise, torch.tensor([1, 2]))
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1), atol=0, rtol=0)


def test_the_package_says_what_it_is(opened):
    _, _, root = opened
    index = json.loads((root / "dense" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "CompressedPipeline"]
    assert PackedDenoiser.from_pretrained(root / "dit_all" / "denoiser").recipe["solver"] == "dpm2m"


def test_an_opened_package_holds_no_second_copy_of_its_weights(opened):
    _, _, root = opened
    model = PackedDenoiser.from_pretrained(root / "dit_all" / "denoiser").model
    layer = "transformer_blocks.0.attn1.to_q"
    before = live_precision(model)[layer]
    remove_precision(model)
    assert before != "fp32" and model.get_submodule(layer).weight.device.type == "meta"


def test_labels_outside_the_classes_are_refused(opened):
    _, _, root = opened
    dit, unet = (PackedDenoiser.from_pretrained(root / name / "denoiser") for name in ("dense", "unet_dense"))
    assert dit.labels(None, 2, "cpu").tolist() == [10, 10]
    with pytest.raises(ValueError, match=r"class_labels: \[3, 11\] not all between 0 and 10"):
        dit.labels([3, 11], 2, "cpu")
    with pytest.raises(ValueError, match="the model is unconditional"):
        unet.labels([3], 1, "cpu")


def test_sizes_that_disagree_are_named():
    assert agreed_count(None, None, None) == 1 and agreed_count(None, [1, 2], torch.zeros(2, 1, 8, 8)) == 2
    with pytest.raises(ValueError, match="sizes disagree: batch_size 3, class_labels 2"):
        agreed_count(3, [1, 2], None)
