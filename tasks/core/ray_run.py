"""`Cluster.run`: a whole stage on another node. Folders travel there, what it writes travels back, checkpoints meanwhile."""

import contextlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from tasks.core.artifacts import RUNS, Inputs, Report
from tasks.core.cluster import Cluster, ClusterParams
from tasks.core.parcel import Parcel, files_of
from tasks.core.ray_map import actor_options, kill
from tasks.core.serial import check_versions, versions

SYNC_S = 30.0  # how often a remote stage's checkpoints come home


def kept_files(root: Path, stage: str, key: str) -> list[Path]:
    """What a stage needs to go on after a kill: its checkpoints of this key, and its own folder in runs/."""
    files = [*(root / "checkpoints").glob(f"*/{key[:16]}*"), *files_of(root / stage)]
    return sorted(p for p in files if p.suffix != ".partial")


class Node:
    """The body of an actor with two threads: one runs the stage, one hands out its checkpoints."""

    def __init__(self, cluster: ClusterParams, stage_name: str, key: str):
        self.cluster, self.stage_name, self.key = Cluster(cluster), stage_name, key
        self.room = tempfile.TemporaryDirectory()
        os.chdir(self.room.name)

    def check(self, wanted: dict[str, str]) -> None:
        check_versions(wanted)

    def run(self, params: Any, folders: dict[str, Parcel], resources: dict, kept: Parcel) -> tuple[Report, Parcel, Parcel]:
        """-> the stage's report, its `out`, its last checkpoints."""
        with self.room:
            kept.unpack_into(RUNS)
            inputs = Inputs({k: p.open() for k, p in folders.items()}, self.key, self.cluster, resources)
            out = Path(self.room.name) / "out"
            out.mkdir()
            report = importlib.import_module(self.stage_name).run(params, inputs, out)
            return report, self.cluster.pack(out, files_of(out)), self.kept()

    def kept(self) -> Parcel:
        root = Path(self.room.name) / RUNS
        return self.cluster.pack(root, kept_files(root, self.stage_name.split(".")[1], self.key))


def run_remotely(cluster: Cluster, stage_name: str, params: Any, inputs: Inputs, out: Path) -> Report:
    import ray
    stage, resources, attempts = stage_name.split(".")[1], inputs.resources, cluster.params.max_attempts
    options = actor_options(resources.get("cpus", 1), resources.get("gpus", 0)) | {"max_concurrency": 2}
    folders = {name: cluster.ship(folder) for name, folder in inputs.folders.items()}
    for left in reversed(range(attempts)):
        node = ray.remote(Node).options(**options).remote(cluster.params, stage_name, inputs.key)
        try:
            ray.get(node.check.remote(versions()))  # first: where versions differ, params may not even unpickle
            kept = cluster.pack(RUNS, kept_files(RUNS, stage, inputs.key))
            report, parcel, kept = watch(node, node.run.remote(params, folders, resources, kept))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            print(f"{stage}: its node died ({type(error).__name__}); {left} attempts left", flush=True)
        else:
            kept.unpack_into(RUNS)
            parcel.unpack_into(out)
            return report
        finally:
            kill(node)
    raise ValueError(f"resources.{stage}: {resources}: its node died {attempts} times")


def watch(node: Any, ref: Any) -> tuple[Report, Parcel, Parcel]:
    """Wait for the stage; bring its checkpoints home meanwhile."""
    import ray
    while not ray.wait([ref], timeout=SYNC_S)[0]:
        with contextlib.suppress(ray.exceptions.RayTaskError):  # a file was replaced while it was packed: next time
            ray.get(node.kept.remote()).unpack_into(RUNS)
    return ray.get(ref)
