"""The one inner noun: any diffusers model, adapted once at the border to `denoiser(x, t, labels) -> prediction`.

Knows `DiTTransformer2DModel` (class-conditional) and `UNet2DModel` (with or without classes). A sublayer, the unit of
caching, is attention or feed-forward of a DiT block, or a resnet or attention block of a UNet.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tasks.core.architecture import CLASS_KEYS, NUM_CLASSES, check_evaluation, skeleton
from tasks.core.model_folder import read_folder
from tasks.core.schedule import Schedule
from tasks.core.weights import Weights, find, read
from tasks.runtime.packed import time_input

ARCHITECTURES = {"DiTTransformer2DModel": "transformer", "UNet2DModel": "unet"}  # class name -> folder in a pipeline


@dataclass(frozen=True)
class Sublayer:
    name: str      # module path inside the model, e.g. transformer_blocks.3.attn1
    kind: str      # attention | feed_forward | resnet


class Denoiser:
    """model: NCHW, t (N,) fp32 or int64 and labels (N,) int64 or None -> NCHW prediction (a learned variance is cut off)."""

    def __init__(self, model: nn.Module, schedule: Schedule):
        self.model, self.schedule = model, schedule
        config = model.config
        self.architecture = {"DiTTransformer2DModel": "dit", "UNet2DModel": "unet"}[type(model).__name__]
        size = config.sample_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.sample_shape = (config.in_channels, height, width)
        # DiTTransformer2DModel counts the classes and adds the null row itself; UNet2DModel counts every row.
        rows = config.get(CLASS_KEYS[type(model).__name__]) or 0
        own = config.get(NUM_CLASSES)
        self.num_classes = rows if own is None else own
        self.has_null_label = self.architecture == "dit" or rows > self.num_classes

    @property
    def null_label(self) -> int:
        """The row after the classes: of no label, where `has_null_label`."""
        return self.num_classes

    def with_classes(self, num_classes: int) -> "Denoiser":
        """This network, all further rows of its label table being no class: as many as the data has. It is kept in the
        model's config, so its copies and files know of it."""
        self.model.register_to_config(**{NUM_CLASSES: num_classes})
        return Denoiser(self.model, self.schedule)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.architecture == "dit":
            out = self.model(x, timestep=t, class_labels=labels, return_dict=False)[0]
        else:
            labels = labels if self.num_classes else None
            out = self.model(x, time_input(self.model, t), class_labels=labels, return_dict=False)[0]
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
            # attention j comes after resnet j; the only one of a skip block on the way up comes after all of them
            last = len(block.resnets) - 1 if type(block).__name__ == "AttnSkipUpBlock2D" else 0
            for j in range(len(block.resnets)):
                found.append(Sublayer(f"{prefix}.resnets.{j}", "resnet"))
                if last <= j < last + len(attentions) and attentions[j - last] is not None:
                    found.append(Sublayer(f"{prefix}.attentions.{j - last}", "attention"))
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


@dataclass(frozen=True)
class Inspected:
    """A model folder of which all is known but the numbers."""

    denoiser: Denoiser  # its parameters are on the meta device
    weights: Weights
    config_path: Path


def inspect(folder: str | Path) -> Inspected:
    """Parts, configs, schedule, and the names and shapes of the weights by their headers: nothing large is read.

    Raises ValueError, one line, naming the file, the key or tensor, what it is and what is taken instead.
    """
    found = read_folder(folder)
    model = skeleton(found.class_name, found.config, found.config_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = find(found.weights, shapes, found.class_name)
    schedule = Schedule.read(found.scheduler_path, found.scheduler, found.scheduler_class)
    return Inspected(Denoiser(model, schedule), weights, found.config_path)


def load(folder: str | Path) -> Denoiser:
    """A denoiser from a folder as diffusers reads it, in fp32: `inspect`, then the weights, from safetensors alone.

    Every tensor of the network comes from a file and is finite. Raises ValueError as `inspect` does.
    """
    return read_weights(inspect(folder))


def read_weights(found: Inspected) -> Denoiser:
    for note in found.weights.notes:
        print(note, flush=True)
    model = found.denoiser.model
    model.load_state_dict(read(found.weights), assign=True)
    denoiser = Denoiser(in_channels_last(model).eval().requires_grad_(False), found.denoiser.schedule)
    check_prediction(denoiser, found.weights.files[0])
    return denoiser


@torch.no_grad()
def check_prediction(denoiser: Denoiser, weights: Path) -> None:
    """Weights may be finite while what they compute is not: noise at timestep 0, which every schedule has, is tried."""
    x = torch.randn(1, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(1, dtype=torch.int64)
    if not denoiser(x, zero, zero if denoiser.num_classes else None).isfinite().all():
        raise ValueError(f"{weights}: the network's prediction for noise is not finite, although its weights are; they are too "
                         "large, or a value of its config, such as norm_eps, makes it so")


def check_inspected(found: Inspected) -> None:
    """What takes a second to know: that the network makes an image of an image, at every timestep of the schedule."""
    model, steps = found.denoiser.model, found.denoiser.schedule.steps
    check_evaluation(model, found.config_path)
    rows = model.config.get("num_train_timesteps")
    if model.config.get("time_embedding_type") == "learned" and rows < steps:
        raise ValueError(f"{found.config_path}: num_train_timesteps: {rows} is below {steps}, the scheduler's timesteps: a "
                         "learned embedding has a row for each")


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
