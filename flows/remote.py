"""Results on their way to the DVC remote. flows/repro.py brings them back."""

from dvc.exceptions import DvcException
from dvc.repo import Repo

from flows import freshness


def push() -> None:
    """`dvc push --run-cache`, and the reports: they are not cached, so DVC leaves them out, and without them no other clone
    finds the result of a stage in the run cache. Raises RuntimeError with DVC's last word."""
    try:
        with Repo(".") as repo:
            reports = [out.hash_info for stage in repo.index.stages for out in stage.outs if not out.use_cache]
            failed = repo.cloud.push([report for report in reports if report and repo.cache.local.exists(report.value)]).failed
    except (DvcException, OSError) as error:
        raise RuntimeError(f"dvc push: {' '.join(str(error).split())}") from None
    if failed:
        raise RuntimeError(f"dvc push: {len(failed)} reports did not get there")
    freshness.exchange("push", "--run-cache")
