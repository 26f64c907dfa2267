"""Package folders: what is stored, that it is the same bytes every time, and that damage is named."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tasks.core.denoiser import Denoiser, build
from tasks.core.recipe import Recipe
from tasks.core.sparsity import kept_shares, nm_mask
from tasks.package.write import seal, write_package
from tasks.runtime.masks import hidden_units
from tasks.runtime.packed import PackedDenoiser, decode, encode, open_model, verify
from tasks.runtime.precision import quantize_weight

DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 10, "norm_elementwise_affine": False,
       "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}
SCHEDULE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction", "clip_sample": True}
FF = "transformer_blocks.0.ff.net"
PLAIN = Recipe(timesteps=(900, 600, 300))


@pytest.fixture(scope="module")
def dit() -> Denoiser:
    torch.manual_seed(0)
    return build("DiTTransformer2DModel", DIT, SCHEDULE)


def two_of_four(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    names = [f"{FF}.{part}.weight" for part in ("0.proj", "2")]
    return {name: nm_mask(denoiser.model.get_parameter(name), 2, 4) for name in names}


def half_the_units(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    """The hidden units of every feed-forward with an odd index go."""
    masks = {}
    for units in hidden_units(denoiser.model):
        keep = torch.arange(units.count) % 2 == 0
        masks[f"{units.producers[0]}.weight"] = keep[:, None].expand_as(denoiser.model.get_submodule(units.producers[0]).weight)
        masks[f"{units.consumer}.weight"] = keep[None].expand_as(denoiser.model.get_submodule(units.consumer).weight)
    return masks


def weights(folder):
    return load_file(folder / "denoiser" / "weights.safetensors")


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_integers_survive_packing(bits, masked):
    rng = torch.Generator().manual_seed(bits)
    values = torch.randint(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), (5, 7), generator=rng).to(torch.int8)
    mask = torch.rand(5, 7, generator=rng) > 0.5
    state = {"layer.weight_int": values * mask if masked else values, "layer.bias": torch.ones(5)}
    stored, layout = encode(state, {"layer.weight_int": bits}, {"layer.weight_int": mask} if masked else {})
    assert stored["layer.weight_int"].numel() == -(-(int(mask.sum()) if masked else 35) * bits // 8)
    assert all(torch.equal(decode(stored, json.loads(json.dumps(layout)))[name], state[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_floats_survive_packing(dtype):
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    weight = torch.arange(1, 9).reshape(2, 4).to(dtype) * mask
    stored, layout = encode({"w": weight}, {}, {"w": mask})
    assert stored["w"].tolist() == [1, 4, 6, 7]
    assert stored["w.mask"].tolist() == [0b10010110]
    assert torch.equal(decode(stored, layout)["w"], weight)


def test_the_same_arguments_give_the_same_bytes(dit, tmp_path):
    masks = two_of_four(dit)
    recipe = Recipe(timesteps=(900, 300), precision={f"{FF}.0.proj": "w4a8", f"{FF}.2": "bf16"},
                    sparsity={"grain": "2:4", "density": kept_shares(dit.model, "2:4", masks)})
    ranges = {f"{FF}.0.proj": (-3.0, 3.0)}
    first, second = (write_package(dit, recipe, ranges, masks, tmp_path / name) for name in ("a", "b"))
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_the_denoiser_is_left_unchanged(dit, tmp_path):
    before = {name: p.clone() for name, p in dit.model.state_dict().items()}
    masks = half_the_units(dit)
    recipe = Recipe(timesteps=(900,), precision={f"{FF}.2": "bf16"}, sparsity={"grain": "unit", "density": {}})
    write_package(dit, recipe, {}, masks, tmp_path / "p")
    after = dit.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_stored_sizes_follow_bits_masks_and_shapes(dit, tmp_path):
    layer, count = f"{FF}.0.proj", dit.model.get_submodule(f"{FF}.0.proj").weight.numel()
    four_bits = Recipe(timesteps=(9,), precision={layer: "w4a8"})
    stored = weights(write_package(dit, four_bits, {layer: (-1.0, 1.0)}, {}, tmp_path / "w4"))
    assert stored[f"{layer}.weight_int"].numel() == count // 2 and f"{layer}.weight" not in stored

    masks = two_of_four(dit)
    sparse = Recipe(timesteps=(9,), sparsity={"grain": "2:4", "density": kept_shares(dit.model, "2:4", masks)})
    stored = weights(write_package(dit, sparse, {}, masks, tmp_path / "sparse"))
    assert stored[f"{layer}.weight"].shape == (count // 2,) and stored[f"{layer}.weight.mask"].shape == (count // 8,)

    units = Recipe(timesteps=(9,), sparsity={"grain": "unit", "density": {}})
    stored = weights(write_package(dit, units, {}, half_the_units(dit), tmp_path / "unit"))
    assert stored[f"{layer}.weight"].shape == (32, 16) and stored[f"{FF}.2.weight"].shape == (16, 32)


@pytest.mark.parametrize("grain", [None, "2:4", "unit"])
def test_learned_integers_are_what_is_stored(dit, tmp_path, grain):
    """Other integers than the nearest ones, on their grid; of units that are cut out nothing is stored."""
    layer, masks = f"{FF}.0.proj", {None: {}, "2:4": two_of_four(dit), "unit": half_the_units(dit)}[grain]
    weight = dit.model.get_submodule(layer).weight * masks.get(f"{layer}.weight", True)
    nearest, scale = quantize_weight(weight, 4)
    learned = torch.where(weight != 0, (nearest - 1).clamp(-7, 7), nearest).to(torch.int8)
    recipe = Recipe(timesteps=(9,), precision={layer: "w4a8"}, sparsity={"grain": grain, "density": {}} if grain else None)
    write_package(dit, recipe, {layer: (-1.0, 1.0)}, masks, tmp_path / "p", {(layer, 4): learned, (layer, 5): nearest})
    found = open_model(tmp_path / "p" / "denoiser")[0].get_submodule(layer)
    kept = masks[f"{layer}.weight"].any(1) if grain == "unit" else slice(None)
    assert torch.equal(found.weight_int, learned[kept]) and torch.equal(found.weight_scale, scale[kept])


def test_kept_shares_are_of_what_is_stored(dit):
    assert kept_shares(dit.model, "2:4", two_of_four(dit)) == {f"{FF}.0.proj": 0.5, f"{FF}.2": 0.5}
    shares = kept_shares(dit.model, "unit", half_the_units(dit))
    assert len(shares) == 4 and set(shares.values()) == {0.5}


def test_masks_without_sparsity_in_the_recipe_are_refused(dit, tmp_path):
    with pytest.raises(ValueError, match="2 masks, but the recipe's sparsity is None"):
        write_package(dit, PLAIN, {}, two_of_four(dit), tmp_path / "p")


DATA = ["model_index.json", "recipe.json", "denoiser/config.json", "denoiser/packing.json", "denoiser/weights.safetensors",
        "scheduler/scheduler_config.json", "openvino/graph.bin"]


@pytest.fixture(scope="module")
def sealed(dit, tmp_path_factory):
    folder = write_package(dit, PLAIN, {}, {}, tmp_path_factory.mktemp("packages") / "sealed")
    (folder / "openvino").mkdir()
    (folder / "openvino" / "graph.bin").write_bytes(bytes(100))
    seal(folder)
    return folder


@pytest.mark.parametrize("name", DATA)
def test_a_changed_byte_is_named_with_expected_and_found(sealed, name):
    original = (sealed / name).read_bytes()
    (sealed / name).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match=f"{name}: expected {len(original)} bytes with blake2b .*, found {len(original)}"):
            PackedDenoiser.from_pretrained(sealed / "denoiser")
    finally:
        (sealed / name).write_bytes(original)


@pytest.mark.parametrize("name", DATA)
def test_a_missing_file_is_named(sealed, name):
    original = (sealed / name).read_bytes()
    (sealed / name).unlink()
    try:
        with pytest.raises(ValueError, match=f"{name}: missing, expected {len(original)} bytes"):
            verify(sealed)
    finally:
        (sealed / name).write_bytes(original)


def test_graphs_may_be_left_out_of_a_copy(sealed, tmp_path):
    import shutil
    shutil.copytree(sealed, tmp_path / "copy", ignore=shutil.ignore_patterns("openvino"))
    assert not (tmp_path / "copy" / "openvino").exists() and verify(tmp_path / "copy") is None


def test_another_format_is_refused(sealed, tmp_path):
    (tmp_path / "package.json").write_text(json.dumps({"format": 2, "files": {}}))
    with pytest.raises(ValueError, match="format 2, this code reads format 1"):
        verify(tmp_path)


def test_a_dtype_is_refused(sealed):
    with pytest.raises(ValueError, match="torch_dtype: torch.float16 given, but recipe.json"):
        PackedDenoiser.from_pretrained(sealed / "denoiser", torch_dtype=torch.float16)
