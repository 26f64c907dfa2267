"""Weights of a network in safetensors: which files hold them, what their headers say, and whether that is the network's.

The headers alone say names, shapes and dtypes, in milliseconds; `read` opens the tensors themselves. The weights are refused
unless each parameter is in a file: no parameter keeps what happened to lie in memory. Pickles are never read.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tasks.core.artifacts import read_json
from tasks.core.model_folder import NotFound

STEM, SUFFIX = "diffusion_pytorch_model", ".safetensors"
PLAIN = f"{STEM}{SUFFIX}"
VARIANT = re.compile(rf"{STEM}\.(?P<variant>[^/]+){re.escape(SUFFIX)}")
VARIANT_INDEX = re.compile(rf"{re.escape(PLAIN)}\.(?:index\.(?P<variant>[^/]+)|(?P<before>[^/]+)\.index)\.json")
SHARD = re.compile(r"-\d+-of-\d+")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5")
DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # taken, with the bytes of a number
MOST_HEADER = 100_000_000  # bytes, as safetensors itself allows
LFS = b"version https://git-lfs"

# What wraps a network while it is trained adds itself to the names of its weights, anywhere (torch.compile, FSDP, activation
# checkpoints, DDP), or in front, as the attribute that a training script keeps it in.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
HOLDERS = ("model", "ema_model", "ema", "online_model", "unet", "transformer", "dit", "net", "network", "denoiser",
           "denoise_fn", "diffusion_model", "backbone", "student", "teacher")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


@dataclass(frozen=True)
class Entry:
    """A tensor, as a header has it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """A tensor of the files for each of the network's."""

    entries: dict[str, Entry]  # by the network's own name for it
    notes: tuple[str, ...]     # what was taken that does not go without saying

    @property
    def parameters(self) -> int:
        return sum(torch.Size(entry.shape).numel() for entry in self.entries.values())

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})


def find(folder: Path, wanted: Mapping[str, Sequence[int]], class_name: str) -> Weights:
    """wanted: shape by name, of a network of that class. Raises ValueError, one line, with the file and the names."""
    source, notes = choose_file(folder)
    entries = read_index(source, class_name) if source.suffix == ".json" else read_header(source, class_name)
    named, more = match(source, {entry.name: entry for entry in entries}, wanted, class_name)
    check_dtypes(named.values())
    return Weights(named, (*notes, *more))


# ---- which files ----

def choose_file(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """-> the file of the weights, or the index of its shards; and what is to be said. As diffusers chooses: shards before a
    single file; the only variant where there is nothing else, for which diffusers wants `variant=`."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() or path.is_symlink())
    if lost := next((name for name in names if not (folder / name).exists()), None):
        raise NotFound(f"{folder / lost}: a link to {os.readlink(folder / lost)}, where nothing is")
    for name in (f"{PLAIN}.index.json", PLAIN):
        if name in names:
            return folder / name, ()
    variants: dict[str, str] = {}
    for name in names:
        if found := VARIANT_INDEX.fullmatch(name):
            variants[found["variant"] or found["before"]] = name
    for name in names:
        if (found := VARIANT.fullmatch(name)) and not SHARD.search(name):
            variants.setdefault(found["variant"], name)
    if len(variants) > 1:
        raise ValueError(f"{folder / PLAIN}: not found, but the variants {', '.join(sorted(variants))}; the one that is "
                         "meant is to have this name, or to be alone")
    for variant, name in variants.items():
        return folder / name, (f"{folder / name}: variant {variant}, the only weights there, is taken",)
    raise NotFound(f"{folder / PLAIN}: not found; expected safetensors{hint(names)}")


def hint(names: Iterable[str]) -> str:
    pickles = [name for name in names if name.endswith(PICKLES)]
    tensors = [name for name in names if name.endswith(SUFFIX)]
    shards = [name for name in tensors if SHARD.search(name)]
    if shards:
        return f", or {PLAIN}.index.json, which says what {', '.join(shards[:3])} hold"
    if tensors:
        return f" of that name, as diffusers does; found {', '.join(tensors[:3])}"
    return f"; {', '.join(pickles[:3])} is a pickle and is never read" if pickles else ""


def read_index(path: Path, class_name: str) -> list[Entry]:
    """The tensors of all shards that an index names."""
    index = read_json(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise ValueError(f"{path}: has no weight_map of tensors to files")
    held: dict[str, dict[str, Entry]] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(SUFFIX):
            raise ValueError(f"{path}: names {name!r}, which is no {SUFFIX} file in its own folder")
        if not path.with_name(name).exists():
            raise NotFound(f"{path.with_name(name)}: not found, but {path.name} names it")
        held[name] = {entry.name: entry for entry in read_header(path.with_name(name), class_name)}
    if lost := sorted(tensor for tensor, name in places.items() if tensor not in held[name]):
        raise ValueError(f"{path}: {listed(lost)} not in the shard that it names, {places[lost[0]]}")
    if more := sorted(tensor for name, found in held.items() for tensor in found if places.get(tensor) != name):
        raise ValueError(f"{path}: does not name {listed(more)} of its shards")
    return [held[name][tensor] for tensor, name in places.items()]


def read_header(path: Path, class_name: str) -> list[Entry]:
    """Eight bytes of length, then JSON: name -> dtype, shape, place. The file is as long as the places say."""
    with open(path, "rb") as file:
        start = file.read(len(LFS))
        if start == LFS:
            raise refusal(path, class_name, "a pointer of Git LFS in their place; `git lfs pull` fetches them")
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or not 2 <= length <= MOST_HEADER:
            raise refusal(path, class_name, "not safetensors, no header")
        file.seek(8)
        text, size = file.read(length), file.seek(0, 2)
    try:
        entries, end = parse_header(path, text)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):  # of JSON, and of what it holds
        raise refusal(path, class_name, "not safetensors, or its header is damaged") from None
    if size != 8 + length + end:
        raise refusal(path, class_name, f"cut short or damaged, {size} bytes where its header says {8 + length + end}")
    if not entries:
        raise refusal(path, class_name, "no tensor in it")
    return entries


def parse_header(path: Path, text: bytes) -> tuple[list[Entry], int]:
    """-> the tensors, and where the last of them ends."""
    header = json.loads(text)
    header.pop("__metadata__", None)
    entries = [Entry(path, name, str(of["dtype"]), tuple(map(int, of["shape"]))) for name, of in header.items()]
    return entries, max((int(of["data_offsets"][1]) for of in header.values()), default=0)


def refusal(path: Path, class_name: str, why: str) -> ValueError:
    return ValueError(f"{path}: cannot be read as {class_name}: {why}")


# ---- whose they are ----

def match(source: Path, held: Mapping[str, Entry], wanted: Mapping[str, Sequence[int]],
          class_name: str) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """-> a tensor for each that is wanted, and what is to be said of how they were named."""
    named, notes = modern(held, wanted), ()
    if named.keys() != wanted.keys() and (unwrapped := without_wrappers(held, wanted)) is not None:
        named, wrapper = unwrapped
        notes = (f"{source}: without {wrapper} in them, the names of the tensors are {class_name}'s; they are taken so",)
    if why := difference(named, wanted):
        raise ValueError(f"{source}: not the weights of {class_name} as its config.json has it: {why}")
    return named, notes


def difference(named: Mapping[str, Entry], wanted: Mapping[str, Sequence[int]]) -> str:
    """Between what is there and what is wanted, by counts and first names; empty if there is none."""
    kinds = {"missing": [name for name in wanted if name not in named],
             "unexpected": [name for name in named if name not in wanted],
             "of another shape": [name for name in wanted if name in named and named[name].shape != tuple(wanted[name])]}
    found = [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names]
    if other := kinds["of another shape"]:
        found.append(f"{other[0]} is {named[other[0]].shape}, expected {tuple(wanted[other[0]])}")
    return ", ".join(found)


def modern(held: Mapping[str, Entry], wanted: Mapping[str, Sequence[int]]) -> dict[str, Entry]:
    """Attentions by today's names, as diffusers renames them."""
    found = {}
    for name, entry in held.items():
        block, _, kind = name.rpartition(".")
        parent, _, old = block.rpartition(".")
        new = f"{parent}.{OLD_ATTENTION[old]}.{kind}" if old in OLD_ATTENTION else name
        found[new if name not in wanted and new in wanted and new not in held else name] = entry
    return found


def without_wrappers(held: Mapping[str, Entry], wanted: Mapping[str, Sequence[int]]) -> tuple[dict[str, Entry], str] | None:
    """The tensors by the names that they have without wrappers, and the wrappers; None if these are not the wanted ones."""
    plain, seen = {}, {}
    for name, entry in held.items():
        parts = name.split(".")
        left = [part for part in parts if part not in WRAPPERS]
        while len(left) > 1 and left[0] in HOLDERS:
            left = left[1:]
        seen |= dict.fromkeys(part for part in parts if part in WRAPPERS or (part in HOLDERS and part not in left))
        plain[".".join(left)] = entry
    named = modern(plain, wanted)
    if named.keys() != wanted.keys() or len(named) != len(held):
        return None
    return named, " and ".join(f"{part}." for part in seen)


def check_dtypes(entries: Iterable[Entry]) -> None:
    for entry in entries:
        if entry.dtype not in DTYPES:
            raise ValueError(f"{entry.file}: {entry.name}: dtype {entry.dtype} is not one of {', '.join(DTYPES)}")


def listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


# ---- the tensors ----

def read(weights: Weights) -> dict[str, Tensor]:
    """Every tensor in fp32, by the network's names. Raises ValueError where a number is none or all are 0."""
    from safetensors import SafetensorError, safe_open
    found: dict[str, Tensor] = {}
    for path in weights.files:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(entry.name).to(torch.float32, copy=True)
                          for name, entry in weights.entries.items() if entry.file == path}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    check_values(weights, found)
    return {name: found[name] for name in weights.entries}


def check_values(weights: Weights, found: Mapping[str, Tensor]) -> None:
    wrong = [name for name in weights.entries if not found[name].isfinite().all()]
    if wrong:
        first = found[wrong[0]]
        raise ValueError(f"{weights.entries[wrong[0]].file}: {int((~first.isfinite()).sum())} of {first.numel()} numbers of "
                         f"{wrong[0]} are NaN or infinite in fp32; so are some in {len(wrong) - 1} other tensors")
    if not any(tensor.any() for tensor in found.values() if tensor.ndim > 1):
        raise ValueError(f"{weights.files[0]}: all weights are 0; expected those of a trained network")
