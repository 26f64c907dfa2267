"""What this machine is, as far as speed depends on it, and which machine results were timed on.

No stage depends on the machine: what was timed on one stays valid, as that one's, wherever it is pulled to. The descriptor is
in what was timed, and whoever runs elsewhere is told. Driver and library versions are not in it: the pinned versions are a
dependency of every stage.
"""

import os
import platform
from collections.abc import Iterable
from pathlib import Path

from tasks.core.artifacts import ARTIFACTS, REPORTS, read_json

TIMED = ("profile", "benchmark")  # the stages whose results are times
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
    """Of a file of the system's; what is not there, or not ours to read, says nothing."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def field(text: str, *names: str) -> str:
    """The value of the first `name : value` line."""
    pairs = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in pairs if name.strip() in names), "")


def timed_on() -> dict[str, dict]:
    """stage -> descriptor of the machine that its result here was timed on; without those that have no result."""
    found = {}
    if (path := ARTIFACTS / "profile" / "machine.json").exists():
        found["profile"] = read_json(path)
    if (path := REPORTS / "benchmark.timings.json").exists():
        found["benchmark"] = read_json(path)["machine"]
    return found


def elsewhere(stages: Iterable[str] = TIMED) -> str | None:
    """One line where results of `stages` were timed on another machine than this one."""
    here = describe()
    others = {stage: there for stage, there in timed_on().items()
              if stage in stages and any(there.get(key) != value for key, value in here.items())}
    if not others:
        return None
    machines = dict.fromkeys(map(named, others.values()))
    this = "one of that name with other instructions" if named(here) in machines else named(here)
    return (f"the times in {' and '.join(others)} are of {', '.join(machines)}, this is {this}: they stay valid as that "
            f"machine's, `make run RETIME=1` times anew here")


def named(machine: dict) -> str:
    parts = ", ".join([f"{machine.get('cores')} cores", *machine.get("gpus", ())])
    return f"{machine.get('cpu')} ({parts})"
