"""Steps that each measure one thing in a clone, in an order in which the next finds what the last one left."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from benchmarks.results import append, read, write

COLUMNS = ("machine", "variant", "seed", "metric", "value", "protocol")
CLONES = ("first", "second")
TAKEN_OVER = ("data", "pretrain_load", "profile")
RUNNING = re.compile(r"^(\w+): running$", re.MULTILINE)  # what `make run` says when a stage starts
AUTHOR = ("-c", "user.name=spine", "-c", "user.email=spine@localhost")


@dataclass(frozen=True)
class Step:
    """measure(work) -> value; work holds the clones `first` and `second` and a log of what they print."""

    variant: str
    metric: str
    measure: Callable[[Path], float | dict[str, float]]  # a dict: one value for each of its variants
    protocol: str


# ---- what a step does ----

def execute(command: Sequence[str], clone: Path) -> str:
    """Run in a clone with its own environment first in PATH, log all output. -> stdout. Raises ValueError if it fails."""
    log = clone.parent / "log.txt"
    with log.open("a") as file:
        print("$", *command, file=file, flush=True)
        done = subprocess.run(command, cwd=clone, env=environment(clone), stdout=subprocess.PIPE, stderr=file, text=True,
                              check=False)
        file.write(done.stdout)
    if done.returncode != 0:
        raise ValueError(f"{' '.join(command)} in {clone}: exit status {done.returncode}; its output is at the end of {log}")
    return done.stdout


def environment(clone: Path) -> dict[str, str]:
    path = f"{clone.resolve() / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {"PATH": path}


def seconds(*command: str) -> Callable[[Path], float]:
    """Wall time of a command in the first clone."""
    return lambda work: timed(command, work / "first")


def timed(command: Sequence[str], clone: Path) -> float:
    started = time.monotonic()
    execute(command, clone)
    return time.monotonic() - started


def test_run(work: Path) -> float:
    execute(("git", "clean", "-fdxq"), work / "first")  # of a test run that was interrupted
    return timed(("make", "test"), work / "first")


def clean_run(name: str) -> Callable[[Path], float]:
    """Wall time of `make run` in an installed clone that holds nothing computed, not even by an interrupted try."""
    def measure(work: Path) -> float:
        clean(work / name)
        execute(("make", "install"), work / name)
        return timed(("make", "run"), work / name)

    return measure


def clean(clone: Path) -> None:
    """As it was cloned, but for what is installed."""
    execute(("git", "checkout", "--quiet", "."), clone)
    execute(("git", "clean", "-fdxq", "-e", ".venv", "-e", "*.egg-info"), clone)


def clean_after_noop(work: Path) -> float:
    """Commit what the first run changed (lock file, reports of this machine); a run with nothing to do changes no more."""
    clone = work / "first"
    execute(("git", "add", "-A"), clone)
    execute(("git", *AUTHOR, "commit", "--quiet", "--allow-empty", "-m", "first run"), clone)
    execute(("make", "run"), clone)
    return float(execute(("git", "status", "--porcelain"), clone) == "")


def checkout_restores(work: Path) -> float:
    clone = work / "first"
    shutil.rmtree(clone / "artifacts")
    execute(("dvc", "checkout"), clone)
    return float(execute(("dvc", "status", "--json"), clone).strip() == "{}")


def take_over_profile(work: Path) -> None:
    """The second clone is cleaned, and chooses from the first one's times: a profile is a frozen input of every choice made
    from it. What the profile was made from comes along."""
    first, second = (work / clone for clone in CLONES)
    clean(second)
    for stage in TAKEN_OVER:
        shutil.copytree(first / "artifacts" / stage, second / "artifacts" / stage)
        for report in (first / "reports").glob(f"{stage}*.json"):
            shutil.copy(report, second / "reports")
    shutil.copy(first / "dvc.lock", second)
    execute(("dvc", "commit", "--force", *TAKEN_OVER), second)


def same_outs_through_kills(work: Path) -> dict[str, float]:
    """The second clone runs again all that comes after the profile, and each of these stages is killed once on the way."""
    take_over_profile(work)
    first, second = (work / clone for clone in CLONES)
    walls = {path.stem: json.loads(path.read_text()).get("wall_s", 0) for path in (first / "runs").glob("*.json")}
    killed: list[str] = []
    while (stage := killed_in(("make", "run"), second, killed, walls)) is not None:
        killed.append(stage)
    print(f"killed once each: {', '.join(killed)}", flush=True)
    return same_outs(work)


def killed_in(command: Sequence[str], clone: Path, spared: Collection[str], walls: Mapping[str, float]) -> str | None:
    """Run the command until a stage that is not `spared` has run for half of what it took before (`walls`, s), then end by
    SIGKILL all that works in the clone. -> that stage; None: the command came to its end. Raises ValueError if it failed."""
    log = clone.parent / "log.txt"
    with log.open("a") as file:
        print("$", *command, "# to be killed", file=file, flush=True)
        printed = log.stat().st_size
        child = subprocess.Popen(command, cwd=clone, env=environment(clone), stdout=file, stderr=file)
    while child.poll() is None:
        said = log.read_bytes()[printed:].decode(errors="replace")
        running = [stage for stage in RUNNING.findall(said) if stage not in spared]
        if running:
            time.sleep(walls.get(running[0], 0) / 2)
            kill_all(clone)
            child.wait()
            return running[0]
        time.sleep(0.2)
    if child.returncode != 0:
        raise ValueError(f"{' '.join(command)} in {clone}: exit status {child.returncode}; its output is at the end of {log}")
    return None


def kill_all(folder: Path) -> None:
    """Until nothing is left: what one of them started in the meantime goes, too."""
    while found := processes_in(folder):
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=5)


def processes_in(folder: Path) -> list[psutil.Process]:
    """All that work in this folder or below it."""
    top = folder.resolve()
    return [p for p in psutil.process_iter(["cwd", "status"]) if p.info["status"] != psutil.STATUS_ZOMBIE
            and p.info["cwd"] and Path(p.info["cwd"]).is_relative_to(top)]


def same_outs(work: Path) -> dict[str, float]:
    """stage -> 1 where both clones' lock files hold the same hashes of its outs."""
    first, second = (locked_outs(work / clone / "dvc.lock") for clone in CLONES)
    return {stage: float(first.get(stage) == second.get(stage)) for stage in sorted(first.keys() | second.keys())}


def locked_outs(path: Path) -> dict[str, dict[str, str]]:
    """stage -> path of each out -> its hash. What a stage read is left out: a profile differs, choices from it need not."""
    stages = yaml.safe_load(path.read_text())["stages"]
    return {name: {out["path"]: out["md5"] for out in stage.get("outs", ())} for name, stage in stages.items()}


STEPS = (
    Step("first", "make_test_s", test_run, "make test in a fresh clone, installation included"),
    Step("first", "make_run_s", clean_run("first"), "make run, nothing computed before, after installation"),
    Step("first", "make_run_again_s", seconds("make", "run"), "make run, nothing to do"),
    Step("first", "noop_repro_s", seconds("dvc", "repro"), "dvc repro, nothing to do"),
    Step("first", "clean_after_noop", clean_after_noop, "1: git status is empty after a run with nothing to do"),
    Step("first", "checkout_restores", checkout_restores, "1: nothing is stale after rm -rf artifacts and dvc checkout"),
    Step("second", "make_run_s", clean_run("second"), "make run, nothing computed before, after installation"),
    Step("", "same_outs_own_profile", same_outs,
         "1: dvc.lock of both clones holds the same hashes of the stage's outs, each clone having timed the machine itself"),
    Step("", "same_outs", same_outs_through_kills,
         "1: the same, the second clone having taken over the first one's profile, and each later stage having been ended by "
         "SIGKILL once, half-way"),
)


# ---- all of them ----

def measure_all(steps: Iterable[Step], commit: str, machine: dict, work: Path, results: Path, source: Path = Path(".")) -> None:
    """Append each step's rows to `results` as it is done. Steps are skipped whose rows are there and whose clones still are."""
    name = f"{machine['cores']} cores, {machine['cpu']}"
    if not work.exists():
        drop(results, name)
    make_clones(source, work)
    for step in steps:
        if is_done(step, rows_of(results, name, commit)):
            print(f"{step.metric} {step.variant}: measured before", flush=True)
            continue
        print(f"{step.metric} {step.variant}: {step.protocol} ...", flush=True)
        found = step.measure(work)
        values = found if isinstance(found, dict) else {step.variant: found}
        append(results, [{"machine": name, "variant": variant, "seed": 0, "metric": step.metric, "value": round(value, 2),
                          "protocol": f"{step.protocol}; commit {commit}"} for variant, value in values.items()], COLUMNS)
        print(f"{step.metric} {step.variant}: {', '.join(f'{value:.4g}' for value in values.values())}", flush=True)


def is_done(step: Step, rows: list[dict]) -> bool:
    return any(row["metric"] == step.metric and row["variant"].startswith(step.variant) for row in rows)


def head(repository: Path) -> str:
    """The commit that is checked out. Raises ValueError outside a repository or before its first commit."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{repository.resolve()}: {done.stderr.strip().splitlines()[0]}; a commit is what gets cloned")
    return done.stdout.strip()


def make_clones(source: Path, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for clone in CLONES:
        if not (work / clone).exists():
            subprocess.run(["git", "clone", "--quiet", str(source.resolve()), str(work / clone)], check=True)


# ---- results.csv ----

def rows_of(results: Path, machine: str, commit: str) -> list[dict]:
    return [row for row in read(results) if row["machine"] == machine and row["protocol"].endswith(f"commit {commit}")]


def drop(results: Path, machine: str) -> None:
    """Rows of this machine, of another commit or of clones that are gone, make way."""
    write(results, [row for row in read(results) if row["machine"] != machine], COLUMNS)
