"""The night's run: the pipeline, then the gates, then promotion and push. A package before a closed gate is never promoted."""

from flows import ending

if __name__ == "__main__":
    ending.heed()  # before the imports that take seconds

import json
import shutil
import sys
from pathlib import Path

from prefect import flow
from prefect.states import Completed, Failed, State

from flows import freshness
from flows.compress import STAGE_TIMEOUT_H, bring_up_to_date, one_at_a_time
from flows.screen import take_over
from flows.server import start_server
from flows.stages import say
from tasks.core.artifacts import ARTIFACTS, MANIFEST, REPORTS, RUNS, hash_file, read_json, validate

PACKAGE = ARTIFACTS / "package"
VARIANT = "compressed"
CURRENT = "current"


@flow(name="nightly", validate_parameters=False)
def nightly(scale: str | None = "full", promoted: str = f"{RUNS}/promoted", stage_timeout_h: float = STAGE_TIMEOUT_H) -> State:
    """promoted: the folder that holds one package per promotion and `current`, a link to the newest."""
    ending.heed_again()
    with one_at_a_time(say):  # to the end: another run would delete what is judged, copied and pushed
        state = bring_up_to_date(scale, None, stage_timeout_h)
        if not state.is_completed():
            return state
        state = judge(Path(promoted))
        try:
            push_if_remote()
        except RuntimeError as error:
            return Failed(message=f"{state.name}, {state.message}; not pushed: {error}")
        return state


def judge(promoted: Path) -> State:
    """Promote what passes every gate."""
    closed = gates(read_json(REPORTS / "report.json"), read_json(REPORTS / "fid.json"))
    if closed:
        say("not promoted: " + "; ".join(closed))
        return Completed(name="NotPromoted", message="; ".join(closed))
    target = promote(validate(PACKAGE), promoted)
    say(f"promoted: {target}")
    return Completed(name="Promoted", message=str(target))


def gates(report: dict, quality: dict) -> list[str]:
    """Why this package stays where it is: [] when every gate is open."""
    closed = []
    if not report["met"]:
        closed.append(f"the goal was not met: {json.dumps(report, sort_keys=True)}")
    if report.get("worth_compressing") is False:
        closed.append("the teacher is not worth compressing: see the first line of the report")
    if VARIANT not in quality:
        closed.append(f"reports/fid.json has no row for {VARIANT}: its quality was not measured")
    return closed


def promote(package: Path, promoted: Path) -> Path:
    """Copy the package under the digest of its manifest and turn `current` to it. The same package is promoted once.

    A reader of `current` sees the old package or the new one, whole: the copy is renamed into place, then the link replaced.
    """
    name = hash_file(package / MANIFEST)[:12]
    target, partial, link = promoted / name, promoted / f".{name}.partial", promoted / f".{CURRENT}.partial"
    if not target.exists():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(package / VARIANT, partial)
        for report in sorted(REPORTS.glob("*.json")):
            shutil.copy(report, partial / f"report_{report.name}")
        partial.rename(target)
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.rename(promoted / CURRENT)
    return target


def push_if_remote() -> None:
    """Artifacts and the run cache go to the DVC remote, so that the next machine pays for nothing twice."""
    if not freshness.has_remote():
        say("no DVC remote is configured (dvc remote add -d NAME URL): artifacts stay on this machine")
        return
    freshness.exchange("push", "--run-cache")
    say("pushed to the DVC remote")


if __name__ == "__main__":
    take_over()
    start_server()
    state = nightly(return_state=True)
    sys.exit(0 if state.is_completed() else f"error: {state.message}")
