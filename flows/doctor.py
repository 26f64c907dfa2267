"""`make doctor`: what this machine and this installation are, one plain line a fact; exit status 1 where something is wrong.

Nothing is started and nothing is changed. A line begins with `ok`, `note` (works, but slower or with less) or `WRONG`.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tasks.core import machine
from tasks.core.params import PARAMS_FILE, read_yaml, validate_all

Finding = tuple[str, str]  # ok | note | WRONG, what was found
TEACHERS = Path("tasks/pretrain_load/teachers")
DISK_GB = 5
FAST_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


def python_version() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield "ok" if sys.version_info[:2] == (3, 11) else "note", f"python {version} (tested with 3.11)"


def hardware() -> Iterator[Finding]:
    here = machine.describe()
    yield "ok", f"{here['cpu']}, {here['cores']} cores, {', '.join(here['gpus']) or 'no GPU'}"
    fast = FAST_INT8.intersection(here["flags"])
    yield ("ok" if fast else "note"), f"int8 instructions: {', '.join(sorted(fast)) or 'none, so int8 is no faster here'}"


def times() -> Iterator[Finding]:
    if other := machine.elsewhere():
        yield "note", other


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / 1e9
    yield "ok" if free > DISK_GB else "WRONG", f"{free:.0f} GB free here (a quick run and its cache want {DISK_GB})"


def pins() -> Iterator[Finding]:
    """Installed versions against constraints.txt; a local tag such as +cpu or +cu130 is the same version."""
    wrong, count = [], 0
    for line in Path("constraints.txt").read_text().splitlines():
        name, equals, pinned = line.partition("==")
        if line.startswith("#") or not equals:
            continue
        count += 1
        try:
            installed = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed != pinned:
            wrong.append(f"{name} is {installed}, pinned {pinned}")
    yield ("WRONG" if wrong else "ok"), f"{count - len(wrong)} of {count} pins hold{''.join(f'; {w}' for w in wrong[:5])}"


def backends() -> Iterator[Finding]:
    for name, use in (("openvino", "packages run on it"), ("ray", "width"), ("prefect", "the flow"), ("dvc", "the cache")):
        found = importlib.util.find_spec(name) is not None
        yield "ok" if found else "WRONG", f"{name}: {use}" if found else f"{name} is missing ({use}): make install"
    if (address := os.environ.get("RAY_ADDRESS")) and os.environ.get("RAY_AUTH_MODE") != "token":
        yield "note", f"RAY_ADDRESS is {address}, but RAY_AUTH_MODE is not token, which a cluster of Ray 2.59 or later wants"


def teachers() -> Iterator[Finding]:
    found = sorted(p.parent.name for p in TEACHERS.glob("*/model_index.json"))
    yield ("ok" if found else "WRONG"), f"shipped teachers: {', '.join(found) or f'none; git checkout {TEACHERS}'}"


def params() -> Iterator[Finding]:
    try:
        yield "ok", f"params.yaml, scale {validate_all()['scale']}"
    except ValueError as error:
        yield "WRONG", str(error)
    else:
        yield from experiments()


def experiments() -> Iterator[Finding]:
    """DVC drops quotes as it rewrites params.yaml, and cannot read back `{address: host:port}`."""
    if importlib.util.find_spec("dvc") is None:
        return  # said above
    from dvc.utils.hydra import apply_overrides
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(PARAMS_FILE, folder))
        apply_overrides(str(copy), [f"scale={read_yaml(copy)['scale']}"])
        try:
            read_yaml(copy)
        except ValueError as error:
            place = re.search(r"line (\d+)", str(error))
            line = copy.read_text().splitlines()[int(place[1]) - 1].strip() if place else "it"
            yield "note", f"params.yaml: `dvc exp run -S` would fail on `{line}`: write such a block or list one entry a line"


def server() -> Iterator[Finding]:
    yield "ok", f"Prefect: {os.environ.get('PREFECT_API_URL') or 'a server of its own for each run'}"


CHECKS = (python_version, hardware, times, disk, pins, backends, teachers, params, server)


def main() -> int:
    findings = [finding for check in CHECKS for finding in check()]
    for verdict, fact in findings:
        print(f"{verdict:<6}{fact}")
    return int(any(verdict == "WRONG" for verdict, _ in findings))


if __name__ == "__main__":
    sys.exit(main())
