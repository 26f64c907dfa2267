"""What DVC knows: the DAG, and which stages are stale. Asked in this process, once per run."""

import logging
from pathlib import Path

import networkx as nx
from dvc.repo import Repo

from tasks.core.artifacts import REPORTS
from tasks.core.params import PARAMS_FILE

logging.getLogger("dvc").setLevel(logging.ERROR)  # it warns of locks that killed runs left, and clears them itself


def dag(until: str | None = None) -> dict[str, tuple[str, ...]]:
    """stage -> the stages it reads from, in the order in which `dvc repro` would run them.

    until: only this stage and all it needs; None: every stage.
    """
    with Repo(".") as repo:
        names = [stage.name for stage in repo.index.stages]
        upstream = nx.relabel_nodes(repo.index.graph, lambda stage: stage.name)
    if until not in (None, *names):
        raise ValueError(f"until: {until!r} is not one of {', '.join(names)}")
    if until is not None:
        upstream = upstream.subgraph({until, *nx.descendants(upstream, until)})
    order = nx.lexicographical_topological_sort(upstream.reverse(), key=names.index)
    return {name: tuple(sorted(upstream.successors(name), key=names.index)) for name in order}


def to_run(stages: dict[str, tuple[str, ...]]) -> set[str]:
    """The stale stages and everything downstream of one: whether the latter really changed is known once the former ran."""
    with Repo(".") as repo:
        stale = {Path(target).name.rpartition(":")[2] for target in repo.status()}
    for name, upstream in stages.items():
        if not stale.isdisjoint(upstream):
            stale.add(name)
    return stale & stages.keys()


def put_back(stage: str, report: bytes | None) -> None:
    """Restore what DVC deleted before a stage that then failed: its artifacts from the cache, and its previous report."""
    with Repo(".") as repo:
        if all(out.hash_info for out in repo.stage.load_one(name=stage).outs):  # it has succeeded before
            repo.checkout(targets=[stage], force=True, allow_missing=True)
    if report is not None:
        REPORTS.mkdir(exist_ok=True)
        (REPORTS / f"{stage}.json").write_bytes(report)


def check_paths(params: dict) -> None:
    """DVC cannot resolve an empty path in a dependency, and says so with a stack trace. Raises ValueError instead."""
    for stage in ("data", "pretrain_load"):
        path = params[stage]["path"]
        if not path or not Path(path).exists():
            raise ValueError(f"{PARAMS_FILE}: {stage}.path: {path!r} does not exist; DVC depends on it, so it names a folder "
                             f"that is there (tasks/{stage} where nothing of your own is used)")


def has_remote() -> bool:
    with Repo(".") as repo:
        return bool(repo.config["core"].get("remote"))
