"""The one inner noun: any diffusers model, adapted once at the border to `denoiser(x, t, labels) -> prediction`.

Knows `DiTTransformer2DModel` (class-conditional) and `UNet2DModel` (with or without classes). A sublayer, the unit of
caching, is attention or feed-forward of a DiT block, or a resnet or attention block of a UNet.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tasks.core.schedule import Schedule, read_block

ARCHITECTURES = {"DiTTransformer2DModel": "transformer", "UNet2DModel": "unet"}  # class name -> folder in a pipeline


@dataclass(frozen=True)
class Sublayer:
    name: str      # module path inside the model, e.g. transformer_blocks.3.attn1
    kind: str      # attention | feed_forward | resnet


class Denoiser:
    """model: NCHW and t (N,) int64 and labels (N,) int64 or None -> NCHW prediction (a learned variance is cut off)."""

    def __init__(self, model: nn.Module, schedule: Schedule):
        self.model, self.schedule = model, schedule
        config = model.config
        self.architecture = {"DiTTransformer2DModel": "dit", "UNet2DModel": "unet"}[type(model).__name__]
        size = config.sample_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.sample_shape = (config.in_channels, height, width)
        classes = config.num_embeds_ada_norm if self.architecture == "dit" else config.num_class_embeds
        # DiTTransformer2DModel counts the classes and adds the null row itself; UNet2DModel counts every row.
        self.num_classes = classes or 0

    @property
    def null_label(self) -> int:
        return self.num_classes

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.architecture == "dit":
            out = self.model(x, timestep=t, class_labels=labels, return_dict=False)[0]
        else:
            out = self.model(x, t, class_labels=labels if self.num_classes else None, return_dict=False)[0]
        return out[:, : x.shape[1]]

    def sublayers(self) -> list[Sublayer]:
        """In the order of computation."""
        if self.architecture == "dit":
            return [Sublayer(f"transformer_blocks.{i}.{part}", kind) for i in range(len(self.model.transformer_blocks))
                    for part, kind in (("attn1", "attention"), ("ff", "feed_forward"))]
        found = []
        groups = [(f"down_blocks.{i}", block) for i, block in enumerate(self.model.down_blocks)]
        groups += [("mid_block", self.model.mid_block)] if self.model.mid_block is not None else []
        groups += [(f"up_blocks.{i}", block) for i, block in enumerate(self.model.up_blocks)]
        for prefix, block in groups:
            attentions = list(getattr(block, "attentions", None) or [])
            for j in range(len(block.resnets)):
                found.append(Sublayer(f"{prefix}.resnets.{j}", "resnet"))
                # the mid block computes resnet 0, then attention j before resnet j + 1
                if j < len(attentions) and attentions[j] is not None:
                    found.append(Sublayer(f"{prefix}.attentions.{j}", "attention"))
        return found

    def joins(self) -> dict[str, tuple[int, int]]:
        """Convolutions that read a concatenation, the first one and the shortcut of every resnet on a UNet's way up: path ->
        channels of what comes from below, and of the skip connection."""
        if self.architecture == "dit":
            return {}
        found, below = {}, (self.model.mid_block or self.model.down_blocks[-1]).resnets[-1]
        for i, block in enumerate(self.model.up_blocks):
            for j, resnet in enumerate(block.resnets):
                channels = below.out_channels, resnet.in_channels - below.out_channels
                parts = (part for part in ("conv1", "conv_shortcut") if getattr(resnet, part, None) is not None)
                found |= {f"up_blocks.{i}.resnets.{j}.{part}": channels for part in parts}
                below = resnet
        return found

    def conditioning(self) -> dict[str, tuple[str, ...]]:
        """Modules whose output timestep and label alone decide, together with the weights of these layers: path -> layers."""
        if self.architecture == "dit":
            norms = [f"transformer_blocks.{i}.norm1" for i in range(len(self.model.transformer_blocks))]
            embedders = {norm: self.layers_in(f"{norm}.emb") for norm in norms}
            found = {f"{norm}.emb": layers for norm, layers in embedders.items()}
            found |= {f"{norm}.linear": (*layers, f"{norm}.linear") for norm, layers in embedders.items()}
            return found | {"proj_out_1": (*embedders[norms[0]], "proj_out_1")}
        embedder = self.layers_in("time_embedding")
        projections = [name for name in self.prunable_layers() if name.endswith(".time_emb_proj")]
        return {"time_embedding": embedder} | {name: (*embedder, name) for name in projections}

    def layers_in(self, module: str) -> tuple[str, ...]:
        return tuple(name for name in self.prunable_layers() if name.startswith(f"{module}."))

    def prunable_layers(self) -> dict[str, nn.Module]:
        """Every Linear and Conv2d by module path."""
        return {name: m for name, m in self.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def build(class_name: str, config: dict, schedule_config: dict) -> Denoiser:
    """A denoiser with random weights from a diffusers model config."""
    import diffusers
    if class_name not in ARCHITECTURES:
        raise ValueError(f"model class {class_name!r} is not one of {', '.join(ARCHITECTURES)}")
    return Denoiser(getattr(diffusers, class_name).from_config(config), Schedule.from_config(schedule_config))


def load(folder: str | Path) -> Denoiser:
    """A denoiser from a diffusers pipeline folder: `model_index.json`, `transformer/` or `unet/`, `scheduler/`; fp32.

    Weights are read from safetensors only. Raises ValueError naming the file and what was expected.
    """
    import diffusers
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.exists():
        raise ValueError(f"{index}: not found; expected a diffusers folder")
    parts = read_block(index)
    for class_name, part in ARCHITECTURES.items():
        if isinstance(parts.get(part), list) and class_name in parts[part]:
            break
    else:
        raise ValueError(f"{index}: holds none of {', '.join(ARCHITECTURES)}; its parts are "
                         f"{', '.join(k for k in parts if not k.startswith('_'))}")
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        others = sorted(p.name for p in weights.parent.glob("*.bin")) if weights.parent.exists() else []
        hint = f"; {', '.join(others)} is a pickle and is never read" if others else ""
        raise ValueError(f"{weights}: not found; expected safetensors{hint}")
    try:
        model = getattr(diffusers, class_name).from_pretrained(
            str(folder), subfolder=part, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    except Exception as error:  # safetensors and diffusers raise a dozen kinds for a damaged file
        raise ValueError(f"{weights}: cannot be read as {class_name}: {str(error).splitlines()[0]}") from error
    return Denoiser(in_channels_last(model).eval().requires_grad_(False), Schedule.read(folder))


def in_channels_last(model: nn.Module) -> nn.Module:
    """Convolution weights in the memory order that a CPU's kernels want: a DiT's patch embedding takes a ninth of the time."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model


def save(denoiser: Denoiser, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a diffusers pipeline folder that `load` and plain diffusers read."""
    import copy
    folder = Path(folder)
    model = copy.deepcopy(denoiser.model).to(dtype, memory_format=torch.contiguous_format)  # the one that safetensors writes
    class_name = type(model).__name__
    part = ARCHITECTURES[class_name]
    model.save_pretrained(folder / part, safe_serialization=True)
    config = json.loads((folder / part / "config.json").read_text())
    config.pop("_name_or_path", None)  # where it was read from: another value on every machine
    (folder / part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(denoiser.schedule.config, indent=2) + "\n")
    index = {"_class_name": "DiffusionPipeline", part: ["diffusers", class_name], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
