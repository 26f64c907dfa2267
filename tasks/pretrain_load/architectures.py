"""The two reference architectures as diffusers configs, sized by the data, and the noise schedule they are trained on."""

SCHEDULE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction", "clip_sample": True, "timestep_spacing": "trailing", "set_alpha_to_one": True,
            "steps_offset": 0, "rescale_betas_zero_snr": False}


def dit(size: int, channels: int, num_classes: int, *, width: int, depth: int, heads: int, patch: int) -> dict:
    """DiT (arXiv 2212.09748): class-conditional, adaLN-Zero blocks. Raises ValueError when patches or heads do not divide."""
    if size % patch:
        raise ValueError(f"pretrain_load.train.patch: {patch} does not divide the image size {size}")
    if width % heads:
        raise ValueError(f"pretrain_load.train.heads: {heads} does not divide the width {width}")
    if not num_classes:
        raise ValueError("pretrain_load.train.architecture: dit needs labelled data; unet takes data without labels")
    return {"num_attention_heads": heads, "attention_head_dim": width // heads, "in_channels": channels,
            "out_channels": channels, "num_layers": depth, "sample_size": size, "patch_size": patch,
            "num_embeds_ada_norm": num_classes, "norm_elementwise_affine": False, "norm_type": "ada_norm_zero",
            "activation_fn": "gelu-approximate", "attention_bias": True}


def unet(size: int, channels: int, *, width: int) -> dict:
    """An unconditional DDPM UNet of three resolutions with attention at the lowest two."""
    if size % 4:
        raise ValueError(f"data.side: {size} is not a multiple of 4, which a UNet of three resolutions needs")
    return {"sample_size": size, "in_channels": channels, "out_channels": channels, "layers_per_block": 1,
            "block_out_channels": [width, 2 * width, 2 * width], "norm_num_groups": 8, "attention_head_dim": 8,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}
