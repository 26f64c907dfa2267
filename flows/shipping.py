"""What a search needs in the folder that travels as a Ray job, and whether it will be there. Asked before anything is sent."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage

from flows import freshness
from tasks.core.params import PARAMS_FILE
from tasks.core.ray_job import shipped


def check(params: dict, until: str, left_out: tuple[str, ...]) -> None:
    """Raises ValueError in one line: a dependency that stays behind, or a DVC remote that the job would not know."""
    with Repo(".") as repo:
        check_remote(repo)
        needed = list(dependencies(repo, until))
        if isinstance(inception := params["data"]["inception"], str):  # read by a stage, and no dependency in dvc.yaml
            needed.append(Path(inception))
        travels = shipped(Path.cwd(), left_out)
        for path in needed:
            check_travels(repo, path, travels, name_of(path, params))


def dependencies(repo: Repo, until: str) -> Iterator[Path]:
    """What stages up to `until` read and no stage writes, as dvc.yaml names it."""
    wanted = freshness.dag(until)
    stages = [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]
    written = {Path(out.fs_path) for stage in stages for out in stage.outs}
    for path in {Path(dep.fs_path) for stage in stages if stage.name in wanted for dep in stage.deps}:
        if written.isdisjoint({path, *path.parents}) and Path.cwd() / "runs" not in path.parents:
            yield path


def name_of(path: Path, params: dict) -> str:
    for key in (("data", "path"), ("pretrain_load", "path"), ("data", "inception")):
        value = params[key[0]][key[1]]
        if isinstance(value, str) and Path(value).absolute() == path.absolute():
            return f"{PARAMS_FILE}: {'.'.join(key)}: {value!r}"
    return f"dvc.yaml: {path}"


def check_travels(repo: Repo, path: Path, travels: set[Path], name: str) -> None:
    here, path = Path.cwd(), Path(os.path.abspath(path))  # a link into the folder counts as in it
    if not path.is_relative_to(here):
        raise ValueError(f"{name} lies outside of this folder, which is all that a job takes along; copy or link it into it")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    behind = [file for file in files if file not in travels and not repo.dvcignore.is_ignored_file(str(file))]
    added = {Path(out.fs_path): out for out in repo.index.outs if not isinstance(out.stage, PipelineStage)}
    for file in behind:
        if added.keys().isdisjoint({file, *file.parents}):
            raise ValueError(f"{name}: {file.relative_to(here)} would stay behind, since a .gitignore or .rayignore names it; "
                             "take it out of there, or `dvc add` it and `dvc push` it to a DVC remote")
    for place, out in added.items():
        if any(place in (file, *file.parents) for file in behind):
            check_pushed(repo, out, name)


def check_pushed(repo: Repo, out: Any, name: str) -> None:
    if not freshness.has_remote():
        raise ValueError(f"{name}: only DVC has {out}, and there is no DVC remote that the job could take it from; "
                         f"dvc remote add -d NAME URL && dvc push {out}.dvc")
    if out.status():
        raise ValueError(f"{name}: {out} has changed since it was added to DVC, where the job takes it from; dvc add {out} && "
                         f"dvc push {out}.dvc")
    try:
        there = repo.cloud.status([out.hash_info])
    except (DvcException, OSError) as error:
        raise ValueError(f"{name}: the DVC remote cannot be asked for it ({' '.join(str(error).split())})") from None
    if there.new or there.missing:
        raise ValueError(f"{name}: {out} is not in the DVC remote, where the job takes it from; dvc push {out}.dvc")


def check_remote(repo: Repo) -> None:
    """.dvc/config travels; .dvc/config.local, with what is secret, and the user's own configuration do not."""
    if not (name := repo.config["core"].get("remote")):
        return
    sent, url = repo.config.read("repo"), repo.config["remote"][name].get("url", "")
    if sent["core"].get("remote") != name or sent["remote"].get(name, {}).get("url") != url:
        raise ValueError(f".dvc/config: remote {name!r} stands in a file that does not travel, so what the job finds would not "
                         "come home; dvc remote add -d NAME URL, and only what is secret with --local")
    if "://" not in url and url not in Path(".dvc/config").read_text():  # DVC has made it absolute
        raise ValueError(f".dvc/config: remote {name!r} is a path relative to here, and the job works elsewhere; write {url}")
