"""Model folders as diffusers writes them and as users leave them: the weights that diffusers loads, or a line that refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiTTransformer2DModel, Transformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file

from tasks.core.denoiser import load, save
from tasks.core.model_folder import NotFound

UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "num_layers": 1, "sample_size": 8, "patch_size": 4,
       "num_embeds_ada_norm": 3}
STEM = "diffusion_pytorch_model"
PLAIN = f"{STEM}.safetensors"


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**UNET)


@pytest.fixture(scope="module")
def saved(unet, tmp_path_factory) -> Path:
    """A pipeline as diffusers saves it."""
    path = tmp_path_factory.mktemp("saved") / "model"
    DDPMPipeline(unet, DDIMScheduler(num_train_timesteps=100)).save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def same(model: torch.nn.Module, folder: Path) -> None:
    found, wanted = load(folder).model.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and not tensor.is_meta
        assert torch.equal(tensor, wanted[name].float()), name


def rewrite(folder: Path, change, name: str = PLAIN) -> None:
    """Save the UNet's tensors again, as `change` makes them."""
    path = folder / "unet" / name
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(folder / "unet" / PLAIN)).items()}, path)


# ---- what diffusers loads

def test_a_folder_that_diffusers_saved(folder):
    same(DDPMPipeline.from_pretrained(folder).unet, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_becomes_fp32(folder, dtype):
    rewrite(folder, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    same(UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float32), folder)


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_shards_and_variants(unet, folder, variant, capsys):
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", variant=variant, max_shard_size="40KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    same(UNet2DModel.from_pretrained(folder / "unet", variant=variant), folder)
    said = capsys.readouterr().out
    assert (f"variant {variant}, the only weights there, is taken" in said) == (variant is not None)


def test_a_variant_in_one_file_and_the_index_of_an_older_diffusers(unet, folder):
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", variant="ema")
    assert not (folder / "unet" / PLAIN).exists()
    same(UNet2DModel.from_pretrained(folder / "unet", variant="ema"), folder)
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", variant="ema", max_shard_size="40KB")
    (folder / "unet" / f"{PLAIN}.index.ema.json").rename(folder / "unet" / f"{PLAIN}.ema.index.json")
    same(UNet2DModel.from_pretrained(folder / "unet", variant="ema"), folder)


def test_the_plain_file_goes_before_variants_as_in_diffusers(folder):
    rewrite(folder, lambda state: {name: tensor + 1 for name, tensor in state.items()}, f"{STEM}.non_ema.safetensors")
    same(UNet2DModel.from_pretrained(folder / "unet"), folder)


def test_everything_beside_the_index_as_the_first_checkpoints_have_it(folder):
    for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        path.rename(folder / path.name)
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()
    same(DDPMPipeline.from_pretrained(folder).unet, folder)


@pytest.mark.parametrize("place", [".", "scheduler"])
def test_a_bare_network_with_its_scheduler(folder, place):
    (folder / "model_index.json").unlink()
    for path in (folder / "unet").iterdir():
        path.rename(folder / path.name)
    (folder / "scheduler/scheduler_config.json").rename(folder / "kept.json")
    (folder / place).mkdir(exist_ok=True)
    (folder / "kept.json").rename(folder / place / "scheduler_config.json")
    same(UNet2DModel.from_pretrained(folder), folder)


@pytest.mark.parametrize("said", ["index", "config"])
def test_the_name_that_a_dit_had_before(folder, said):
    """With the further keys that its config had then."""
    torch.manual_seed(0)
    DiTTransformer2DModel(**DIT).save_pretrained(folder / "transformer")
    config = json.loads((folder / "transformer/config.json").read_text())
    old = {"cross_attention_dim": None, "double_self_attention": False, "num_vector_embeds": None, "attention_type": "default"}
    (folder / "transformer/config.json").write_text(json.dumps(config | old | {"_class_name": "Transformer2DModel"}))
    index = {"_class_name": "DiTPipeline", "id2label": {"0": "zero"}, "scheduler": ["diffusers", "DDIMScheduler"],
             "transformer": ["diffusers", "Transformer2DModel" if said == "index" else "DiTTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    reference = Transformer2DModel.from_pretrained(folder / "transformer")
    assert type(reference) is DiTTransformer2DModel
    same(reference, folder)
    save(load(folder), folder / "again")  # under its name of today, and without those keys
    same(reference, folder / "again")


def old_attention(state: dict) -> dict:
    pairs = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    return {re.sub(r"\.(to_[qkv]|to_out\.0)\.", lambda found: pairs[found[0]], name): tensor for name, tensor in state.items()}


def test_attentions_by_the_names_that_diffusers_gave_up(folder):
    rewrite(folder, old_attention)
    assert any(".proj_attn." in name for name in load_file(folder / "unet" / PLAIN))
    same(UNet2DModel.from_pretrained(folder / "unet"), folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "ema_model.module.", "unet."])
def test_names_that_a_training_script_wrapped(unet, folder, prefix, capsys):
    """diffusers would go on with uninitialised memory."""
    rewrite(folder, lambda state: {prefix + name: tensor for name, tensor in state.items()})
    same(unet, folder)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and all(f"{part}." in said for part in prefix.split(".") if part)


def test_names_that_are_wrapped_in_the_middle_and_of_old(unet, folder):
    rewrite(folder, lambda state: {name.replace("mid_block.", "mid_block._orig_mod."): tensor
                                   for name, tensor in old_attention(state).items()})
    same(unet, folder)


def test_parts_that_are_null_or_take_no_part(folder):
    index = json.loads((folder / "model_index.json").read_text())
    more = {"vae": [None, None], "vqvae": None, "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index | more))
    same(UNet2DModel.from_pretrained(folder / "unet"), folder)


# ---- what is refused

def state_of(change):
    return lambda folder: rewrite(folder, change)


def without(state: dict, *names: str) -> dict:
    return {name: tensor for name, tensor in state.items() if name not in names}


def changed(name: str, tensor):
    return state_of(lambda state: state | {name: tensor(state[name])})


def nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[:2] = float("nan")
    return tensor


def index_of(change):
    def damage(folder):
        path = folder / "model_index.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return damage


def only(name: str):
    return lambda folder: (folder / "unet" / PLAIN).rename(folder / "unet" / name)


def both_variants(folder):
    for variant in ("ema", "fp16"):
        shutil.copy(folder / "unet" / PLAIN, folder / "unet" / f"{STEM}.{variant}.safetensors")
    (folder / "unet" / PLAIN).unlink()


def sharded(change):
    def damage(folder):
        UNet2DModel.from_pretrained(folder / "unet").save_pretrained(folder / "unet", max_shard_size="40KB")
        (folder / "unet" / PLAIN).unlink(missing_ok=True)
        path = folder / "unet" / f"{PLAIN}.index.json"
        index = json.loads(path.read_text())
        change(folder / "unet", index)
        path.write_text(json.dumps(index))
    return damage


def cut_short(folder):
    path = folder / "unet" / PLAIN
    path.write_bytes(path.read_bytes()[:-10])


def header_only(folder):
    (folder / "unet" / PLAIN).write_bytes(b"\x02\0\0\0\0\0\0\0{}")


def header(text: bytes):
    return lambda folder: (folder / "unet" / PLAIN).write_bytes(len(text).to_bytes(8, "little") + text)


def lfs(folder):
    (folder / "unet" / PLAIN).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def bare(folder):
    (folder / "model_index.json").unlink()
    for path in (folder / "unet").iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "scheduler")


def elsewhere(folder, index):
    index["weight_map"]["conv_in.bias"] = "../../other.safetensors"


REFUSED = {
    "missing layer": (state_of(lambda state: without(state, "conv_in.weight", "conv_in.bias")), f"{PLAIN}: not the weights of "
                      "UNet2DModel as its config.json has it: 2 missing (conv_in.weight, conv_in.bias)"),
    "unexpected layer": (state_of(lambda state: state | {"head.weight": torch.ones(1)}), "1 unexpected (head.weight)"),
    "unknown wrapper": (state_of(lambda state: {f"foo.{name}": tensor for name, tensor in state.items()}),
                        "missing (conv_in.weight, conv_in.bias, time_embedding.linear_1.weight, ...)"),
    "two copies": (state_of(lambda state: state | {f"ema_model.{name}": tensor.clone() for name, tensor in state.items()}),
                   "unexpected (ema_model.conv_in.bias"),
    "another shape": (changed("conv_in.weight", lambda t: t[:4]),
                      "1 of another shape (conv_in.weight), conv_in.weight is (4, 1, 3, 3), expected (8, 1, 3, 3)"),
    "nan": (changed("conv_out.bias", nan), "1 of 1 numbers of conv_out.bias are NaN or infinite in fp32"),
    "inf after fp64": (changed("conv_in.weight", lambda t: t.double() * 1e300),
                       "numbers of conv_in.weight are NaN or infinite"),
    "zeros": (state_of(lambda state: {name: torch.zeros_like(tensor) for name, tensor in state.items()}), "all weights are 0"),
    "integers": (changed("conv_in.weight", lambda t: t.to(torch.int8)),
                 "conv_in.weight: dtype I8 is not one of F16, BF16, F32, F64"),
    "pickle": (only(f"{STEM}.bin"), f"{PLAIN}: not found; expected safetensors; {STEM}.bin is a pickle and is never read"),
    "another name": (only("model.safetensors"), f"{PLAIN}: not found; expected safetensors of that name, as diffusers does; "
                     "found model.safetensors"),
    "two variants": (both_variants, f"{PLAIN}: not found, but the variants ema, fp16; the one that is meant"),
    "cut short": (cut_short, f"{PLAIN}: cannot be read as UNet2DModel: cut short or damaged"),
    "empty": (header_only, f"{PLAIN}: cannot be read as UNet2DModel: no tensor in it"),
    "no json": (header(b"[1, 2"), f"{PLAIN}: cannot be read as UNet2DModel: not safetensors, or its header is damaged"),
    "no shape": (header(b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 0]}}'), "or its header is damaged"),
    "git lfs": (lfs, f"{PLAIN}: cannot be read as UNet2DModel: a pointer of Git LFS"),
    "shard gone": (sharded(lambda folder, index: next(folder.glob("*-00002-*")).unlink()),
                   "-00002-of-00002.safetensors: not found, but diffusion_pytorch_model.safetensors.index.json names it"),
    "shard elsewhere": (sharded(elsewhere), "names '../../other.safetensors', which is no .safetensors file in its own folder"),
    "shard not in the index": (sharded(lambda folder, index: index["weight_map"].pop("conv_in.bias")),
                               "does not name conv_in.bias of its shards"),
    "tensor not in its shard": (sharded(lambda _, index: index["weight_map"].update(more=index["weight_map"]["conv_in.bias"])),
                                "more not in the shard that it names"),
    "no weight map": (sharded(lambda folder, index: index.pop("weight_map")),
                      "index.json: has no weight_map of tensors to files"),
    "shards without index": (sharded(lambda folder, index: None), None),
    "vae": (index_of(lambda index: index | {"vae": ["diffusers", "AutoencoderKL"]}),
            "model_index.json: vae: AutoencoderKL is a part that a network on pixels does not have; taken is a folder"),
    "vqvae": (index_of(lambda index: index | {"vqvae": ["diffusers", "VQModel"]}), "vqvae: VQModel is a part that"),
    "text encoder": (index_of(lambda index: {"text_encoder": ["transformers", "CLIPTextModel"]} | index),
                     "text_encoder: CLIPTextModel is a part"),
    "two networks": (index_of(lambda index: index | {"unet_2": ["diffusers", "UNet2DModel"]}),
                     "unet_2: UNet2DModel is a part that"),
    "a class of one's own": (index_of(lambda index: index | {"unet": ["unet", "UNet2DModel"]}), "holds none of "
                             "DiTTransformer2DModel, UNet2DModel; its parts are scheduler (DDIMScheduler), unet"),
    "another class": (index_of(lambda index: index | {"unet": ["diffusers", "DiTTransformer2DModel"]}),
                      "config.json: _class_name: 'UNet2DModel' is not DiTTransformer2DModel, as which"),
    "no scheduler": (bare, "scheduler_config.json: not found; a network without its noise schedule cannot be sampled from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_rest_is_refused_in_one_line(folder, case):
    damage, message = REFUSED[case]
    damage(folder)
    if message is None:
        (folder / "unet" / f"{PLAIN}.index.json").unlink()
        message = f"{PLAIN}: not found; expected safetensors, or {PLAIN}.index.json, which says what"
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        load(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_a_part_of_a_pipeline_names_the_whole(folder):
    with pytest.raises(ValueError, match=f"; it is a part of {folder}, which is to be named"):
        load(folder / "unet")


# ---- finite numbers that compute what is not

def test_weights_that_are_finite_and_too_large(folder):
    rewrite(folder, lambda state: {name: tensor * (1e30 if name.startswith("conv_in") else 1) for name, tensor in state.items()}
            | {"mid_block.resnets.0.conv1.weight": state["mid_block.resnets.0.conv1.weight"] * 1e35})
    with pytest.raises(ValueError, match="safetensors: the network's prediction for noise is not finite, although its weights"):
        load(folder)


def test_a_config_that_divides_by_zero(folder):
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mid_block_scale_factor": 0}))
    with pytest.raises(ValueError, match="prediction for noise is not finite"):
        load(folder)


def test_weights_that_are_a_link_to_nothing(folder):
    """As in a hub's cache whose blobs were cleared away."""
    (folder / "unet" / PLAIN).unlink()
    (folder / "unet" / PLAIN).symlink_to(folder / "blob")
    with pytest.raises(NotFound, match=f"{PLAIN}: a link to .*blob, where nothing is"):
        load(folder)


def test_a_number_of_classes_that_is_null(folder):
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_num_classes": None}))
    assert load(folder).num_classes == 0
