"""The shell around a stage: params, inputs and checkpoints in; one folder moved into place and its reports out."""

import dataclasses
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

from tasks.core import disk, leftovers, lifeline, steady, threads
from tasks.core.artifacts import (
    ARTIFACTS,
    MANIFEST,
    REPORTS,
    RUNS,
    Inputs,
    Report,
    digest,
    hash_file,
    validate,
    write_json,
    write_manifest,
)
from tasks.core.params import STAGES, read_params, stage_name, stage_params, validate_all
from tasks.core.rooms import own_room
from tasks.core.turns import STAGE_LOCK, one_at_a_time

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1",
         "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(stage: ModuleType) -> None:
    """Run one stage at the top of the repository. A user's mistake is one line on stderr and exit status 2."""
    os.environ.update({k: os.environ.get(k, v) for k, v in QUIET.items()})
    try:
        end_tidily()
        read_params()  # first: elsewhere than at the top of the repository the lock would leave a folder behind
        with one_at_a_time(STAGE_LOCK, "another stage is at work in this folder; waiting for it to end", tell):
            leftovers.clear(leftovers.OF_STAGES)
            execute(stage)
    except Exception as error:
        if os.environ.get("DIFFPRESS_DEBUG") or not (isinstance(error, ValueError | OSError) or disk.is_full(error)):
            raise
        sys.exit(f"error: {complaint(error, ARTIFACTS / stage_name(stage))}")


def tell(line: str) -> None:
    print(line, flush=True)


def end_tidily() -> None:
    """Signals unwind, so that what is half written goes. A stage ends with its run, and its temporary files with the stage."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    lifeline.hold(lifeline.end_myself)
    tempfile.tempdir = os.environ["TMPDIR"] = str(own_room())


def complaint(error: Exception, target: Path) -> str:
    """One line. target: what was to be written, where the error itself names no file."""
    return disk.describe(error, target) if disk.is_full(error) else " ".join(str(error).split())


def execute(stage: ModuleType) -> None:
    name, started = stage_name(stage), time.time()
    raw = validate_all() if name == STAGES[0] else read_params()  # no later stage is to find what this one could have known
    steady.check_nothing_was_left_behind(raw)
    threads.apply(raw.get("threads"))
    before = steady.noted(name, raw)
    params = stage_params(stage, raw)
    inputs = gather(stage, params, raw)
    partial = ARTIFACTS / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        report = inputs.cluster.run(stage, params, inputs, partial)
        write_manifest(partial, dataclasses.asdict(params), inputs.folders)
        steady.check(name, before, read_params)
        replace_folder(partial, ARTIFACTS / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk its room is what putting the previous result back takes
        raise
    write_reports(name, report)
    write_run_record(name, started)
    steady.check(name, before, read_params)  # again, as late as can be: DVC hashes what is there once this process has ended
    for left in (RUNS / "checkpoints").glob(f"*/{inputs.key[:16]}*"):
        left.unlink()


def gather(stage: ModuleType, params: object, raw: dict) -> Inputs:
    """Validate every upstream folder and derive the key that checkpoints live under."""
    from tasks.core.cluster import Cluster
    folders = {name: validate(ARTIFACTS / name) for name in stage.INPUTS}
    manifests = {name: hash_file(folder / MANIFEST) for name, folder in folders.items()}
    key = digest([dataclasses.asdict(params), manifests, code_digest(stage)])
    return Inputs(folders, key, Cluster.from_params(raw["cluster"]), (raw["resources"] or {}).get(stage_name(stage)) or {})


def code_digest(stage: ModuleType) -> str:
    """Of the room and of what rooms share: a checkpoint of other code is not resumed."""
    room = Path(stage.__file__).parent
    files = [p for folder in (room, room.parent / "core", room.parent / "runtime") for p in sorted(folder.glob("*.py"))]
    return hashlib.blake2b(b"".join(p.read_bytes() for p in files), digest_size=16).hexdigest()


def replace_folder(new: Path, old: Path) -> None:
    """`old` is whole until the moment it is replaced."""
    stale = old.with_name(f".{old.name}.stale")
    shutil.rmtree(stale, ignore_errors=True)
    if old.exists():
        old.rename(stale)
    new.rename(old)
    shutil.rmtree(stale, ignore_errors=True)


def write_reports(name: str, report: Report) -> None:
    REPORTS.mkdir(exist_ok=True)
    write_json(REPORTS / f"{name}.json", report.numbers)
    if report.timings:
        write_json(REPORTS / f"{name}.timings.json", report.timings)


def write_run_record(name: str, started: float) -> None:
    """What is true of this run alone; never an input of anything but the report's account of time."""
    import torch
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    RUNS.mkdir(exist_ok=True)
    write_json(RUNS / f"{name}.json", {"started": started, "wall_s": time.time() - started, "commit": commit,
                                       "torch": torch.__version__, "python": platform.python_version(),
                                       "threads": torch.get_num_threads()})
