"""Networks whose speed is of interest and whose weights are not: of published shapes, with random weights."""

import torch

from tasks.core import denoiser as denoisers
from tasks.core.denoiser import Denoiser
from tasks.pretrain_load.stage import TEACHERS

TRAINED_STEPS = {"num_train_timesteps": 1000}
SHAPES = {
    "dit_xl_2": ("DiTTransformer2DModel", {  # DiT-XL/2 at 256 x 256, arXiv 2212.09748
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
        "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False,
        "norm_type": "ada_norm_zero"}),
    "ddpm_cifar10": ("UNet2DModel", {  # DDPM on CIFAR-10, arXiv 2006.11239, as google/ddpm-cifar10-32 has it
        "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "layers_per_block": 2,
        "attention_head_dim": None, "downsample_padding": 0, "norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False}),
}


def model_of(name: str) -> Denoiser:
    """One of SHAPES with random weights, or a shipped teacher."""
    if name not in SHAPES:
        return denoisers.load(TEACHERS / name)
    torch.manual_seed(0)
    return denoisers.build(*SHAPES[name], TRAINED_STEPS)
