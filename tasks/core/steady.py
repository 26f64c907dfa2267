"""What a stage depends on, noted when it starts and compared when it ends.

DVC hashes dependencies and parameters once a stage's command has ended. A result made with one seed while params.yaml came to
say another would stand in dvc.lock, and in DVC's cache of runs, as the other's: fresh, and wrong.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tasks.core.artifacts import ARTIFACTS, MANIFEST, hash_file
from tasks.core.params import PARAMS_FILE, read_yaml

PIPELINE, IGNORED = Path("dvc.yaml"), Path(".dvcignore")
TEMPLATE = re.compile(r"\$\{(\w+)\.(\w+)\}")  # the user's own data and model: ${data.path}
SHOWN = 3  # changes that an error names
ONCE_BACK = "Once that is put back the next run goes on from the last checkpoint; else it starts anew"


def noted(stage: str, params: dict) -> dict[str, str]:
    """Every dependency that dvc.yaml names -> its value or its fingerprint. params: the whole file, resolved by scale."""
    spec = read_yaml(PIPELINE)["stages"].get(stage, {}) if PIPELINE.exists() else {}
    values = {f"{PARAMS_FILE}: {key}": repr(value) for block in spec.get("params", [stage])
              for key, value in leaves(block, params.get(block))}
    return values | files(spec.get("deps", []), params)


def leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for name, below in value.items():
            yield from leaves(f"{key}.{name}", below)
    else:
        yield key, value


def files(deps: list[str], params: dict) -> dict[str, str]:
    """Fingerprints: of an upstream result its manifest, of code its content, of the user's own folders, which may be large,
    sizes and times."""
    ignored = patterns()
    own = [TEMPLATE.sub(lambda found: str((params[found[1]] or {}).get(found[2])), dep) for dep in deps if TEMPLATE.search(dep)]
    found = {str(path): stamp(path) for dep in own for path in files_of(Path(dep), ignored)}
    for dep in map(Path, (dep for dep in deps if not TEMPLATE.search(dep))):
        known = [dep / MANIFEST] if dep.parent == ARTIFACTS else files_of(dep, ignored)
        found |= {str(path): hash_file(path) for path in known if path.exists()}
    return found


def check_nothing_was_left_behind(params: dict) -> None:
    """`dvc exp run --temp` and `--queue` work in a copy of what git has, below .dvc/tmp/exps: of a folder with files that git
    ignores the others are there, and a stage would run on those. Raises ValueError."""
    clone, copied, _ = str(Path.cwd()).partition("/.dvc/tmp/exps/")
    if not copied:
        return
    ignored = patterns()
    for stage in ("data", "pretrain_load"):
        block = params[stage] or {}
        if block.get("source") != "folder" or Path(own := str(block["path"])).is_absolute():
            continue
        lost = {path.relative_to(clone) for path in files_of(Path(clone, own), ignored)} - set(files_of(Path(own), ignored))
        if lost:
            raise ValueError(f"{PARAMS_FILE}: {stage}.path: {own}: {len(lost)} of its files are not in this copy of the clone, "
                             f"{min(lost)} among them: git ignores or lacks them; `dvc add {own}` brings them along")


def files_of(dep: Path, ignored: list[str]) -> list[Path]:
    """All that DVC hashes: what .dvcignore names, such as the bytecode that running code leaves, is left out."""
    inside = dep.rglob("*") if dep.is_dir() else [dep]
    return [path for path in inside if path.is_file()
            and not any(fnmatch.fnmatch(part, name) for part in path.relative_to(dep.parent).parts for name in ignored)]


def patterns() -> list[str]:
    """The names in .dvcignore."""
    lines = IGNORED.read_text().splitlines() if IGNORED.exists() else []
    return [line.strip("/") for line in lines if line and not line.startswith("#")]


def stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} bytes of {found.st_mtime_ns}"


def check(stage: str, before: dict[str, str], read: Callable[[], dict]) -> None:
    """Raises ValueError, in one line, where a dependency is not what it was. The stage's checkpoint and its log stay.

    read: the parameters as they are now.
    """
    try:
        now = noted(stage, read())
    except ValueError as error:
        raise ValueError(f"{error}; it was whole when {stage} started, whose result is not kept. {ONCE_BACK}") from None
    changes = [change(name, before.get(name), now.get(name)) for name in before | now if before.get(name) != now.get(name)]
    if changes:
        more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        raise ValueError(f"{', '.join(changes[:SHOWN])}{more} while {stage} ran, whose result is not kept: DVC would take it "
                         f"for one of what is there now. {ONCE_BACK}")


def change(name: str, old: str | None, new: str | None) -> str:
    if name.startswith(f"{PARAMS_FILE}: "):
        return f"{name} changed from {old} to {new}"
    return f"{name} {'appeared' if old is None else 'went' if new is None else 'changed'}"
