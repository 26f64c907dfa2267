"""What this machine is, as far as speed depends on it: a profile taken on another one is stale.

runs/machine.json is a dependency of the profile stage. It is rewritten only where it differs, so DVC sees a change exactly
when the work has moved. Driver and library versions are not in it: the pinned versions are a dependency of their own.
"""

import os
import platform
from pathlib import Path

from tasks.core.artifacts import RUNS, read_json, write_json

MACHINE = RUNS / "machine.json"
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16",  # x86
         "asimd", "asimddp", "i8mm", "bf16")                                                     # Arm


def describe(cpuinfo: str | None = None, gpus: Path = Path("/proc/driver/nvidia/gpus")) -> dict:
    """{cpu, cores, flags, gpus}: names as the system gives them. No import of torch: this runs before every stage."""
    cpu = cpuinfo if cpuinfo is not None else read_text(Path("/proc/cpuinfo"))
    flags = set(field(cpu, "flags", "Features").split())
    models = [field(read_text(gpu / "information"), "Model") for gpu in sorted(gpus.glob("*"))]
    return {"cpu": field(cpu, "model name") or platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "flags": [flag for flag in FLAGS if flag in flags], "gpus": models}


def read_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def field(text: str, *names: str) -> str:
    """The value of the first `name : value` line."""
    pairs = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in pairs if name.strip() in names), "")


def refresh(path: Path = MACHINE) -> dict:
    """Write the descriptor where it is missing, broken or another machine's. -> the descriptor."""
    here = describe()
    try:
        known = read_json(path)
    except ValueError:
        known = None
    if known != here:
        path.parent.mkdir(exist_ok=True)
        write_json(path, here)
    return here


if __name__ == "__main__":
    refresh()
