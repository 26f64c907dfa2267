"""What a study keeps: results.csv in long form, a row a number; arrays and folders. Replaced whole or not at all, so that a
kill leaves what was there before."""

import contextlib
import csv
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tasks.core.machine import describe

COLUMNS = ("teacher", "variant", "seed", "metric", "value", "protocol")


def read(results: Path) -> list[dict]:
    """Values as they stand in the file, strings; no rows where there is no file."""
    if not results.exists():
        return []
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def write(results: Path, rows: Iterable[Mapping], columns: Sequence[str] = COLUMNS) -> None:
    partial = results.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(results)


def append(results: Path, rows: Iterable[Mapping], columns: Sequence[str] = COLUMNS) -> None:
    replace(results, lambda row: False, rows, columns)


def replace(results: Path, gone: Callable[[Mapping], bool], rows: Iterable[Mapping], columns: Sequence[str] = COLUMNS) -> None:
    """Drop what is `gone`, add rows. Parts of a study that run side by side take turns."""
    with locked(results.parent):
        write(results, [*(row for row in read(results) if not gone(row)), *rows], columns)


def kept(path: Path, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """draw(), or what an earlier run left at `path`, an .npy. Processes that ask for the same wait for the one that draws."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), os.O_CREAT | os.O_WRONLY):
            if not path.exists():
                put(path, draw())
    return np.load(path)


def kept_features(folder: Path, name: str, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """draw(), kept under this name. folder: of a teacher."""
    return kept(folder / "features" / f"{name}.npy", draw)


def made(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, made if it is not there, by one process; what a kill left half made is thrown away."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock"), os.O_CREAT | os.O_WRONLY):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            make(partial)
            partial.rename(folder)
    return folder


def put(path: Path, array: np.ndarray) -> None:
    """In the place of what is there, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.replace(path)


@contextlib.contextmanager
def locked(path: Path, flags: int = os.O_RDONLY) -> Iterator[None]:
    """One process at a time, by a lock that ends with the process that holds it. path: a file or a folder."""
    handle = os.open(path, flags)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def machine() -> str:
    """The part of a protocol that says where a number was timed."""
    import torch
    here = describe()
    return f"{here['cores']} cores, {here['cpu']}; {torch.get_num_threads()} threads; torch {torch.__version__}"
