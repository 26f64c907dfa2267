"""Which configs of a network are taken, and the network of one without its weights.

A rule for each key whose other values would be computed in another way than the config says, or not at all; then one evaluation
of the network on torch's meta device, which computes shapes and nothing else, for what no rule foresees.
"""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.core.model_folder import CLASSES, CONFIG, LEGACY

DIT, UNET = CLASSES
NUM_CLASSES = "_num_classes"  # in a UNet's config: how many rows of its label table are classes; one more is the null label
BLOCKS = {"down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D", "SkipDownBlock2D",
                               "AttnSkipDownBlock2D"),
          "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")}
RESAMPLING = ("conv", "resnet", None)
CHOICES: dict[str, dict[str, tuple]] = {
    UNET: {"class_embed_type": (None,), "time_embedding_type": ("positional", "learned"),
           "resnet_time_scale_shift": ("default", "scale_shift"), "mid_block_type": ("UNetMidBlock2D", None),
           "downsample_type": RESAMPLING, "upsample_type": RESAMPLING},
    DIT: {"norm_type": ("ada_norm_zero",)}}
INSTEAD = {"class_embed_type": "null, with num_class_embeds for labels", "time_embedding_type": "positional or learned"}
CLASS_KEYS = {DIT: "num_embeds_ada_norm", UNET: "num_class_embeds"}


def check_config(class_name: str, config: Mapping, path: Path = Path(CONFIG)) -> None:
    """Raises ValueError, one line, with the file, the key, its value and what is taken."""
    known = defaults(class_name)
    for key, value in config.items():
        if key not in known and not key.startswith("_") and value and value != legacy_default(config, key):
            refuse(path, key, value, f"a key of {class_name} in the installed diffusers; it would be ignored")
    full = {**known, **config}
    for key, choices in CHOICES[class_name].items():
        if full[key] not in choices:
            refuse(path, key, full[key], INSTEAD.get(key) or " or ".join(map(said, choices)))
    check_channels(path, full)
    if class_name == UNET:
        check_blocks(path, full)
        check_timesteps(path, full)
    check_size(path, full, class_name)
    check_classes(path, full, class_name)


def refuse(path: Path, key: str, value: Any, instead: str) -> None:
    raise ValueError(f"{path}: {key}: {said(value)} is not {instead}")


def said(value: Any) -> str:
    return "null" if value is None else str(value)


def defaults(class_name: str) -> dict[str, Any]:
    """Every key that the class takes, with its default."""
    import diffusers
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("self", "args", "kwargs")}


def legacy_default(config: Mapping, key: str) -> Any:
    """What a key of the DiT's class of old says where it says nothing."""
    return defaults(LEGACY).get(key) if config.get("_class_name") == LEGACY else None


def check_channels(path: Path, config: Mapping) -> None:
    channels, out = config["in_channels"], config["out_channels"]
    if channels not in (1, 3):
        refuse(path, "in_channels", channels, "1 (grey) or 3 (RGB): the network does not work on pixels")
    if out not in (None, channels, 2 * channels):
        refuse(path, "out_channels", out, f"{channels}, as in_channels, or {2 * channels} with a learned variance")


def check_size(path: Path, config: Mapping, class_name: str) -> None:
    size = config["sample_size"]
    sides = list(size) if isinstance(size, (tuple, list)) and class_name == UNET else [size, size]
    if len(sides) != 2 or not all(is_count(side) for side in sides):
        refuse(path, "sample_size", size, "a number of pixels")
    if sides[0] != sides[1]:
        refuse(path, "sample_size", size, "square, which data.side makes every image")
    divisor, why = ((config["patch_size"], "patch_size") if class_name == DIT else
                    (2 ** (len(config["down_block_types"]) - 1), "each of down_block_types but the last halves it"))
    if not is_count(divisor) or sides[0] % divisor:
        refuse(path, "sample_size", size, f"a multiple of {divisor} ({why})")


def check_classes(path: Path, config: Mapping, class_name: str) -> None:
    key, own = CLASS_KEYS[class_name], config.get(NUM_CLASSES)
    if own is not None and own not in (config[key], (config[key] or 0) - 1):
        refuse(path, NUM_CLASSES, own, f"{key}, {config[key]}, or one less")
    if not is_count(config[key]) and (class_name == DIT or config[key] is not None):
        refuse(path, key, config[key], "a number of classes" + ("" if class_name == DIT else " or null"))


def check_blocks(path: Path, config: Mapping) -> None:
    for key, known in BLOCKS.items():
        if not isinstance(config[key], (tuple, list)) or not config[key]:
            refuse(path, key, config[key], f"a list of {', '.join(known)}")
        for name in config[key]:
            if str(name).removeprefix("UNetRes") not in known:
                refuse(path, key, name, f"one of {', '.join(known)}")
    skips = [name for key in BLOCKS for name in config[key] if "Skip" in name]
    if skips and config["in_channels"] != 3:
        refuse(path, "in_channels", config["in_channels"], f"3, which {skips[0]} wants")


def check_timesteps(path: Path, config: Mapping) -> None:
    if config["time_embedding_type"] == "learned" and not is_count(config["num_train_timesteps"]):
        refuse(path, "num_train_timesteps", config["num_train_timesteps"], "a number, which time_embedding_type learned wants")


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def skeleton(class_name: str, config: Mapping, path: Path = Path(CONFIG)) -> nn.Module:
    """The network with all parameters on the meta device: names and shapes, no numbers. Its buffers are real, as the config has
    them. Raises ValueError where the config is not taken or diffusers cannot build it."""
    import diffusers
    from accelerate import init_empty_weights
    from diffusers.utils import logging
    check_config(class_name, config, path)
    kept = [key for key in config if key in defaults(class_name) or key == NUM_CLASSES]
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with init_empty_weights(include_buffers=False):
            return getattr(diffusers, class_name).from_config({key: config[key] for key in kept}).eval()
    except Exception as error:  # diffusers raises a dozen kinds for a config that it cannot build
        raise cannot_compute(path, class_name, error) from error
    finally:
        logging.set_verbosity(level)


def check_evaluation(model: nn.Module, path: Path = Path(CONFIG)) -> None:
    """One evaluation on the meta device: an image of the config's size gives one of that size, or with a learned variance."""
    class_name, config = type(model).__name__, model.config
    side, channels = side_of(config), config.in_channels
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    labels = t if config.get(CLASS_KEYS[class_name]) else None
    network = copy.deepcopy(model).to("meta")
    try:
        with torch.no_grad():
            x = torch.zeros(1, channels, side, side, device="meta")
            shape = tuple(network(x, timestep=t, class_labels=labels, return_dict=False)[0].shape)
    except Exception as error:  # as many kinds as torch has
        raise cannot_compute(path, class_name, error) from error
    if shape not in [(1, n, side, side) for n in (channels, 2 * channels)]:
        raise ValueError(f"{path}: the network makes {shape[1:]} of images of {(channels, side, side)}")


def cannot_compute(path: Path, class_name: str, error: Exception) -> ValueError:
    line = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path}: {class_name} cannot be computed as it is described: {line}")


def side_of(config: Mapping) -> int:
    size = config["sample_size"]
    return size[0] if isinstance(size, (tuple, list)) else size
