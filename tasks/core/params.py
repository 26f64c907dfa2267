"""`params.yaml` into frozen, validated objects; every message carries the file, the key, the value and the bound."""

import dataclasses
import difflib
import importlib
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

STAGES = ("data", "pretrain_load", "profile", "mask_search", "solver_learn", "distill", "cache_learn", "evolve", "finish",
          "package", "fid", "benchmark", "report")
SHARED = ("goal", "scale", "cluster", "resources", "threads")  # blocks that belong to no stage
SCALES = ("quick", "full")
PARAMS_FILE = Path("params.yaml")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the user tolerates and wants; it drives mask search, search and the report's verdict."""

    target: str                  # latency | bitops | size
    max_quality_loss: float      # bound of the relative FID increase against the dense model
    min_speedup: float | None    # x, images/s against the dense model on the same backend at fp32
    max_bitops: float | None     # share of the dense model's
    max_size: int | None         # bytes of the package's weights

    def __post_init__(self):
        check_choice("goal.target", self.target, ("latency", "bitops", "size"))
        check_range("goal.max_quality_loss", self.max_quality_loss, 0, 10)
        for name, low, high in (("min_speedup", 1, 10_000), ("max_bitops", 0, 1), ("max_size", 1, 1e12)):
            if getattr(self, name) is not None:
                check_range(f"goal.{name}", getattr(self, name), low, high)
        wanted = {"latency": "min_speedup", "bitops": "max_bitops", "size": "max_size"}[self.target]
        if getattr(self, wanted) is None:
            raise ValueError(f"goal.{wanted}: null, but goal.target {self.target!r} needs a number there")


def check_range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{key}: {value} is not between {low} and {high}")


def check_different(key: str, values: typing.Sequence, least: int = 1) -> None:
    """least: 0 where none is a choice, too."""
    if len(values) < least:
        raise ValueError(f"{key}: [] is empty, it needs at least one")
    if len(set(values)) < len(values):
        raise ValueError(f"{key}: {list(values)} names one twice")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}: {value!r} is not one of {', '.join(choices)}{suggestion(value, choices)}")


def suggestion(word: Any, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def read_params(path: Path = PARAMS_FILE, scale: str | None = None) -> dict:
    """The whole file with `{quick: a, full: b}` leaves resolved by `scale`."""
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds {type(raw).__name__}, expected a mapping of blocks")
    check_keys(str(path), raw, (*SHARED, *STAGES))
    scale = scale or raw["scale"]
    check_choice(f"{path}: scale", scale, SCALES)
    try:
        return {**resolve(raw, scale), "scale": scale}
    except RecursionError:
        raise ValueError(f"{path}: an anchor (&name) holds an alias (*name) of itself") from None


def read_yaml(path: Path) -> Any:
    """The file exactly as DVC reads it, which hashes the values and fills the paths into dvc.yaml: ruamel.yaml's safe loader,
    YAML 1.2. (PyYAML, YAML 1.1, reads `1e-05` as a string, `on` as true and `1:30` as 90.) A key that stands twice is an error.
    """
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run from the top of the repository") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        said = " ".join(str(error.problem or error).split())
        problem = re.sub('found duplicate key ("[^"]*").*', r"key \1 stands twice", said)
        raise ValueError(f"{path}: not YAML: {line}{problem}") from None
    except (YAMLError, ValueError, KeyError, TypeError) as error:  # a tag whose value is not of it, `!!int x`; an odd key
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def resolve(value: Any, scale: str) -> Any:
    """Replace every mapping with exactly the keys quick and full by the one that `scale` names."""
    if isinstance(value, dict):
        return resolve(value[scale], scale) if set(value) == set(SCALES) else {k: resolve(v, scale) for k, v in value.items()}
    return [resolve(v, scale) for v in value] if isinstance(value, list) else value


def check_keys(where: str, block: dict, known: typing.Iterable[str]) -> None:
    known = list(known)
    for key in block:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{suggestion(key, known)}; known: {', '.join(known)}")
    missing = [key for key in known if key not in block]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")


def construct(cls: type, block: Any, where: str) -> Any:
    """A dataclass from a block: every field named once, of its type. Bounds are the class's own affair."""
    if not isinstance(block, dict):
        raise ValueError(f"{where}: {block!r} is not a block of keys")
    hints = typing.get_type_hints(cls)
    check_keys(where, block, [f.name for f in dataclasses.fields(cls)])
    return cls(**{key: coerce(value, hints[key], f"{where}.{key}") for key, value in block.items()})


def coerce(value: Any, hint: Any, where: str) -> Any:
    """value as `hint` says: lists become tuples, whole numbers pass as float, nothing else is converted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else construct(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple and isinstance(value, list):
        return tuple(coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    if plain is not Any and (not isinstance(value, plain) or (plain is int and isinstance(value, bool))):
        raise ValueError(f"{where}: {value!r} is not of type {getattr(plain, '__name__', plain)}")
    return value


def stage_params(stage: Any, params: dict, path: Path = PARAMS_FILE) -> Any:
    """The stage module's Params from its block, with the shared `goal` filled in where the stage has that field."""
    name = stage_name(stage)
    block = params[name] or {}
    if not isinstance(block, dict):
        raise ValueError(f"{path}: {name}: {block!r} is not a block of keys")
    block = dict(block)
    if "goal" in {f.name for f in dataclasses.fields(stage.Params)}:
        block["goal"] = construct(Goal, params["goal"], f"{path}: goal")
    try:
        return construct(stage.Params, block, f"{path}: {name}")
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def stage_name(stage: Any) -> str:
    """tasks.fid.stage -> fid."""
    return stage.__name__.split(".")[1]


def look_ahead(stages: dict[str, Any], blocks: dict[str, Any]) -> dict[str, Any]:
    """What each stage can say of its result before anything runs: from names and headers of files, never from their contents.

    A stage module may have `preflight(params, known)`; known: what those of the stages before it returned. Raises ValueError
    where a stage could not work.
    """
    known: dict[str, Any] = {}
    for name, stage in stages.items():
        if hasattr(stage, "preflight"):
            known[name] = stage.preflight(blocks[name], known)
    return known


def validate_all(path: Path = PARAMS_FILE, scale: str | None = None) -> dict:
    """The preflight: every block of every stage, and all that files' names and headers say, before anything starts or is
    deleted. -> the resolved file."""
    params = read_params(path, scale)
    from tasks.core import agreement, cluster, threads
    try:
        threads.check(params["threads"])
        construct(Goal, params["goal"], "goal")
        construct(cluster.ClusterParams, params["cluster"], "cluster")
        stages = {name: importlib.import_module(f"tasks.{name}.stage") for name in STAGES}
        blocks = {name: stage_params(stage, params, path) for name, stage in stages.items()}
        agreement.check(params, STAGES)
        agreement.check_known(params, look_ahead(stages, blocks))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    return params
