"""`dvc repro` of one stage, in a process that ends with its run: `python -m flows.repro [-f] STAGE`."""

import os
import signal
import sys

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage

from tasks.core import lifeline


def main(arguments: list[str]) -> int:
    """arguments: of `dvc repro -s`, the stage last. -> DVC's exit status. This process leads its group, so what it started ends
    with it."""
    lifeline.hold(lifeline.end_my_group)
    signal.signal(signal.SIGTERM, lambda *_: None)  # it goes to the stage, too; DVC then puts its own files in order
    os.environ[lifeline.MASTER] = str(os.getpid())
    if len(arguments) == 1 and (lost := bring(arguments[0])):  # `-f` wants no earlier result
        print(lost, flush=True)
    from dvc.cli import main as dvc
    return dvc(["--wait-for-lock", "repro", "-s", *arguments])


def bring(stage: str) -> str | None:
    """Fetch from the remote what the run cache says is this stage's result, where it is not here; `dvc repro` then finds it.

    `dvc fetch --run-cache` brings the run cache, and of files only those that dvc.lock names. -> why it could not be fetched,
    in one line, or None.
    """
    with Repo(".") as repo:
        if not repo.config["core"].get("remote"):
            return None
        try:
            if result := known_result(repo, stage):
                for objects in result.get_used_objs().values():
                    repo.cloud.pull(objects)
        except (DvcException, OSError) as error:
            return f"{stage}: an earlier result could not be fetched from the DVC remote ({' '.join(str(error).split())})"
    return None


def known_result(repo: Repo, stage: str) -> PipelineStage | None:
    """The stage as the run cache knows it for its command, parameters and dependencies of now; None where its files are here,
    or nothing is known. Raises DvcException where a dependency is missing."""
    now = repo.stage.load_one(name=stage)
    now.save_deps()
    entry = repo.stage_cache._load(now)  # DVC has no public way to ask
    known = entry and repo.stage_cache._create_stage(entry, wdir=now.wdir)
    return None if not known or known.outs_cached() else known


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
