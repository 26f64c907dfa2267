"""A one-block DiT and a small UNet of the same few pixels, their masks and their images."""

import torch

from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser, build
from tasks.core.sparsity import nm_mask
from tasks.distill.images import Images
from tasks.distill.settings import Settings
from tasks.distill.train import Student, train
from tasks.mask_search.masks import misfits, unit_masks

SETTINGS = Settings(steps=6, batch=4, accumulate=1, lr=1e-2, warmup=1, weight_decay=0.01, ema_decay=0.9, sr_ste=2e-4,
                    decay="gradient", prune_at=(0.5,), freeze_at=1.0, precondition=0.0, data=1.0, lam=0.5, features=0.0,
                    bank_share=0.5, label_dropout=0.1, bf16=False, log_every=2, seed=0)
SCHEDULE = {"num_train_timesteps": 50, "prediction_type": "v_prediction"}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 1,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_elementwise_affine": False,
       "norm_type": "ada_norm_zero"}
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8],
        "norm_num_groups": 4, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}


def frozen(class_name: str, config: dict) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build(class_name, config, SCHEDULE)
    denoiser.model.eval().requires_grad_(False)
    return denoiser


def tiny_dit() -> Denoiser:
    return frozen("DiTTransformer2DModel", DIT)


def tiny_unet() -> Denoiser:
    return frozen("UNet2DModel", UNET)


def tiny_images(labelled: bool = True) -> Images:
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (12, 1, 8, 8), generator=rng, dtype=torch.uint8)
    return Images(pixels=pixels, labels=torch.arange(12) % 3 if labelled else None, real=8)


def masks_of(denoiser: Denoiser, grain: str) -> dict[str, torch.Tensor]:
    if grain == "2:4":
        return two_four({n: layer for n, layer in denoiser.prunable_layers().items() if ".ff." in n or ".resnets." in n})
    block = "transformer_blocks.0.ff" if denoiser.architecture == "dit" else "mid_block.resnets.0"
    return unit_masks(denoiser.model, {block: 0.5})


def two_four(layers: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """2:4 masks of the layers that it divides."""
    left = misfits(layers, "2:4")
    return {f"{name}.weight": nm_mask(layer.weight, 2, 4) for name, layer in layers.items() if name not in left}


def distilled(denoiser: Denoiser, grain: str, checkpoint: Checkpoint, settings: Settings = SETTINGS,
              method: str = "sr_ste") -> Student:
    images = tiny_images(denoiser.num_classes > 0)
    return train(denoiser, masks_of(denoiser, grain), grain, method, images, settings, checkpoint)
