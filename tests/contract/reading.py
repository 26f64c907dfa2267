"""The repository as text: what git holds, and what a file imports."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("tasks", "flows", "tests", "infra", "benchmarks")
USERS = ("params.yaml", "dvc.lock")  # what a user and a run change


def tracked(*suffixes: str) -> list[Path]:
    """What git tracks, and what it would track in our rooms; a user's own images and notes elsewhere are the user's."""
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)
    listed += subprocess.check_output(["git", "ls-files", "-o", "--exclude-standard", *ROOMS], cwd=ROOT, text=True)
    paths = [ROOT / line for line in listed.splitlines()]
    return [p for p in paths if p.is_file() and (not suffixes or p.suffix in suffixes)]


def committed(name: str) -> str:
    """A file as the last commit has it. The user's own copy may hold another goal, another teacher or the scale of a run."""
    shown = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, text=True, check=False)
    return (ROOT / name).read_text() if shown.returncode else shown.stdout  # no repository: a downloaded archive


def imports(path: Path) -> set[tuple[int, str]]:
    """(level, module) of every import of a file, also inside functions; `from tasks.data import images` is one of images."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.level, submodule(node.module or "", alias.name)) for alias in node.names}
    return found


def submodule(package: str, name: str) -> str:
    return f"{package}.{name}" if ROOT.joinpath(*package.split("."), f"{name}.py").exists() else package
