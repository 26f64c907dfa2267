"""What a stage reads and writes: folders with a manifest, and the two kinds of report."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.core import disk
from tasks.core.checkpoint import Checkpoint
from tasks.runtime.checks import check_manifest, check_place, read_json

ARTIFACTS, REPORTS, RUNS = Path("artifacts"), Path("reports"), Path("runs")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Report:
    """numbers: the same on every run with the same inputs; timings: whatever is measured with a clock or of a machine."""

    numbers: dict
    timings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """The validated folders of the upstream stages, and what a long stage needs to survive a kill."""

    folders: dict[str, Path]
    key: str  # digest of params, inputs and code
    cluster: Any = None
    resources: dict = field(default_factory=dict)

    def __getitem__(self, stage: str) -> Path:
        return self.folders[stage]

    def checkpoint(self, name: str, every_s: float = 30.0) -> Checkpoint:
        return Checkpoint(RUNS / "checkpoints" / name, self.key, every_s)


def write_json(path: str | Path, data: Any) -> None:
    disk.write_whole(Path(path), json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n")


def digest(data: Any) -> str:
    """Of JSON-like data, independent of the order of keys."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def payload(folder: Path) -> list[Path]:
    """Every file of an artifact but its manifest, sorted."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST and "__pycache__" not in p.parts)


def write_manifest(folder: Path, params: Any, inputs: dict[str, Path]) -> None:
    """Written last: a folder without a manifest is one that was never finished."""
    files = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "blake2b": hash_file(p)} for p in payload(folder)}
    lineage = {stage: hash_file(path / MANIFEST) for stage, path in sorted(inputs.items())}
    write_json(folder / MANIFEST, {"files": files, "inputs": lineage, "params": digest(params)})


def validate(folder: Path) -> Path:
    """The folder, once every file named by its manifest is there, whole and unchanged. Raises ValueError otherwise."""
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder / MANIFEST}: not found; run `dvc repro {folder.name}` or `dvc checkout` first")
    manifest = read_json(folder / MANIFEST)
    files = check_manifest(folder / MANIFEST, manifest.get("files") if isinstance(manifest, dict) else None)
    extra = {p.relative_to(folder).as_posix() for p in payload(folder)} - files.keys()
    if extra:
        raise ValueError(f"{folder}: {', '.join(sorted(extra)[:3])} is not in the manifest")
    for name, wanted in files.items():
        path = check_place(folder, name)
        if not path.exists():
            raise ValueError(f"{path}: missing; the manifest names it with {wanted['bytes']} bytes")
        if path.stat().st_size != wanted["bytes"]:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, the manifest says {wanted['bytes']}")
        if hash_file(path) != wanted["blake2b"]:
            raise ValueError(f"{path}: blake2b {hash_file(path)}, the manifest says {wanted['blake2b']}")
    return folder
