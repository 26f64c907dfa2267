"""Where work leaves the process: `map` a function over warm workers, `run` a whole stage on another node.

This file and its neighbours ray_*.py are all that imports ray: ray_map (the workers of a map), ray_run (a stage elsewhere),
ray_probe (is there a cluster), ray_job (this repository as a job). Without a cluster (`address: null, workers: 1`) both verbs
stay in this process; with more workers and no address, a Ray of this machine alone is started, on the loopback interface, for
as long as the process lives. Results never depend on which of these it was, on the number of workers or on their timing.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks.core.artifacts import Inputs, Report
from tasks.core.params import check_range, construct
from tasks.core.parcel import Parcel, files_of, pack
from tasks.core.progress import track
from tasks.core.ray_map import Workers, actor_options, map_on
from tasks.core.rooms import own_room
from tasks.core.serial import Settle, map_here

ROOT = Path(__file__).resolve().parents[2]  # where `tasks` and `flows` are
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's own name for what a job's driver finds in its environment
INSIDE = "DIFFPRESS_CLUSTER"  # in the environment: the address that counts in place of the file's
LONGEST = 300  # letters of what Ray says that are passed on
REACHED = "reached"  # what ray_probe prints once there is a connection
RAY_ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True, kw_only=True)
class ClusterParams:
    """The block `cluster:` of params.yaml. Moving work changes no result, so it belongs to no stage's params."""

    address: str | None       # null: this machine | auto: the Ray cluster that this process is inside of | host:port
    workers: int              # of one `map`
    cpus_per_worker: int      # also its number of threads; results are equal for equal values of this
    gpus_per_worker: float    # a share is possible
    max_attempts: int         # how often an item is tried whose worker dies or hangs
    max_object_mb: int        # folders up to this size travel through the object store, larger ones through storage_uri
    storage_uri: str | None   # fsspec URI that every node can read and write, e.g. that of the DVC remote's store
    connect_timeout_s: float
    start_timeout_s: float    # for a worker to be placed and to be warm, autoscaling included

    def __post_init__(self):
        for key, low, high in (("workers", 1, 10_000), ("cpus_per_worker", 1, 1024), ("gpus_per_worker", 0, 64),
                               ("max_attempts", 1, 100), ("max_object_mb", 1, 100_000), ("connect_timeout_s", 1, 600),
                               ("start_timeout_s", 1, 86_400)):
            check_range(f"cluster.{key}", getattr(self, key), low, high)
        if self.address not in (None, "auto") and not self.address.rpartition(":")[2].isdigit():
            raise ValueError(f"cluster.address: {self.address!r} is not null, auto or host:port")


class Cluster:
    """Two verbs, `map` and `run`. Connects (or starts Ray) when the first item needs it, never before."""

    def __init__(self, params: ClusterParams):
        self.params = params
        self.workers: Workers | None = None                # of the last `map`, still warm
        self.kept: tuple[Callable, Callable] | None = None  # the same of a map in this process

    @classmethod
    def from_params(cls, block: dict) -> "Cluster":
        """block: `cluster` of params.yaml; of a search that was submitted as a Ray job, the job's own cluster is meant."""
        there = {"address": os.environ[INSIDE]} if INSIDE in os.environ else {}
        return cls(construct(ClusterParams, {**block, **there}, "params.yaml: cluster"))

    @property
    def in_process(self) -> bool:
        return self.params.address is None and self.params.workers == 1

    def map(self, make: Callable[[], Callable[[Any], Any]], items: Iterable, label: str, timeout_s: float | None = None,
            lookahead: int | None = None, settle: Settle | None = None) -> Iterator:
        """Yield f(item) for every item, in the order of the items; f = make() is built once per warm worker.

        Item k is taken from `items` after result k - lookahead was handed out and never earlier, so `items` may be a
        generator that looks at the results so far (ask / tell): what it sees does not depend on timing. A slow item delays
        what is handed out, not what is computed, up to `lookahead` items (default: 4 per worker). settle(k, result k) is called
        the moment that there is one, before its turn; what it returns is handed out instead.

        make is picklable and so are items and results; folders that it reads come from `ship`. An item that raises yields
        `Failed`. An item that takes longer than timeout_s (None: no limit; without workers there is none) or whose worker
        dies is asked again, up to max_attempts times: f has to be idempotent. What `make` raises is raised here. A later map
        with the same `make` object finds its workers warm.

        Items of less than a second go to a worker several at once, as many as lookahead leaves for two such calls to every
        worker; one whose worker is lost then costs the others of its call their results, and is asked again alone.
        """
        lookahead = lookahead or 4 * self.params.workers
        if self.in_process:
            results = map_here(self.built(make), items, lookahead, self.params.cpus_per_worker, settle)
        else:
            results = map_on(self.warm_workers(make), items, label, timeout_s, lookahead, settle)
        with contextlib.closing(results):
            yield from track(results, len(items), label) if isinstance(items, Sized) else results

    def prepare(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        """Have the workers of a coming `map` with this `make` start while the caller does other things."""
        if not self.in_process:
            self.warm_workers(make).start_all()

    def built(self, make: Callable) -> Callable[[], Callable]:
        """make(), called when first needed and kept for later maps with the same `make`."""
        if self.kept is None or self.kept[0] is not make:
            self.kept = (make, functools.cache(make))
        return self.kept[1]

    def warm_workers(self, make: Callable) -> Workers:
        if self.workers is None or self.workers.make is not make:
            self.close()
            self.workers = Workers(make, self.connect, worker_options(self.params), self.params.workers,
                                   self.params.max_attempts, self.params.start_timeout_s)
        return self.workers

    def close(self) -> None:
        """Give the warm workers back; a Ray of our own goes on until the process ends."""
        if self.workers:
            self.workers.close()

    def run(self, stage: ModuleType, params: Any, inputs: Inputs, out: Path) -> Report:
        """stage.run(params, inputs, out), on another node when `resources.<stage>` names {cpus, gpus} and there is a cluster.

        There, the inputs travel to the node, `out` comes back, and so do the stage's checkpoints, every half minute: when
        the node dies the stage goes on elsewhere from the last that came home. What the stage raises is raised here.
        """
        if self.params.address is None or not inputs.resources:
            return stage.run(params, inputs, out)
        from tasks.core.ray_run import run_remotely  # which is made of this class
        self.connect()
        return run_remotely(self, stage.__name__, params, inputs, out)

    def ship(self, folder: Path) -> Parcel:
        """A handle to a folder that a worker on any node may `open()`; on this machine it is the folder itself."""
        if self.params.address is None:
            return Parcel(folder.name, here=folder.resolve())
        return self.pack(folder, files_of(folder))

    def pack(self, root: Path, files: list[Path]) -> Parcel:
        return pack(root, files, self.params.max_object_mb << 20, self.params.storage_uri)

    def check(self) -> None:
        """Raises ValueError in one line when there is an address and it cannot be reached, or its nodes have other versions."""
        if self.params.address is not None:
            check_reachable(self.params)

    def connect(self) -> None:
        """Raises ValueError in one line when the address cannot be reached in connect_timeout_s; then nothing was started."""
        for key, value in RAY_ENV.items():
            os.environ.setdefault(key, value)
        if self.params.address is None:
            start_local(self.params)
        else:
            join(self.params)


def start_local(params: ClusterParams) -> None:
    """A Ray of this machine alone, with a token of its own: nothing is written to the user's home, nothing listens outside,
    and nothing of it stays on the disk."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # its effect on every system: bind to the loopback only
    import ray
    if ray.is_initialized():
        return
    start = functools.partial(
        ray.init, address="local", num_cpus=params.workers * params.cpus_per_worker, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR", object_store_memory=max(256, 4 * params.max_object_mb) << 20,
        _temp_dir=str(own_room()))
    atexit.register(ray.shutdown)  # so before the room goes
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with environment(OMP_NUM_THREADS=str(params.cpus_per_worker), PYTHONPATH=path), signals_kept():  # workers inherit the first
        try:
            start()
        except Exception as error:  # Ray's own limit of 30 s is a bare Exception, and on a busy machine it is short
            print(f"cluster: Ray did not start ({in_short(error)}); once more", flush=True)
            ray.shutdown()
            start()
    speak_shortly()


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, ends the process with another status for it and prints addresses of its own code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():  # nobody else may, Ray included
            signal.signal(signal.SIGTERM, before)


def join(params: ClusterParams) -> None:
    import ray
    if ray.is_initialized():
        return
    check_reachable(params)
    job = json.loads(os.environ.get(JOB, "{}")).get("runtime_env") or {}
    try:
        with signals_kept():
            ray.init(address=params.address, logging_level="ERROR", runtime_env=to_ship(job))
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"cluster.address: {params.address}: {in_short(error)}") from None
    speak_shortly()


def speak_shortly() -> None:
    """Ray tells the driver of every worker that dies, in a thousand letters, whatever it was asked; that is ours to say."""
    from ray._private import worker

    def tell(said: Mapping[str, Any], *_, **__) -> None:
        for line in said["lines"]:
            if "worker died" not in line:
                print(f"cluster: {in_short(line)}", flush=True)

    worker.print_to_stdstream = tell


def to_ship(job: Mapping[str, Any]) -> dict:
    """The runtime environment in which workers find this code. job: that of the Ray job which this process is the driver of, {}
    outside of one. Ray merges the two, and no key may be in both."""
    if Path(job.get("working_dir", "")).stem == ROOT.name:
        return {}  # the job came with this very folder, and its workers have it, too
    if "py_modules" in job:
        raise ValueError("this Ray job has py_modules in its runtime environment, and workers need this code there; submit it "
                         "without, or with `python -m flows.search --address`")
    shipped = {"py_modules": [str(room) for room in (ROOT / "tasks", ROOT / "flows") if room.is_dir()]}
    return shipped if "excludes" in job else shipped | {"excludes": ["__pycache__"]}


def in_short(error: BaseException | str) -> str:
    """The first sentence of what Ray said, which may run over pages, in one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    sentence = re.split(r"(?<=[^.][.;!?]) (?=[^a-z])", said, maxsplit=1)[0].rstrip(" .;")
    return sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST].rpartition(' ')[0]} ..."


def check_reachable(params: ClusterParams) -> None:
    """Raises ValueError in one line where no cluster answers at the address in time, or one whose versions differ."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        child = subprocess.run([sys.executable, "-m", "tasks.core.ray_probe", params.address], capture_output=True, text=True,
                               check=False, timeout=params.connect_timeout_s, env=RAY_ENV | os.environ | {"PYTHONPATH": path})
    except subprocess.TimeoutExpired as expired:
        if REACHED.encode() in (expired.stdout or b""):
            return  # its nodes are slow to answer; each is checked again when a worker starts on it
        raise ValueError(f"cluster.address: {params.address}: no answer within {params.connect_timeout_s:g} s; "
                         "is a Ray head running there, with this user's token?") from None
    if child.returncode:
        lines = [line for line in (child.stdout or child.stderr).splitlines() if line.strip()] or [f"status {child.returncode}"]
        raise ValueError(f"cluster.address: {params.address}: {lines[-1].strip()}")


def worker_options(params: ClusterParams) -> dict:
    """A Ray of our own was started with the threads of its workers: they need no process of their own environment."""
    options = actor_options(params.cpus_per_worker, params.gpus_per_worker)
    return options if params.address else {k: v for k, v in options.items() if k != "runtime_env"}
