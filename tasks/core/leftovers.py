"""What killed runs left in the repository: parts of files and folders that were never moved into place."""

import shutil
from pathlib import Path

from tasks.core.artifacts import ARTIFACTS, REPORTS, RUNS

OF_STAGES = ((ARTIFACTS, ".*.partial"), (ARTIFACTS, ".*.stale"))
OF_RUNS = (*OF_STAGES, (REPORTS, ".*.partial"), (Path("."), ".*.partial"), (RUNS, "**/*.partial"))


def clear(patterns: tuple[tuple[Path, str], ...]) -> None:
    """Remove them; whoever calls holds the lock of stages, for those of runs that of runs, too: nobody is writing one."""
    for part in sorted(part for folder, pattern in patterns for part in folder.glob(pattern)):
        whole = part.with_name(part.name.removeprefix(".").removesuffix(".stale"))
        if part.suffix == ".stale" and not whole.exists():
            part.rename(whole)  # the previous result: the new one was about to take its place
        elif part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
