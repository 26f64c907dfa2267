"""How many threads a stage computes with: `threads` of params.yaml, for PyTorch, OpenVINO, OpenMP and BLAS alike.

It belongs to no stage's params, as `cluster:` does: another number moves work, and at most the last bits of a result. What it
was stands beside every timing (profile/machine.json, benchmark's protocol) and in the run's record. Workers of a cluster have
`cluster.cpus_per_worker`, a stage on another node what `resources` names.
"""

import os
from math import floor, inf
from pathlib import Path

from tasks.core.machine import read_text
from tasks.core.params import check_range


def check(asked: object) -> None:
    """Raises ValueError unless it is null or a whole number, 1 .. 1024."""
    if asked is None:
        return
    if isinstance(asked, bool) or not isinstance(asked, int):
        raise ValueError(f"threads: {asked!r} is not a whole number; null takes what this process may use")
    check_range("threads", asked, 1, 1024)


def apply(asked: int | None) -> int:
    """Set the number for this process and for the children that it starts. -> the number.

    null: what PyTorch takes by itself (a thread for each core, or OMP_NUM_THREADS), but no more than this process may use.
    """
    import torch
    from threadpoolctl import threadpool_limits
    check(asked)
    usable = max(1, floor(allowed()))
    number = asked or min(torch.get_num_threads(), usable)
    if number > usable:
        print(f"threads: {number} are more than the {usable} CPUs that this process may use: they take turns", flush=True)
    torch.set_num_threads(number)
    threadpool_limits(number)  # BLAS, which has pools of its own
    os.environ["OMP_NUM_THREADS"] = str(number)
    return number


def allowed(root: Path = Path("/")) -> float:
    """CPUs that this process may use: those of its affinity, fewer where a control group limits their time."""
    return min(len(os.sched_getaffinity(0)), quota(root))


def quota(root: Path = Path("/")) -> float:
    """CPUs' worth of time that the control groups of this process grant, version 2 or 1; inf without a limit.

    root: where proc/ and sys/ are. A container may see its group's path from outside: what is not there limits nothing.
    """
    groups = root / "sys/fs/cgroup"
    found = [inf]
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            top = groups if not controllers else groups / "cpu"
            for folder in upwards(top, path):
                found.append(granted(folder))
    return min(found)


def upwards(top: Path, path: str) -> list[Path]:
    """The group's folder and all above it, for each limits those inside of it."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def granted(folder: Path) -> float:
    """Of one group: cpu.max holds "quota period" in us, or "max ..."; version 1 has a file for each, -1 for no limit."""
    parts = (folder / f"cpu.cfs_{part}_us" for part in ("quota", "period"))
    share = read_text(folder / "cpu.max").split() or [read_text(part).strip() for part in parts]
    limited = len(share) == 2 and all(part.isdigit() and int(part) for part in share)
    return int(share[0]) / int(share[1]) if limited else inf
