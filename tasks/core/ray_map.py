"""The warm actors behind `Cluster.map`, and the loop that keeps them at work and hands results out in order."""

import functools
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from tasks.core.serial import Failed, Known, Settle, Worker, versions


def actor_options(cpus: float, gpus: float) -> dict:
    """Ray sets the number of threads from the CPUs only where nothing else has set it."""
    threads = str(max(1, int(cpus)))
    return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}}}


@dataclass(frozen=True)
class Job:
    actor: Any
    index: int | None  # None: the worker is starting
    item: Any          # of a starting worker: the reference of its check of versions
    deadline: float    # of time.monotonic()


class Workers:
    """The warm actors of one `map`. A dead or hung one is replaced by us and not by Ray's max_restarts: Ray would give the
    item that kills its worker to the next one for ever, and knows no hung ones."""

    def __init__(self, make: Callable, connect: Callable[[], None], options: dict, limit: int, max_attempts: int,
                 start_timeout_s: float):
        """connect: called when the first worker starts. options: of the actors. limit: how many at most."""
        self.make, self.connect, self.options, self.limit = make, connect, options, limit
        self.max_attempts, self.start_timeout_s = max_attempts, start_timeout_s
        self.idle: list[Any] = []
        self.jobs: dict[Future, Job] = {}         # what runs, and what is to become of it
        self.ended: SimpleQueue[Future] = SimpleQueue()
        self.attempts: Counter[int | None] = Counter()
        self.begin("cluster", None, None)

    @functools.cached_property
    def actor_class(self) -> Any:
        self.connect()
        import ray
        self.made, self.versions = ray.put(self.make), versions()
        return ray.remote(Worker).options(**self.options)

    def begin(self, label: str, timeout_s: float | None, settle: Settle | None) -> None:
        self.label, self.timeout_s = label, float("inf") if timeout_s is None else timeout_s
        self.settle = settle or (lambda index, result: result)
        self.attempts.clear()

    def feed(self, queue: deque) -> None:
        """Give queued (index, item) to idle workers; start more workers while there are items for them."""
        while queue and self.idle:
            index, item = queue.popleft()
            actor = self.idle.pop()
            self.expect(actor.call.remote(item), Job(actor, index, item, time.monotonic() + self.timeout_s))
        if queue and len(self.jobs) < self.limit:
            starting = sum(job.index is None for job in self.jobs.values())
            for _ in range(min(len(queue) - starting, self.limit - len(self.jobs))):
                self.start()

    def start_all(self) -> None:
        for _ in range(self.limit - len(self.idle) - len(self.jobs)):
            self.start()

    def warm(self) -> None:
        """Start all, and wait until they have; to measure, not to get on."""
        self.start_all()
        while self.jobs:
            self.collect(deque(), {})

    def start(self) -> None:
        actor = self.actor_class.remote()
        checked = actor.check.remote(self.versions)
        self.expect(actor.start.remote(self.made), Job(actor, None, checked, time.monotonic() + self.start_timeout_s))

    def expect(self, ref: Any, job: Job) -> None:
        """Its future comes to `ended` by itself: to ask ray.wait about all of them each time took half of the
        driver's time, and grows with the workers."""
        future = ref.future()
        self.jobs[future] = job
        future.add_done_callback(self.ended.put)

    def collect(self, queue: deque, done: dict) -> None:
        """Wait for the next thing to happen: a result goes to `done`, a lost item back to the head of the queue."""
        for future in self.wait():
            self.finish(future, queue, done)
        for future in self.overdue():
            job = self.jobs.pop(future)
            self.lost(job, "hung" if job.index is not None else "did not start in time", queue, done)

    def wait(self) -> list[Future]:
        """Those that ended; none when a deadline came first."""
        timeout = max(0.0, min(job.deadline for job in self.jobs.values()) - time.monotonic())
        try:
            ended = [self.ended.get(timeout=None if timeout == float("inf") else timeout)]
        except Empty:
            return []
        ended += [self.ended.get() for _ in range(self.ended.qsize())]  # nobody else takes from it
        return [future for future in ended if future in self.jobs]  # and not one of an actor that was killed

    def overdue(self) -> list[Future]:
        """Those past their deadline. What has ended is not: on a busy machine it only waits to be collected."""
        now = time.monotonic()
        return [future for future, job in self.jobs.items() if job.deadline <= now and not future.done()]

    def finish(self, future: Future, queue: deque, done: dict) -> None:
        import ray
        job = self.jobs.pop(future)
        try:
            if job.index is None:
                ray.get(job.item)  # first: where versions differ, `make` may not even unpickle
            result = future.result()
        except ray.exceptions.RayTaskError as error:  # `attempt` lets nothing of an item through: this is make's
            raise error.cause from None
        except ray.exceptions.RayError as error:  # the worker, its node or the only copy of the result is gone
            return self.lost(job, f"died ({type(error).__name__})", queue, done)
        self.idle.append(job.actor)
        if job.index is not None:
            done[job.index] = self.settle(job.index, result)

    def lost(self, job: Job, how: str, queue: deque, done: dict) -> None:
        kill(job.actor)
        self.attempts[job.index] += 1
        what = "a starting worker" if job.index is None else f"the worker of item {job.index}"
        print(f"{self.label}: {what} {how}, {self.attempts[job.index]} of {self.max_attempts} times", flush=True)
        if self.attempts[job.index] < self.max_attempts:
            if job.index is not None:
                queue.appendleft((job.index, job.item))
        elif job.index is not None:
            done[job.index] = self.settle(job.index, Failed(f"{what} {how}, {self.attempts[job.index]} times"))
        elif self.idle or self.jobs:
            self.limit = len(self.idle) + len(self.jobs)
            print(f"{self.label}: going on with {self.limit} workers", flush=True)
        else:
            import ray
            offered = ray.cluster_resources()
            raise ValueError(f"cluster.workers: {what} {how}, {self.attempts[None]} times; each asks for "
                             f"{self.options['num_cpus']:g} CPUs and {self.options['num_gpus']:g} GPUs, the cluster has "
                             f"{offered.get('CPU', 0):g} and {offered.get('GPU', 0):g}")

    def end(self) -> None:
        """Whoever still works on an item of an abandoned map is stopped; the others stay warm."""
        for future in [future for future, job in self.jobs.items() if job.index is not None]:
            kill(self.jobs.pop(future).actor)

    def close(self) -> None:
        for actor in [*self.idle, *(job.actor for job in self.jobs.values())]:
            kill(actor)
        self.idle, self.jobs = [], {}


def kill(actor: Any) -> None:
    import ray
    if ray.is_initialized():  # it is not any more when an abandoned generator ends with the interpreter
        ray.kill(actor)


def map_on(workers: Workers, items: Iterable, label: str, timeout_s: float | None, lookahead: int,
           settle: Settle | None) -> Iterator:
    source, queue, done = enumerate(items), deque(), {}
    workers.begin(label, timeout_s, settle)

    def take(n: int) -> None:
        for index, item in itertools.islice(source, n):
            if isinstance(item, Known):
                done[index] = item.value
            else:
                queue.append((index, item))

    try:
        take(lookahead)
        if len(queue) == lookahead < workers.limit:
            print(f"{label}: {lookahead} items are asked ahead, so that no more of the {workers.limit} workers are busy",
                  flush=True)
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
