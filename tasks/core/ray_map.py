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

BUNDLE_S = 2.0  # short items go to a worker together, as many as take so long: a call costs both sides milliseconds
LATEST = 0.2    # weight of the last bundle in the mean of what an item takes


def actor_options(cpus: float, gpus: float) -> dict:
    """Ray sets the number of threads from the CPUs only where nothing else has set it."""
    threads = str(max(1, int(cpus)))
    return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}}}


@dataclass(frozen=True)
class Job:
    actor: Any
    items: list[tuple[int, Any]]  # index, item; none: the worker is starting
    began: float                  # of time.monotonic()
    limit_s: float
    checked: Any = None           # of a starting worker: the reference of its check of versions

    @property
    def deadline(self) -> float:
        return self.began + self.limit_s


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
        self.attempts: Counter[int | None] = Counter()  # None: of starting a worker
        self.alone: set[int] = set()              # items that were lost with others, and are asked again without them
        self.begin("cluster", None, None, 1)

    @functools.cached_property
    def actor_class(self) -> Any:
        self.connect()
        import ray
        self.made, self.versions = ray.put(self.make), versions()
        return ray.remote(Worker).options(**self.options)

    def begin(self, label: str, timeout_s: float | None, settle: Settle | None, lookahead: int) -> None:
        self.label, self.timeout_s = label, float("inf") if timeout_s is None else timeout_s
        self.settle = settle or (lambda index, result: result)
        self.most = lookahead // (2 * self.limit)  # of a bundle: while one is computed, the next can be asked
        self.item_s = float("inf")                 # that an item takes
        self.ending = False                        # there are no more items to take
        self.attempts.clear()
        self.alone.clear()

    def feed(self, queue: deque) -> None:
        """Give queued (index, item) to idle workers; start more workers while there are items for them."""
        while queue and self.idle:
            items = self.bundle(queue)
            actor = self.idle.pop()
            call = actor.call.remote([item for _, item in items])
            self.expect(call, Job(actor, items, time.monotonic(), self.timeout_s * len(items)))
        if queue and len(self.jobs) < self.limit:
            starting = sum(not job.items for job in self.jobs.values())
            for _ in range(min(len(queue) - starting, self.limit - len(self.jobs))):
                self.start()

    def bundle(self, queue: deque) -> list[tuple[int, Any]]:
        """What one idle worker is given: one item, or several that are short, as long as no other worker goes without."""
        sharers = self.limit if self.ending else len(self.idle)  # in the end less and less, so that all end together
        size = max(1, min(self.most, len(queue) // sharers, round(BUNDLE_S / self.item_s)))
        items = [queue.popleft()]
        while len(items) < size and not self.alone & {items[0][0], queue[0][0]}:
            items.append(queue.popleft())
        return items

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
        self.expect(actor.start.remote(self.made), Job(actor, [], time.monotonic(), self.start_timeout_s, checked))

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
            self.lost(job, "hung" if job.items else "did not start in time", queue, done)

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
            if not job.items:
                ray.get(job.checked)  # first: where versions differ, `make` may not even unpickle
            results = future.result()
        except ray.exceptions.RayTaskError as error:  # `attempt` lets nothing of an item through: this is make's
            raise error.cause from None
        except ray.exceptions.RayError as error:  # the worker, its node or the only copy of the result is gone
            return self.lost(job, f"died ({type(error).__name__})", queue, done)
        self.idle.append(job.actor)
        if job.items:
            took = (time.monotonic() - job.began) / len(job.items)
            self.item_s = took if self.item_s == float("inf") else self.item_s + LATEST * (took - self.item_s)
            for (index, _), result in zip(job.items, results, strict=True):
                done[index] = self.settle(index, result)

    def lost(self, job: Job, how: str, queue: deque, done: dict) -> None:
        kill(job.actor)
        if len(job.items) > 1:
            indices = [index for index, _ in job.items]
            print(f"{self.label}: the worker of items {indices} {how}; each is asked again alone", flush=True)
            self.alone.update(indices)
            queue.extendleft(reversed(job.items))
        elif job.items:
            self.lost_item(*job.items[0], how, queue, done)
        else:
            self.lost_start(how)

    def lost_item(self, index: int, item: Any, how: str, queue: deque, done: dict) -> None:
        what = f"the worker of item {index}"
        if self.try_again(index, what, how):
            queue.appendleft((index, item))
        else:
            done[index] = self.settle(index, Failed(f"{what} {how}, {self.attempts[index]} times"))

    def lost_start(self, how: str) -> None:
        what = "a starting worker"
        if self.try_again(None, what, how):
            return
        if not self.idle and not self.jobs:
            import ray
            offered = ray.cluster_resources()
            raise ValueError(f"cluster.workers: {what} {how}, {self.attempts[None]} times; each asks for "
                             f"{self.options['num_cpus']:g} CPUs and {self.options['num_gpus']:g} GPUs, the cluster has "
                             f"{offered.get('CPU', 0):g} and {offered.get('GPU', 0):g}")
        self.limit = len(self.idle) + len(self.jobs)
        print(f"{self.label}: going on with {self.limit} workers", flush=True)

    def try_again(self, index: int | None, what: str, how: str) -> bool:
        self.attempts[index] += 1
        print(f"{self.label}: {what} {how}, {self.attempts[index]} of {self.max_attempts} times", flush=True)
        return self.attempts[index] < self.max_attempts

    def end(self) -> None:
        """Whoever still works on an item of an abandoned map is stopped; the others stay warm."""
        for future in [future for future, job in self.jobs.items() if job.items]:
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
    workers.begin(label, timeout_s, settle, lookahead)

    def take() -> None:
        """One item; and whoever has ended meanwhile is given more: to make an item can take as long as many calls."""
        for index, item in itertools.islice(source, 1):
            if isinstance(item, Known):
                done[index] = item.value
            else:
                queue.append((index, item))
            break
        else:
            workers.ending = True
        if not workers.ended.empty():
            workers.collect(queue, done)
        workers.feed(queue)

    try:
        for _ in range(lookahead):
            take()
        if lookahead < workers.limit and not workers.ending:
            print(f"{label}: {lookahead} items are asked ahead, so that no more of the {workers.limit} workers are busy",
                  flush=True)
        for index in itertools.count():
            while index not in done:
                if not queue and not any(job.items for job in workers.jobs.values()):
                    return
                workers.feed(queue)
                workers.collect(queue, done)
            workers.feed(queue)
            yield done.pop(index)
            take()
    finally:
        workers.end()
