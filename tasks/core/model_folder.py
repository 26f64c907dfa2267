"""Where a model folder keeps its network, weights and noise schedule, as diffusers itself looks for them.

A folder is a pipeline or a bare network. A pipeline has `model_index.json`; its parts lie in folders of their names, or beside
the index, as those of the first DDPM checkpoints do. A bare network has `config.json` and its scheduler's config. A pipeline
with a VAE or a text encoder is refused: its network does not work on pixels alone. Only JSON is read here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.core.artifacts import read_json

CLASSES = ("DiTTransformer2DModel", "UNet2DModel")
LEGACY = "Transformer2DModel"  # diffusers before 0.29 called a DiT so, and maps it by its norm_type
LEGACY_NORM = "ada_norm_zero"
BESIDE = ("scheduler", "feature_extractor", "image_processor", "safety_checker")  # parts that take no part in a denoising step
INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
TAKEN = f"one {' or '.join(CLASSES)} on pixels and a scheduler"


class NotFound(ValueError):
    """A file that a model folder should hold is not there; in a copy that is still to be fetched it may come."""


@dataclass(frozen=True)
class ModelFolder:
    """Of one network on pixels."""

    class_name: str  # one of CLASSES
    config_path: Path
    config: dict     # the network's, as read
    scheduler_path: Path
    scheduler: dict  # as read
    scheduler_class: str | None  # as the index names it, with which diffusers opens the config, whatever that says of itself

    @property
    def weights(self) -> Path:
        """The folder that holds the network's weights."""
        return self.config_path.parent


def read_folder(folder: str | Path) -> ModelFolder:
    """Raises ValueError, one line, with the file, what it holds and what is taken instead."""
    folder = Path(folder)
    if not folder.is_dir():
        raise NotFound(f"{folder}: not a folder; expected a diffusers folder")
    return read_pipeline(folder) if (folder / INDEX).exists() else read_network(folder)


def read_pipeline(folder: Path) -> ModelFolder:
    index = folder / INDEX
    parts = parts_of(read_block(index))
    name = network_part(index, parts)
    path = file_of(folder, name, CONFIG)
    config = read_block(path)
    class_name = modern_class(path, parts[name][1], config)
    said = config.get("_class_name", class_name)
    if said not in (class_name, LEGACY):
        raise ValueError(f"{path}: _class_name: {said!r} is not {class_name}, as which {index} has it")
    return ModelFolder(class_name, path, config, *scheduler_of(folder, parts))


def read_network(folder: Path) -> ModelFolder:
    """Of a folder without an index."""
    path = folder / CONFIG
    if not path.exists():
        raise NotFound(f"{folder / INDEX}: not found; expected a diffusers folder, or {CONFIG} of a bare network")
    config = read_block(path)
    class_name = modern_class(path, config.get("_class_name"), config)
    found = [place for place in (folder / SCHEDULER, folder / "scheduler" / SCHEDULER) if place.exists()]
    if not found:
        whole = f"; it is a part of {folder.parent}, which is to be named" if (folder.parent / INDEX).exists() else ""
        raise NotFound(f"{folder / SCHEDULER}: not found; a network without its noise schedule cannot be sampled from{whole}")
    return ModelFolder(class_name, path, config, found[0], read_block(found[0]), None)


def parts_of(index: Mapping) -> dict[str, tuple[str, str]]:
    """Part -> library and class. Left out are settings of the pipeline, and parts that it does without (null)."""
    pairs = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    return {name: (str(value[0]), str(value[-1])) for name, value in pairs.items() if any(value)}


def scheduler_of(folder: Path, parts: Mapping[str, tuple[str, str]]) -> tuple[Path, dict, str | None]:
    """-> the path of the scheduler's config, what it holds, and the class that the index opens it with, if it names one."""
    path = file_of(folder, "scheduler", SCHEDULER)
    return path, read_block(path), parts["scheduler"][1] if "scheduler" in parts else None


def network_part(index: Path, parts: Mapping[str, tuple[str, str]]) -> str:
    """The part that is the network."""
    networks = [name for name, (library, cls) in parts.items() if library == "diffusers" and cls in (*CLASSES, LEGACY)]
    held = ", ".join(f"{name} ({cls})" for name, (_, cls) in parts.items()) or "none"
    if not networks:
        raise ValueError(f"{index}: holds none of {', '.join(CLASSES)}; its parts are {held}")
    if Path(networks[0]).name != networks[0]:
        raise ValueError(f"{index}: part {networks[0]!r} leads out of the folder")
    others = [name for name in parts if name not in (networks[0], *BESIDE)]
    if others:
        name, cls = others[0], parts[others[0]][1]
        raise ValueError(f"{index}: {name}: {cls} is a part that a network on pixels does not have; taken is a "
                         f"folder with {TAKEN}")
    return networks[0]


def modern_class(path: Path, class_name: object, config: Mapping) -> str:
    """The class of today's diffusers."""
    if class_name == LEGACY:
        if config.get("norm_type") != LEGACY_NORM:
            raise ValueError(f"{path}: norm_type: {config.get('norm_type')!r} is not {LEGACY_NORM}, by which diffusers tells a "
                             f"{LEGACY} that is a {CLASSES[0]}")
        return CLASSES[0]
    if class_name not in CLASSES:
        raise ValueError(f"{path}: _class_name: {class_name!r} is not one of {', '.join(CLASSES)}")
    return str(class_name)


def file_of(folder: Path, part: str, name: str) -> Path:
    """Of a part's folder or, if there is none, of the pipeline's."""
    path = folder / part / name if (folder / part).is_dir() else folder / name
    if not path.exists():
        beside = "" if path.parent != folder else f", nor a folder {part} beside it"
        raise NotFound(f"{path}: not found{beside}; {INDEX} names {part}")
    return path


def read_block(path: Path) -> dict:
    data = read_json(path, infinities=True)  # lambda_min_clipped of a DPM-Solver
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds {type(data).__name__}, expected an object with keys")
    return data
