"""The opponents' environment: their packages in a venv of its own, on top of the one that this runs in.

The main environment's packages are seen through a .pth file, so both are timed on the same torch and diffusers, and nothing is
installed twice.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tasks.core.artifacts import hash_file

FOLDER = Path("runs/cache/venv")
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
CONSTRAINTS = Path("constraints.txt")
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",  # nothing is asked of a network
         "CACHE_DIT_LOG_LEVEL": "warning"}


def is_inside() -> bool:
    return Path(sys.prefix).resolve() == FOLDER.resolve()


def stamp(folder: Path = FOLDER) -> Path:
    """Is there once the folder holds what the requirements ask for."""
    return folder / f"installed-{hash_file(REQUIREMENTS)[:8]}-{hash_file(CONSTRAINTS)[:8]}"


def build(folder: Path = FOLDER) -> None:
    """Raises ValueError where pip fails, whose own words are on the screen by then."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    here = sysconfig.get_paths()["purelib"]
    site = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)}, scheme="venv")["purelib"]
    Path(site, "main_environment.pth").write_text(f"{here}\n")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "-c", CONSTRAINTS, "-r", REQUIREMENTS], check=False).returncode != 0:
        raise ValueError(f"{REQUIREMENTS}: pip could not install it into {folder}")
    stamp(folder).touch()


def enter(arguments: list[str]) -> None:
    """Go on as `python -m benchmarks.cache` in the opponents' environment, which is built if it is not there."""
    if not stamp().exists():
        print(f"installing the opponents into {FOLDER}", flush=True)
        build()
    python = str(FOLDER / "bin" / "python")
    os.execve(python, [python, "-m", "benchmarks.cache", *arguments], {**os.environ, **QUIET})
