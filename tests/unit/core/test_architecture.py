"""Every kind of UNet2DModel and DiTTransformer2DModel that diffusers builds works in all parts of the pipeline, or is refused
in a line with file, key, value and what is taken."""

import re

import pytest
import torch

from tasks.cache_learn.stage import units_of
from tasks.core.architecture import check_config, check_evaluation, skeleton
from tasks.core.cost import layer_costs
from tasks.core.denoiser import Denoiser, build
from tasks.evolve.conditioning import remembered
from tasks.evolve.prefix import Predictions
from tasks.pretrain_load.architectures import SCHEDULE
from tasks.profile.compressed import first_units
from tasks.runtime.cache import TRUNK, apply_cache, remove_cache
from tasks.runtime.masks import apply_masks, hidden_units, remove_masks, shrink_units

PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
UNET = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32), "layers_per_block": 1,
        "norm_num_groups": 8, "attention_head_dim": 8, **PLAIN}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "num_layers": 2, "sample_size": 8, "patch_size": 2,
       "num_embeds_ada_norm": 3}


def blocks(down: str, up: str) -> dict:
    return {"down_block_types": (down, down), "up_block_types": (up, up)}


TAKEN = {
    "plain": ("UNet2DModel", {}),
    "resnets between resolutions": ("UNet2DModel", blocks("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")),
    "resnets as down- and upsamplers": ("UNet2DModel", blocks("AttnDownBlock2D", "AttnUpBlock2D") | {
        "downsample_type": "resnet", "upsample_type": "resnet"}),
    "skip": ("UNet2DModel", blocks("SkipDownBlock2D", "SkipUpBlock2D")),
    "skip with attention": ("UNet2DModel", blocks("AttnSkipDownBlock2D", "AttnSkipUpBlock2D")),
    "no middle, one group": ("UNet2DModel", {"mid_block_type": None, "norm_num_groups": 1}),
    "no attention, old names": ("UNet2DModel", blocks("UNetResDownBlock2D", "UNetResUpBlock2D") | {"add_attention": False}),
    "learned times": ("UNet2DModel", {"time_embedding_type": "learned", "num_train_timesteps": 1000, "act_fn": "mish"}),
    "one head, centred input": ("UNet2DModel", {"attention_head_dim": None, "center_input_sample": True, "dropout": 0.1}),
    "odd heads, variance": ("UNet2DModel", {"attention_head_dim": 24, "out_channels": 6, "mid_block_scale_factor": 2}),
    "classes": ("UNet2DModel", {"num_class_embeds": 3, "downsample_padding": 0, "freq_shift": 1, "norm_num_groups": 32}),
    "dit": ("DiTTransformer2DModel", {"attention_bias": False, "out_channels": 2, "upcast_attention": True}),
    "dit, gated": ("DiTTransformer2DModel", {"activation_fn": "geglu", "patch_size": 4, "norm_elementwise_affine": True}),
    "dit, swish-gated": ("DiTTransformer2DModel", {"activation_fn": "swiglu", "patch_size": 1, "num_attention_heads": 1}),
    "dit, linear": ("DiTTransformer2DModel", {"activation_fn": "linear-silu", "in_channels": 3, "num_layers": 1}),
}


def config_of(class_name: str, changes: dict) -> dict:
    return {**(UNET if class_name == "UNet2DModel" else DIT), **changes}


@pytest.fixture(params=TAKEN)
def denoiser(request) -> Denoiser:
    class_name, changes = TAKEN[request.param]
    torch.manual_seed(0)
    made = build(class_name, config_of(class_name, changes), SCHEDULE)
    made.model.eval().requires_grad_(False)
    return made


def inputs(denoiser: Denoiser) -> tuple:
    x = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([500, 500]), torch.tensor([0, 2]) if denoiser.num_classes else None


@torch.no_grad()
def test_the_pipeline_works_on_it(denoiser):
    """Its parts are what runs, masks and removed units agree, a cache that skips nothing new changes nothing."""
    model, x = denoiser.model, inputs(denoiser)
    ran = computed(denoiser, x)
    assert [s.name for s in denoiser.sublayers()] == ran
    for path, (below, skip) in denoiser.joins().items():
        assert below > 0 and skip > 0 and below + skip == model.get_submodule(path).in_channels
    assert {cost.name for cost in layer_costs(denoiser)} >= set(denoiser.prunable_layers())
    dense = denoiser(*x)
    units = hidden_units(model)
    masks = {f"{u.consumer}.weight": first_units(model, u, 0.5) for u in units}
    apply_masks(model, masks)
    masked = denoiser(*x)
    remove_masks(model)
    assert torch.equal(denoiser(*x), dense)
    assert skipping(denoiser, x, dense)
    answer = remembered_twice(denoiser, x)
    assert torch.equal(answer, dense)
    shrink_units(model, masks)  # last: there is no way back
    torch.testing.assert_close(denoiser(*x), masked, atol=1e-4, rtol=1e-4)


def computed(denoiser: Denoiser, x: tuple) -> list[str]:
    ran: list[str] = []
    hooks = [denoiser.model.get_submodule(s.name).register_forward_hook(lambda *_, name=s.name: ran.append(name))
             for s in denoiser.sublayers()]
    denoiser(*x)
    for hook in hooks:
        hook.remove()
    return ran


def skipping(denoiser: Denoiser, x: tuple, dense: torch.Tensor) -> bool:
    """Where a step has the input of the one before, what it reuses is what it would compute."""
    names = units_of(denoiser, "trunk")
    handle = apply_cache(denoiser.model, names, [[True] * len(names), [False] * len(names)])
    for handle.step in (0, 1):
        found = denoiser(*x)
    remove_cache(denoiser.model)
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)
    return names == [TRUNK] or hasattr(denoiser.model.down_blocks[0], "skip_conv")


def remembered_twice(denoiser: Denoiser, x: tuple) -> torch.Tensor:
    predict = lambda x, t, labels, step: denoiser(x, t, labels)  # noqa: E731
    with remembered(predict, denoiser.model, denoiser.conditioning(), "w", {}, Predictions(1 << 20)) as answer:
        answer(*x, 0)
        return answer(*x, 0)


REFUSED = [
    ("UNet2DModel", {"class_embed_type": "timestep"},
     "class_embed_type: timestep is not null, with num_class_embeds for labels"),
    ("UNet2DModel", {"class_embed_type": "identity"}, "class_embed_type: identity is not null"),
    ("UNet2DModel", {"time_embedding_type": "fourier"}, "time_embedding_type: fourier is not positional or learned"),
    ("UNet2DModel", {"time_embedding_type": "learned"}, "num_train_timesteps: null is not a number"),
    ("UNet2DModel", {"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift: spatial is not default or scale_shift"),
    ("UNet2DModel", {"mid_block_type": "UNetMidBlock2DCrossAttn"},
     "mid_block_type: UNetMidBlock2DCrossAttn is not UNetMidBlock2D"),
    ("UNet2DModel", {"downsample_type": "fir"}, "downsample_type: fir is not conv or resnet or null"),
    ("UNet2DModel", blocks("KDownBlock2D", "KUpBlock2D"), "down_block_types: KDownBlock2D is not one of DownBlock2D, "),
    ("UNet2DModel", blocks("DownBlock2D", "CrossAttnUpBlock2D"), "up_block_types: CrossAttnUpBlock2D is not one of UpBlock2D"),
    ("UNet2DModel", blocks("SkipDownBlock2D", "SkipUpBlock2D") | {"in_channels": 1, "out_channels": 1},
     "in_channels: 1 is not 3, which SkipDownBlock2D wants"),
    ("UNet2DModel", {"down_block_types": None}, "down_block_types: null is not a list of DownBlock2D, "),
    ("UNet2DModel", {"in_channels": "3"}, "in_channels: 3 is not 1 (grey) or 3 (RGB)"),
    ("UNet2DModel", {"in_channels": 4, "out_channels": 4}, "in_channels: 4 is not 1 (grey) or 3 (RGB)"),
    ("UNet2DModel", {"out_channels": 4}, "out_channels: 4 is not 3, as in_channels, or 6 with a learned variance"),
    ("UNet2DModel", {"sample_size": None}, "sample_size: null is not a number of pixels"),
    ("UNet2DModel", {"sample_size": [8, 16]}, "sample_size: [8, 16] is not square"),
    ("UNet2DModel", {"sample_size": 9}, "sample_size: 9 is not a multiple of 2"),
    ("UNet2DModel", {"num_class_embeds": 0}, "num_class_embeds: 0 is not a number of classes or null"),
    ("UNet2DModel", {"quantization_config": {"load_in_8bit": True}},
     "quantization_config: {'load_in_8bit': True} is not a key of"),
    ("DiTTransformer2DModel", {"qk_norm": "rms"}, "qk_norm: rms is not a key of DiTTransformer2DModel"),
    ("DiTTransformer2DModel", {"norm_type": "ada_norm_single"}, "norm_type: ada_norm_single is not ada_norm_zero"),
    ("DiTTransformer2DModel", {"num_embeds_ada_norm": None}, "num_embeds_ada_norm: null is not a number of classes"),
    ("DiTTransformer2DModel", {"in_channels": 4}, "in_channels: 4 is not 1 (grey) or 3 (RGB)"),
    ("DiTTransformer2DModel", {"patch_size": 3}, "sample_size: 8 is not a multiple of 3 (patch_size)"),
]


@pytest.mark.parametrize("class_name, changes, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_what_is_not_honoured_is_named(class_name, changes, message):
    with pytest.raises(ValueError, match=re.escape(f"config.json: {message}")) as refused:
        check_config(class_name, config_of(class_name, changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("class_name, changes, message", [
    ("UNet2DModel", {"act_fn": "softmax"}, "UNet2DModel cannot be computed as it is described: activation function softmax"),
    ("UNet2DModel", {"layers_per_block": [1, 2]}, "cannot be computed as it is described: 'list' object"),
    ("UNet2DModel", {"norm_num_groups": 5}, "cannot be computed as it is described: num_channels (32) must be"),
    ("UNet2DModel", {"downsample_padding": 2}, "cannot be computed as it is described: Sizes of tensors must match"),
    ("UNet2DModel", {"attention_head_dim": 64}, "cannot be computed as it is described: integer division"),
    ("UNet2DModel", {"up_block_types": ["SkipUpBlock2D", "UpBlock2D"]}, "cannot be computed as it is described: Attempting"),
    ("DiTTransformer2DModel", {"attention_head_dim": 3}, "cannot be computed as it is described")])
def test_what_no_rule_foresees_fails_before_it_runs(class_name, changes, message):
    with pytest.raises(ValueError, match=f"config.json: .*{re.escape(message)}") as refused:
        check_evaluation(skeleton(class_name, config_of(class_name, changes)))
    assert "\n" not in str(refused.value)
