"""Files that are what their manifest says, and JSON that means something: every mistake is one line that names the file.

Shipped inside packages: imports the standard library alone.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

HASH = re.compile(r"[0-9a-f]{32}")
# Stores that name a file by its content: DVC's cache, and that of the Hugging Face hub. Both may put links in place of files.
STORE = re.compile(r"files/md5/[0-9a-f]{2}/[0-9a-f]{30}$|blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})$")
SETTLED_NS = 10**9  # after which a file that is written again shows it by its times

_verified: dict[tuple, dict] = {}  # file as it was when it was hashed -> its facts


def read_json(path: str | Path, infinities: bool = False) -> Any:
    """Strict JSON: no key twice, no NaN, and no infinity unless `infinities`, which diffusers writes into configs.

    Raises ValueError naming the file and what is wrong with it.
    """
    try:
        return json.loads(Path(path).read_bytes().decode(), object_pairs_hook=_unique, parse_float=_finite,
                          parse_constant=_infinity if infinities else _refuse)
    except FileNotFoundError:
        raise ValueError(f"{path}: not found") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON that can be read: nested too deep") from None
    except ValueError as error:  # of the hooks below, and of integers with thousands of digits
        raise ValueError(f"{path}: not JSON: {error}") from None


def read_object(path: str | Path) -> dict:
    """As `read_json`, of a file that holds one object."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds {type(data).__name__}, expected an object with keys")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _infinity(constant: str) -> float:
    if constant == "NaN":
        _refuse(constant)
    return float(constant)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"{digits} is more than a float can hold")
    return float(digits)


def file_facts(path: Path) -> dict:
    """{"bytes", "blake2b"} of a file."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": found}


def check_manifest(path: Path, files: Any) -> dict[str, dict]:
    """The `files` of the manifest at `path`: {name: {"bytes", "blake2b"}}, every name inside the manifest's folder.

    Raises ValueError for a name that leaves the folder and for an entry of another shape.
    """
    if not isinstance(files, dict):
        raise ValueError(f"{path}: is not a manifest: no `files` with bytes and blake2b of each")
    for name, facts in files.items():
        check_name(path, name)
        if not (isinstance(facts, dict) and facts.keys() == {"bytes", "blake2b"}):
            raise ValueError(f"{path}: is not a manifest: {name} has no bytes and blake2b, or more than these")
        size, found = facts["bytes"], facts["blake2b"]
        if type(size) is not int or size < 0:
            raise ValueError(f"{path}: bytes of {name}: {size!r} is not a whole number from 0")
        if not (isinstance(found, str) and HASH.fullmatch(found)):
            raise ValueError(f"{path}: blake2b of {name}: {found!r} is not 32 hexadecimal digits")
    return files


def check_name(path: str | Path, name: str) -> None:
    """Raise ValueError unless `name`, which the file `path` gives, is a plain relative path: `a/b.json`, on any system."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and not {"\\", "\0"} & set(name)
    if not plain or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        raise ValueError(f"{path}: {name} is not a file inside the folder")


def check_place(folder: Path, name: str) -> Path:
    """The file `name` of a folder. Raises ValueError where a link leads out of the folder, but to a store that names its files
    by their content, and where there is something else than a file."""
    path = folder / name
    there = path.resolve()
    if not there.is_relative_to(folder.resolve()) and not STORE.search(there.as_posix()):
        raise ValueError(f"{path}: leads out of the folder, to {there}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a file")
    return path


def check_file(folder: Path, name: str, expected: Mapping) -> None:
    """Raise ValueError unless the file is there, whole and unchanged. A file is hashed once in a process, unless its place,
    size or times change."""
    path = check_place(folder, name)
    if not path.exists():
        raise ValueError(f"{path}: missing, expected {expected['bytes']} bytes")
    if (found := known_facts(path)) != expected:
        raise ValueError(f"{path}: expected {describe(expected)}, found {describe(found)}")


def known_facts(path: Path) -> dict:
    """As `file_facts`, from memory where the file was not written since. The clock of file times ticks in milliseconds, so what
    was written a moment ago may be written again unseen: such a file is hashed every time."""
    stat = os.stat(path)  # the change time cannot be set back, as the modification time can
    key = str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    facts = _verified.get(key) or file_facts(path)
    if time.time_ns() - stat.st_ctime_ns > SETTLED_NS:
        _verified[key] = facts
    return facts


def describe(facts: Mapping) -> str:
    return f"{facts['bytes']} bytes with blake2b {facts['blake2b']}"
