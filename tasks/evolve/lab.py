"""Where candidates are evaluated: warm workers, and a log that outlives the run."""

import errno
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tasks.core import denoiser, disk, quality, sampler
from tasks.core.artifacts import RUNS, Inputs, digest, hash_file
from tasks.core.cluster import Cluster
from tasks.core.parcel import files_of
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.serial import Failed, Known
from tasks.data import features
from tasks.evolve import conditioning, fitness, prefix, promote, proxy
from tasks.evolve.fitness import Protocol, Sampler, make_sampler, reference_items
from tasks.evolve.promote import Contest
from tasks.evolve.proxy import judged, loss_of, seen
from tasks.evolve.weights import Weights
from tasks.runtime import cache, integer, precision, solver

# of an evaluation
CODE = (denoiser, quality, sampler, features, fitness, conditioning, prefix, promote, proxy, cache, integer, precision, solver)
SYNC_S = 1.0  # between two syncs of the log


class EvaluationLog:
    """Digest of an item -> its result, one JSON line each, appended at once and synced to the disk every SYNC_S at most.

    So no kill of a process loses an evaluation, and a power cut those of a second: to wait 12 ms for a disk each time would be
    most of what an evaluation costs its driver.

    A kill may tear the last line: it is left out when the file is read, and cut off.
    """

    def __init__(self, path: Path):
        self.path, self.known, self.synced = path, {}, float("-inf")
        if path.exists():
            whole = path.read_bytes().rpartition(b"\n")[0]
            self.known = dict(json.loads(line) for line in whole.splitlines())
            os.truncate(path, len(whole) + 1 if whole else 0)

    def add(self, key: str, result: list | dict) -> None:
        self.known[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            whole, line = file.tell(), (json.dumps([key, result]) + "\n").encode()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if time.monotonic() - self.synced > SYNC_S:
                    os.fsync(file.fileno())
                    self.synced = time.monotonic()
            except OSError as error:  # the search knows the result all the same; half a line would spoil the next one
                file.truncate(whole)
                print(f"warning: {disk.describe(error, self.path)}; going on, after a kill this evaluation is done again",
                      flush=True)


@dataclass(frozen=True)
class Lab:
    """Turns recipes into distances, in order; what the log knows, this night's or another's, is not sampled again."""

    cluster: Cluster
    make: Callable[[], Sampler]
    log: EvaluationLog
    lookahead: int
    timeout_s: float
    images: int = 0                      # of a whole evaluation; 0: there are no others
    proxy: str = "paired"                # what of an evaluation counts as its distance, see `tasks.evolve.proxy`
    bank: quality.Gaussian | None = None  # of the features of the teacher's bank; every proxy but `paired` needs it
    failures: dict[str, str] = field(default_factory=dict)  # key of an item -> why its evaluation failed

    def results(self, items: Iterable[tuple], label: str, summarise: Callable[[np.ndarray], object], lookahead: int,
                enough: Callable[[tuple, dict], bool] = lambda item, known: True) -> Iterator:
        """items: what a worker takes; summarise: features -> what is logged; enough: whether that is all there is to know."""
        keys = []

        def unknown() -> Iterator:
            for item in items:
                keys.append(key_of(*item[:2]))
                known = self.log.known.get(keys[-1])
                yield item if known is None or not enough(item, known) else Known(known)

        def settle(k: int, result):  # as it arrives: a killed search loses what was being computed and nothing else
            if isinstance(result, np.ndarray):
                result = summarise(result)
                self.log.add(keys[k], result)
            elif isinstance(result, Failed):
                self.failures[keys[k]] = result.reason
            return result

        yield from self.cluster.map(self.make, unknown(), label, self.timeout_s, lookahead, settle)

    def references(self, schedule: denoiser.Schedule) -> tuple[np.ndarray, np.ndarray]:
        """Features of the dense teacher at 50 and at 100 steps. Raises ValueError when they cannot be had."""
        found = list(self.results(reference_items(schedule), "evolve: the teacher's images", np.ndarray.tolist, self.lookahead))
        for result in found:
            if isinstance(result, Failed):
                raise ValueError(f"evolve: the teacher cannot be sampled from: {result.reason}")
        return tuple(map(np.asarray, found))

    def distances(self, references: tuple[np.ndarray, np.ndarray], items: Iterable[tuple[str, Recipe]], total: int,
                  label: str, note: Callable[[], str] = str) -> Iterator[float | None]:
        """In the order of the items; None where the evaluation failed, which is said, kept in `failures` and not logged.

        note: what else there is to say on a line of progress.
        """
        results = self.results(items, label, lambda found: seen(found, references, self.bank), self.lookahead,
                               lambda item, known: self.is_whole(known))
        for result in succeeded(track(results, total, label, note=note), label):
            yield None if result is None else loss_of(result, self.proxy)

    def contested(self, contest: Contest, items: Iterable[tuple[str, Recipe, float]], total: int, label: str,
                  note: Callable[[], str] = str) -> Iterator[float | None]:
        """As `distances`, but of each item, (weights, recipe, cost), only the first images are evaluated unless these promise
        enough. Of an item that is asked again and now promises enough, the others are still due."""
        def enough(item: tuple, known: dict) -> bool:
            return self.is_whole(known) or not item[2].decide(np.array(known["paired"])).promoted

        results = self.results(contest.asked(items), label, lambda found: seen(found, contest.references, self.bank),
                               self.lookahead, enough)
        found = succeeded(track(results, total, label, note=note), label)
        yield from contest.told(None if one is None else one["paired"] for one in found)

    def is_whole(self, known: dict) -> bool:
        """Whether all images were seen."""
        return len(known["paired"]) >= self.images

    def judged(self, item: tuple[str, Recipe], base: tuple[str, Recipe] | None = None) -> quality.Difference:
        """Distance of what was evaluated, above that of `base` if it is given, with its error. Both were seen on all images."""
        known = self.log.known
        return judged(known[key_of(*item)], self.proxy, base and known[key_of(*base)])


def succeeded(results: Iterable, label: str) -> Iterator:
    """None where an evaluation failed, and said."""
    for result in results:
        if isinstance(result, Failed):
            print(f"{label}: a candidate failed: {result.reason}", flush=True)
        yield None if isinstance(result, Failed) else result


def key_of(weights: str, recipe: Recipe) -> str:
    return digest([weights, recipe.to_json()])


def open_lab(inputs: Inputs, weights: Mapping[str, Weights], protocol: Protocol, lookahead: int, timeout_s: float,
             rounding: Path | None = None, proxy: str = "paired", bank: quality.Gaussian | None = None) -> Lab:
    """weights: that are compressed. rounding: see `make_sampler`; proxy, bank: see `Lab`."""
    cluster = inputs.cluster
    distill = cluster.ship(inputs["distill"]) if any(found.file for found in weights.values()) else None
    make = functools.partial(
        make_sampler, cluster.ship(inputs["pretrain_load"] / "teacher"), distill, weights, cluster.ship(inputs["data"]),
        protocol, None if rounding is None else cluster.ship(rounding))
    cluster.prepare(make)
    log = EvaluationLog(RUNS / "evolve" / f"{context(inputs, weights, protocol, rounding, bank is not None)[:16]}.jsonl")
    return Lab(cluster, make, log, lookahead, timeout_s, protocol.images, proxy, bank)


def context(inputs: Inputs, weights: Mapping[str, Weights], protocol: Protocol, rounding: Path | None = None,
            bank: bool = False) -> str:
    """Digest of everything but the recipe that an evaluation depends on: weights, feature net, protocol, code, the bank."""
    import torch
    read = [*files_of(inputs["pretrain_load"] / "teacher"), inputs["data"] / "features_search.safetensors",
            *(inputs["distill"] / found.file for found in weights.values() if found.file),
            *([inputs["pretrain_load"] / "bank.npy"] if bank else []),
            *([] if rounding is None else files_of(rounding)), *(Path(module.__file__) for module in CODE)]
    decides = {name: value for name, value in asdict(protocol).items() if name != "prefix_mb"}
    hashes = [[path.name, hash_file(path)] for path in read]
    named = {name: [found.file, fitness.base_of(found).to_json() if found.tied else None] for name, found in weights.items()}
    return digest([hashes, decides, torch.__version__, integer.available(), named])
