"""What DVC knows: the DAG, and which stages are stale. Asked in this process, once per run."""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import networkx as nx
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage
from prefect.settings import PREFECT_HOME

from tasks.core import disk
from tasks.core.artifacts import ARTIFACTS, REPORTS
from tasks.core.params import PARAMS_FILE

LEAST_FREE = 1_000_000_000        # the shipped model's artifacts are 0.2 GB, as much again in DVC's cache; twice that for the
                                  # folders that are written while the previous ones still stand
LEAST_FREE_PREFECT = 100_000_000  # its database, the write-ahead log and a run's logs take a few MB

logging.getLogger("dvc").setLevel(logging.ERROR)  # it warns of locks that killed runs left, and clears them itself


def dag(until: str | None = None) -> dict[str, tuple[str, ...]]:
    """stage -> the stages it reads from, in the order in which `dvc repro` would run them.

    until: only this stage and all it needs; None: every stage.
    """
    with Repo(".") as repo:
        stages = [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]  # data of `dvc add` runs nothing
        names = [stage.name for stage in stages]
        upstream = nx.relabel_nodes(repo.index.graph.subgraph(stages), lambda stage: stage.name)
    if until not in (None, *names):
        raise ValueError(f"until: {until!r} is not one of {', '.join(names)}")
    if until is not None:
        upstream = upstream.subgraph({until, *nx.descendants(upstream, until)})
    order = nx.lexicographical_topological_sort(upstream.reverse(), key=names.index)
    return {name: tuple(sorted(upstream.successors(name), key=names.index)) for name in order}


def to_run(stages: dict[str, tuple[str, ...]], forced: Collection[str] = ()) -> set[str]:
    """The stale and the forced stages and everything downstream of one: whether the latter really changed is known once the
    former ran."""
    with Repo(".") as repo:
        stale = {Path(target).name.rpartition(":")[2] for target in repo.status()}.union(forced)
    for name, upstream in stages.items():
        if not stale.isdisjoint(upstream):
            stale.add(name)
    return stale & stages.keys()


def put_back(stage: str, stood: bool) -> str | None:
    """Restore from the cache what DVC deleted before a stage that then failed: its artifacts and its reports.

    stood: there was a result before. -> why it is not there again, in one line, or None. It must not hide why the stage failed.
    """
    try:
        with Repo(".") as repo:
            outs = repo.stage.load_one(name=stage).outs
            if not all(out.hash_info for out in outs):  # it never succeeded
                return None
            repo.checkout(targets=[stage], force=True, allow_missing=True)
            lost = [why for out in outs if (why := what_is_wrong(Path(out.def_path), out.hash_info.value))]
    except (OSError, DvcException) as error:
        return (f"{stage}: the previous result is safe in DVC's cache but could not be put back "
                f"({' '.join(str(error).split())}); `dvc checkout {stage}` does it once that is mended")
    if not lost or not stood:
        return None
    free = disk.free_bytes(ARTIFACTS) / 1e6
    return (f"{stage}: the previous result could not be put back ({', '.join(lost)}; {free:.0f} MB are free): with room and a "
            f"whole cache `dvc checkout {stage}` does it, else `dvc pull {stage}` or another run")


def what_is_wrong(out: Path, md5: str) -> str | None:
    """A checkout leaves out what the cache lacks or has no room for, without a word, and trusts what the cache holds."""
    if not out.exists():
        return f"{out} is missing"
    return None if dvc_md5(out) == md5 else f"{out} is not what it was"


def dvc_md5(path: Path) -> str:
    """As dvc.lock has it, of the bytes that are there: a file's MD5, or that of the list of a folder's files and theirs."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    names = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file() and p.parent.name != "__pycache__"}
    files = [{"md5": dvc_md5(names[name]), "relpath": name} for name in sorted(names)]
    return f"{hashlib.md5(json.dumps(files).encode(), usedforsecurity=False).hexdigest()}.dir"


def clear_broken_lock() -> None:
    """DVC writes the list of its locks in place. A kill in that moment leaves half of it, and whatever DVC is asked later, it
    refuses. Whoever calls holds our own locks: nobody of ours is writing it."""
    locks = Path(".dvc/tmp/rwlock")
    try:
        json.loads(locks.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        locks.unlink()


def check_space() -> None:
    """A disk that fills up after hours of work wastes them. Raises ValueError instead."""
    needs = ((Path("."), LEAST_FREE, "a run"), (PREFECT_HOME.value(), LEAST_FREE_PREFECT, "Prefect's database"))
    for folder, least, use in needs:
        if (free := disk.free_bytes(folder)) < least:
            raise ValueError(f"{folder.absolute()}: {free / 1e6:.0f} MB free, {use} needs at least {least / 1e6:.0f} MB")


def check_paths(params: dict) -> None:
    """DVC cannot resolve an empty path in a dependency, and says so with a stack trace. Raises ValueError instead."""
    for stage in ("data", "pretrain_load"):
        path = params[stage]["path"]
        if not path or not Path(path).exists():
            raise ValueError(f"{PARAMS_FILE}: {stage}.path: {path!r} does not exist; DVC depends on it, so it names a folder "
                             f"that is there (tasks/{stage} where nothing of your own is used)")
        if any(out in (Path(path).resolve(), *Path(path).resolve().parents) or Path(path).resolve() in out.parents
               for out in (ARTIFACTS.resolve(), REPORTS.resolve())):
            raise ValueError(f"{PARAMS_FILE}: {stage}.path: {path!r} is, holds or lies in a folder that the run writes "
                             f"({ARTIFACTS}, {REPORTS})")


def has_remote() -> bool:
    with Repo(".") as repo:
        return bool(repo.config["core"].get("remote"))


def exchange(*command: str) -> None:
    """`dvc push ...` or `dvc pull ...`. Raises RuntimeError with DVC's last word."""
    done = subprocess.run([sys.executable, "-m", "dvc", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"dvc {command[0]}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
