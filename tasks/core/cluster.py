"""Where work leaves the process: `map` a function over warm workers, `run` a whole stage on another node.

The only file that imports ray. Without a cluster (`address: null, workers: 1`) both verbs stay in this process; with more
workers and no address, a Ray of this machine alone is started, on the loopback interface, for as long as the process lives.
Results never depend on which of these it was, on the number of workers or on their timing.
"""

import contextlib
import functools
import importlib
import itertools
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks.core.artifacts import RUNS, Inputs, Report
from tasks.core.params import check_range, construct
from tasks.core.parcel import Parcel, files_of, pack
from tasks.core.progress import track
from tasks.core.serial import Failed, Known, Worker, map_here

ROOT = Path(__file__).resolve().parents[2]  # where `tasks` and `flows` are
SYNC_S = 30.0  # how often a remote stage's checkpoints come home
RAY_ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
PROBE = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"


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
        return cls(construct(ClusterParams, block, "params.yaml: cluster"))

    @property
    def in_process(self) -> bool:
        return self.params.address is None and self.params.workers == 1

    def map(self, make: Callable[[], Callable[[Any], Any]], items: Iterable, label: str, timeout_s: float | None = None,
            lookahead: int | None = None) -> Iterator:
        """Yield f(item) for every item, in the order of the items; f = make() is built once per warm worker.

        Item k is taken from `items` after result k - lookahead was handed out and never earlier, so `items` may be a
        generator that looks at the results so far (ask / tell): what it sees does not depend on timing. A slow item delays
        what is handed out, not what is computed, up to `lookahead` items (default: 4 per worker).

        make is picklable and so are items and results; folders that it reads come from `ship`. An item that raises yields
        `Failed`. An item that takes longer than timeout_s (None: no limit; without workers there is none) or whose worker
        dies is asked again, up to max_attempts times: f has to be idempotent. What `make` raises is raised here. A later map
        with the same `make` object finds its workers warm.
        """
        lookahead = lookahead or 4 * self.params.workers
        if self.in_process:
            results = map_here(self.built(make), items, lookahead, self.params.cpus_per_worker)
        else:
            results = map_on(self.warm_workers(make), items, label, timeout_s, lookahead)
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

    def warm_workers(self, make: Callable) -> "Workers":
        if self.workers is None or self.workers.make is not make:
            self.close()
            self.workers = Workers(self, make)
        return self.workers

    def close(self) -> None:
        """Give the warm workers back; a Ray of our own goes on until the process ends."""
        if self.workers:
            self.workers.close()

    def run(self, stage: ModuleType, params: Any, inputs: Inputs, out: Path) -> Report:
        """stage.run(params, inputs, out), on another node when `resources.<stage>` names {cpus, gpus} and there is a cluster.

        There, the inputs travel to the node, `out` comes back, and so do the stage's checkpoints, every SYNC_S seconds: when
        the node dies the stage goes on elsewhere from the last that came home. What the stage raises is raised here.
        """
        if self.params.address is None or not inputs.resources:
            return stage.run(params, inputs, out)
        self.connect()
        return run_remotely(self, stage.__name__, params, inputs, out)

    def ship(self, folder: Path) -> Parcel:
        """A handle to a folder that a worker on any node may `open()`; on this machine it is the folder itself."""
        if self.params.address is None:
            return Parcel(folder.name, here=folder.resolve())
        return self.pack(folder, files_of(folder))

    def pack(self, root: Path, files: list[Path]) -> Parcel:
        return pack(root, files, self.params.max_object_mb << 20, self.params.storage_uri)

    def connect(self) -> None:
        """Raises ValueError in one line when the address cannot be reached in connect_timeout_s; then nothing was started."""
        for key, value in RAY_ENV.items():
            os.environ.setdefault(key, value)
        if self.params.address is None:
            start_local(self.params)
        else:
            join(self.params)


def start_local(params: ClusterParams) -> None:
    """A Ray of this machine alone, with a token of its own: nothing is written to the user's home, nothing listens outside."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # its effect on every system: bind to the loopback only
    import ray
    if ray.is_initialized():
        return
    start = functools.partial(
        ray.init, address="local", num_cpus=params.workers * params.cpus_per_worker, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR", object_store_memory=max(256, 4 * params.max_object_mb) << 20)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with environment(OMP_NUM_THREADS=str(params.cpus_per_worker), PYTHONPATH=path):  # the workers inherit both
        try:
            start()
        except Exception as error:  # Ray's own limit of 30 s is a bare Exception, and on a busy machine it is short
            print(f"cluster: Ray did not start ({str(error).splitlines()[0]}); once more", flush=True)
            ray.shutdown()
            start()


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def join(params: ClusterParams) -> None:
    """Ray waits a minute and more for an address where nobody answers, and may abort the process: a child tries first."""
    import ray
    if ray.is_initialized():
        return
    try:
        child = subprocess.run([sys.executable, "-c", PROBE, params.address], capture_output=True, text=True, check=False,
                               timeout=params.connect_timeout_s)
    except subprocess.TimeoutExpired:
        raise ValueError(f"cluster.address: {params.address}: no answer within {params.connect_timeout_s:g} s; "
                         "is a Ray head running there, with this user's token?") from None
    if child.returncode:
        reason = next((line for line in reversed(child.stderr.splitlines()) if line.strip()), f"exit status {child.returncode}")
        raise ValueError(f"cluster.address: {params.address}: {reason.strip()}")
    shipped = [str(room) for room in (ROOT / "tasks", ROOT / "flows") if room.is_dir()]
    ray.init(address=params.address, logging_level="ERROR", runtime_env={"py_modules": shipped, "excludes": ["__pycache__"]})


def actor_options(cpus: float, gpus: float) -> dict:
    """Ray sets the number of threads from the CPUs only where nothing else has set it."""
    threads = str(max(1, int(cpus)))
    return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}}}


def worker_options(params: ClusterParams) -> dict:
    """A Ray of our own was started with the threads of its workers: they need no process of their own environment."""
    options = actor_options(params.cpus_per_worker, params.gpus_per_worker)
    return options if params.address else {k: v for k, v in options.items() if k != "runtime_env"}


@dataclass(frozen=True)
class Job:
    actor: Any
    index: int | None  # None: the worker is starting
    item: Any
    deadline: float    # of time.monotonic()


class Workers:
    """The warm actors of one `map`. A dead or hung one is replaced by us and not by Ray's max_restarts: Ray would give the
    item that kills its worker to the next one for ever, and knows no hung ones."""

    def __init__(self, cluster: Cluster, make: Callable):
        self.cluster, self.make = cluster, make
        self.limit = cluster.params.workers
        self.idle: list[Any] = []
        self.jobs: dict[Any, Job] = {}  # object reference -> what runs
        self.attempts: Counter[int | None] = Counter()
        self.begin("cluster", None)

    @functools.cached_property
    def actor_class(self) -> Any:
        self.cluster.connect()
        import ray
        self.made = ray.put(self.make)
        return ray.remote(Worker).options(**worker_options(self.cluster.params))

    def begin(self, label: str, timeout_s: float | None) -> None:
        self.label, self.timeout_s = label, float("inf") if timeout_s is None else timeout_s
        self.attempts.clear()

    def feed(self, queue: deque) -> None:
        """Give queued (index, item) to idle workers; start more workers while there are items for them."""
        while queue and self.idle:
            index, item = queue.popleft()
            actor = self.idle.pop()
            self.jobs[actor.call.remote(item)] = Job(actor, index, item, time.monotonic() + self.timeout_s)
        starting = sum(job.index is None for job in self.jobs.values())
        for _ in range(min(len(queue) - starting, self.limit - len(self.jobs))):
            self.start()

    def start_all(self) -> None:
        for _ in range(self.limit - len(self.idle) - len(self.jobs)):
            self.start()

    def start(self) -> None:
        actor = self.actor_class.remote()
        deadline = time.monotonic() + self.cluster.params.start_timeout_s
        self.jobs[actor.start.remote(self.made)] = Job(actor, None, None, deadline)

    def collect(self, queue: deque, done: dict) -> None:
        """Wait for the next thing to happen: a result goes to `done`, a lost item back to the head of the queue."""
        import ray
        timeout = max(0.0, min(job.deadline for job in self.jobs.values()) - time.monotonic())
        ready, _ = ray.wait(list(self.jobs), num_returns=1, timeout=None if timeout == float("inf") else timeout)
        for ref in ready:
            self.finish(ref, queue, done)
        for ref, job in list(self.jobs.items()):
            if job.deadline <= time.monotonic():
                del self.jobs[ref]
                self.lost(job, "hung" if job.index is not None else "did not start in time", queue, done)

    def finish(self, ref: Any, queue: deque, done: dict) -> None:
        import ray
        job = self.jobs.pop(ref)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # `attempt` lets nothing of an item through: this is make's
            raise error.cause from None
        except ray.exceptions.RayError as error:  # the worker, its node or the only copy of the result is gone
            return self.lost(job, f"died ({type(error).__name__})", queue, done)
        self.idle.append(job.actor)
        if job.index is not None:
            done[job.index] = result

    def lost(self, job: Job, how: str, queue: deque, done: dict) -> None:
        kill(job.actor)
        self.attempts[job.index] += 1
        what = "a starting worker" if job.index is None else f"the worker of item {job.index}"
        print(f"{self.label}: {what} {how}, {self.attempts[job.index]} of {self.cluster.params.max_attempts} times", flush=True)
        if self.attempts[job.index] < self.cluster.params.max_attempts:
            if job.index is not None:
                queue.appendleft((job.index, job.item))
        elif job.index is not None:
            done[job.index] = Failed(f"{what} {how}, {self.attempts[job.index]} times")
        elif self.idle or self.jobs:
            self.limit = len(self.idle) + len(self.jobs)
            print(f"{self.label}: going on with {self.limit} workers", flush=True)
        else:
            import ray
            params, offered = self.cluster.params, ray.cluster_resources()
            raise ValueError(f"cluster.workers: {what} {how}, {self.attempts[None]} times; each asks for "
                             f"{params.cpus_per_worker} CPUs and {params.gpus_per_worker:g} GPUs, the cluster has "
                             f"{offered.get('CPU', 0):g} and {offered.get('GPU', 0):g}")

    def end(self) -> None:
        """Whoever still works on an item of an abandoned map is stopped; the others stay warm."""
        for ref in [ref for ref, job in self.jobs.items() if job.index is not None]:
            kill(self.jobs.pop(ref).actor)

    def close(self) -> None:
        for actor in [*self.idle, *(job.actor for job in self.jobs.values())]:
            kill(actor)
        self.idle, self.jobs = [], {}


def kill(actor: Any) -> None:
    import ray
    if ray.is_initialized():  # it is not any more when an abandoned generator ends with the interpreter
        ray.kill(actor)


def map_on(workers: Workers, items: Iterable, label: str, timeout_s: float | None, lookahead: int) -> Iterator:
    source, queue, done = enumerate(items), deque(), {}
    workers.begin(label, timeout_s)

    def take(n: int) -> None:
        for index, item in itertools.islice(source, n):
            if isinstance(item, Known):
                done[index] = item.value
            else:
                queue.append((index, item))

    try:
        take(lookahead)
        for index in itertools.count():
            while index not in done:
                if not queue and all(job.index is None for job in workers.jobs.values()):
                    return
                workers.feed(queue)
                workers.collect(queue, done)
            workers.feed(queue)
            yield done.pop(index)
            take(1)
    finally:
        workers.end()


def kept_files(root: Path, stage: str, key: str) -> list[Path]:
    """What a stage needs to go on after a kill: its checkpoints of this key, and its own folder in runs/."""
    files = [*(root / "checkpoints").glob(f"*/{key[:16]}*"), *files_of(root / stage)]
    return sorted(p for p in files if p.suffix != ".partial")


class Node:
    """The body of an actor with two threads: one runs the stage, one hands out its checkpoints meanwhile."""

    def __init__(self, cluster: ClusterParams, stage_name: str, key: str):
        self.cluster, self.stage_name, self.key = Cluster(cluster), stage_name, key
        self.room = tempfile.TemporaryDirectory()
        os.chdir(self.room.name)

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
