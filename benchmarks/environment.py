"""A study's opponents in an environment of their own: their packages in a venv on top of the one that this runs in.

The main environment's packages are seen through a .pth file: all are measured on the same torch and diffusers, nothing is
installed twice.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from tasks.core.artifacts import hash_file

CONSTRAINTS = Path("constraints.txt")
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",  # nothing is asked of a network
         "CACHE_DIT_LOG_LEVEL": "warning"}


@dataclass(frozen=True)
class Environment:
    """study: a folder of benchmarks that holds a requirements.txt; the venv is runs/<study>/venv."""

    study: str

    @property
    def folder(self) -> Path:
        return Path("runs") / self.study / "venv"

    @property
    def requirements(self) -> Path:
        return Path(__file__).parent / self.study / "requirements.txt"

    @property
    def is_inside(self) -> bool:
        return Path(sys.prefix).resolve() == self.folder.resolve()

    @property
    def stamp(self) -> Path:
        """Is there once the folder holds what the requirements ask for."""
        return self.folder / f"installed-{hash_file(self.requirements)[:8]}-{hash_file(CONSTRAINTS)[:8]}"

    def build(self) -> None:
        """Raises ValueError where pip fails, whose own words are on the screen by then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        venv.create(self.folder, with_pip=True)
        here = Path(sysconfig.get_paths()["purelib"]).resolve()  # not a link to it, which may go
        site = sysconfig.get_paths(vars={"base": str(self.folder), "platbase": str(self.folder)}, scheme="venv")["purelib"]
        Path(site, "main_environment.pth").write_text(f"{here}\n")
        pip = [self.folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, "-c", CONSTRAINTS, "-r", self.requirements], check=False).returncode != 0:
            raise ValueError(f"{self.requirements}: pip could not install it into {self.folder}")
        self.stamp.touch()

    def enter(self, arguments: list[str]) -> None:
        """Go on as `python -m benchmarks.<study>` in the environment, built if it is not there; nothing if this is it."""
        if self.is_inside:
            return
        if not self.stamp.exists():
            print(f"installing the opponents into {self.folder}", flush=True)
            self.build()
        python = str(self.folder / "bin" / "python")
        os.execve(python, [python, "-m", f"benchmarks.{self.study}", *arguments], {**os.environ, **QUIET})
