"""Whether the teacher fits the data, known from its folder's configs and headers before anything runs."""

from pathlib import Path

from tasks.core import denoiser as denoisers
from tasks.core.agreement import Data
from tasks.core.architecture import CLASS_KEYS, check_evaluation, skeleton
from tasks.core.denoiser import Denoiser, Schedule, check_inspected
from tasks.pretrain_load import architectures

CLASS_NAMES = {"dit": "DiTTransformer2DModel", "unet": "UNet2DModel"}  # of params.yaml


def inspected(folder: str | Path, data: Data) -> denoisers.Inspected:
    """A model folder that fits the data. Raises ValueError, one line, with file or key, value and what is taken instead."""
    found = denoisers.inspect(folder)
    check_inspected(found)
    check_fit(found.denoiser, data, found.config_path)
    return found


def planned(shape: dict, data: Data) -> Denoiser:
    """The network that `source: train` will train, without weights. shape: TrainParams' first five fields."""
    class_name, config = architecture(shape, data.side, data.channels, data.num_classes)
    where = Path("pretrain_load.train")
    model = skeleton(class_name, config, where)
    check_evaluation(model, where)
    return Denoiser(model, Schedule.from_config(architectures.SCHEDULE))


def architecture(shape: dict, size: int, channels: int, num_classes: int) -> tuple[str, dict]:
    """-> class and config of a reference architecture."""
    if shape["architecture"] == "dit":
        config = architectures.dit(size, channels, num_classes, **{k: shape[k] for k in ("width", "depth", "heads", "patch")})
    else:
        config = architectures.unet(size, channels, width=shape["width"])
    return CLASS_NAMES[shape["architecture"]], config


def check_fit(teacher: Denoiser, data: Data, config_path: Path) -> None:
    """The teacher's images and classes are the data's."""
    channels, height, _ = teacher.sample_shape
    for key, value, own, name in (("data.side", data.side, height, "sample_size"),
                                  ("data.channels", data.channels, channels, "in_channels")):
        if value != own:
            raise ValueError(f"{key}: {value} is not {own}, the teacher's {name} ({config_path})")
    key = CLASS_KEYS[type(teacher.model).__name__]
    if teacher.num_classes and classes_of(teacher, data.num_classes) != data.num_classes:
        more = f" or {data.num_classes + 1}, with a null label" if teacher.architecture == "unet" and data.num_classes else ""
        raise ValueError(f"{config_path}: {key}: {teacher.num_classes} is not {data.num_classes}{more}: the data has "
                         f"{data.num_classes} classes")


def classes_of(teacher: Denoiser, num_classes: int) -> int:
    """How many of the teacher's labels are classes: in a UNet whose table has one row more than the data has classes, the last
    row is the null label."""
    extra = teacher.architecture == "unet" and num_classes > 0 and teacher.num_classes == num_classes + 1
    return num_classes if extra else teacher.num_classes


def fitted(teacher: Denoiser, num_classes: int) -> Denoiser:
    """The teacher, which knows of its null label if it has one."""
    classes = classes_of(teacher, num_classes)
    return teacher if classes == teacher.num_classes else teacher.with_classes(classes)
