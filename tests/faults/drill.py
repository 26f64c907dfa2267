"""A search whose evaluations are cheap, on whatever cluster it is told: importable, so that a worker finds it anywhere.

`python -m tests.faults.drill CLUSTER ROOM MISHAP` searches and writes ROOM/front.json. The log of evaluations is
ROOM/log.jsonl; each evaluation that begins or ends leaves a line in ROOM/calls, whatever becomes of the driver.
CLUSTER: ClusterParams as JSON.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.core.cluster import Cluster, ClusterParams
from tasks.core.recipe import Recipe
from tasks.evolve.lab import EvaluationLog, Lab, key_of
from tasks.evolve.search import Strategy, pareto_front, search

BUDGET, LOOKAHEAD, PAUSE_S = 60, 6, 0.05
HUNG_S, PATIENT_S = 10.0, 600.0  # time limits of an evaluation, where one hangs and where none does: a busy machine is slow
TARGET = (3, 1, 4, 1, 5, 2, 6, 5)
STRATEGY = Strategy(population=20, top=8, random=0.2, crossover=0.2, mutation=0.15)


@dataclass(frozen=True)
class Digits:
    """Eight digits 0..7 that make a list of timesteps; the cost is their sum."""

    bound: float = float("inf")

    def key(self, digits):
        return digits

    def cost(self, digits):
        return float(sum(digits))

    def sample(self, rng):
        return tuple(rng.integers(8, size=8).tolist())

    def mutate(self, parent, probability, rng):
        return tuple(int(rng.integers(8)) if rng.random() < probability else x for x in parent)

    def crossover(self, a, b, rng):
        return tuple(x if rng.random() < 0.5 else y for x, y in zip(a, b, strict=True))

    def recipe(self, digits):
        return Recipe(timesteps=tuple(10 * (8 - i) + digit for i, digit in enumerate(digits)))


def features(digits: Iterable[int]) -> np.ndarray:
    return np.asarray(list(digits), float)[None]


REFERENCES = features(TARGET), features(x + 1 for x in TARGET)


def make_evaluator(room: Path, mishap: str, pause_s: float) -> Callable[[tuple[str, Recipe]], np.ndarray]:
    def evaluate(item: tuple[str, Recipe]) -> np.ndarray:
        key, digits = key_of(*item), [t % 10 for t in item[1].timesteps]
        note(room, "begins", key)
        first = sum(digits) % 5 == 0 and claim(room / "mishap")
        if mishap == "hangs once" and first:
            time.sleep(600)
        if mishap == "crashes" and digits[0] == 0:
            raise RuntimeError(f"cannot begin at {item[1].timesteps[0]}")
        time.sleep(pause_s * (10 if digits[0] == 1 else 1))  # some are slow: others end before their turn
        note(room, "ends", key)
        return features(digits)
    return evaluate


def claim(path: Path) -> bool:
    """Whether this is the first that asks, of all processes."""
    try:
        path.touch(exist_ok=False)
        return True
    except FileExistsError:
        return False


def note(room: Path, what: str, key: str) -> None:
    with open(room / "calls", "a") as file:
        file.write(f"{what} {key} {os.getpid()}\n")


def calls(room: Path, what: str) -> list[str]:
    """Keys of the evaluations that began or ended, in that order."""
    path = room / "calls"
    return [line.split()[1] for line in path.read_text().splitlines() if line.startswith(what)] if path.exists() else []


def hunt(params: ClusterParams, room: Path, mishap: str, pause_s: float = PAUSE_S) -> dict:
    """mishap: none | hangs once | crashes. -> front and failures, as JSON."""
    space, cluster = Digits(), Cluster(params)
    make = functools.partial(make_evaluator, room, mishap, pause_s)
    lab = Lab(cluster, make, EvaluationLog(room / "log.jsonl"), LOOKAHEAD,
              HUNG_S if mishap == "hangs once" else PATIENT_S)

    def evaluate(asked):
        return lab.distances(REFERENCES, (("teacher", space.recipe(c)) for c in asked), BUDGET, "drill")

    try:
        told = search(space, evaluate, np.random.default_rng(0), BUDGET, STRATEGY)
    finally:
        cluster.close()
    return {"front": [[list(e.candidate), e.cost, e.loss] for e in pareto_front(told)], "evaluations": len(told),
            "failures": sorted(set(lab.failures.values()))}


if __name__ == "__main__":
    given, room, mishap = sys.argv[1:]
    found = hunt(ClusterParams(**json.loads(given)), Path(room), mishap)
    (Path(room) / "front.json").write_text(json.dumps(found))
