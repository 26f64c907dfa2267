"""`python -m tasks.report.publish`: the last run's reports become the committed ones, and the README's tables follow.

A run writes reports/*.json, which git ignores. They, and the picture of the report, are copied to reports/<scale>/, which git
tracks, if dvc.lock says that all of them are what the stages wrote, at one scale: a report that was edited, or is of another
run, is refused.
"""

import hashlib
import shutil
import sys
from pathlib import Path

from tasks.core import disk
from tasks.core.artifacts import ARTIFACTS, REPORTS, validate
from tasks.core.params import PARAMS_FILE, SCALES, STAGES, read_yaml
from tasks.report import table
from tasks.report.picture import PICTURE

LOCK = Path("dvc.lock")


def publish(root: Path = Path()) -> Path:
    """-> the folder that holds the reports now, without those of an earlier run. Raises ValueError: nothing was copied."""
    locked = stages_of(root / LOCK)
    target = root / REPORTS / scale_of(locked)
    found = {Path(out["path"]).name: whole(root / out["path"], out["md5"])
             for stage in locked.values() for out in stage["outs"] if Path(out["path"]).parent == REPORTS}
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob("*.json"):
        if left.name not in found:
            left.unlink()
    for name, text in found.items():
        disk.write_whole(target / name, text)
    shutil.copyfile(validate(root / ARTIFACTS / "report") / PICTURE, target / PICTURE)
    return target


def stages_of(lock: Path) -> dict[str, dict]:
    """stage -> what dvc.lock holds of its last run."""
    locked = read_yaml(lock)["stages"]
    if missing := [stage for stage in STAGES if stage not in locked]:
        raise ValueError(f"{lock}: {', '.join(missing)} never ran here; make run first")
    return {stage: locked[stage] for stage in STAGES}


def scale_of(locked: dict[str, dict]) -> str:
    scales = {scale: [name for name, stage in locked.items() if stage["params"][str(PARAMS_FILE)]["scale"] == scale]
              for scale in SCALES}
    ran = [scale for scale in SCALES if scales[scale]]
    if len(ran) > 1:
        raise ValueError(f"{LOCK}: {', '.join(scales[ran[0]])} ran at scale {ran[0]}, {', '.join(scales[ran[1]])} at scale "
                         f"{ran[1]}; make run first")
    return ran[0]


def whole(path: Path, md5: str) -> str:
    """The report's text, which is what dvc.lock says that the run wrote."""
    if not path.exists():
        raise ValueError(f"{path}: not found; `dvc checkout` or make run first")
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path}: is not what {LOCK} says that the run wrote; `dvc checkout` or make run first")
    return content.decode()


def main() -> None:
    try:
        folder = publish()
        table.main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{folder} holds the reports of the last run, {table.README} shows its table: commit both, and {LOCK}")


if __name__ == "__main__":
    main()
