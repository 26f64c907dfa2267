"""What a search costs its driver, on workers that only sleep; what its log costs; and what a second worker brings.

`python -m benchmarks.search.scale [workers] [log] [two_workers]`: twenty minutes for all, on 2 cores that do nothing else.
"""

import argparse
import functools
import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import results
from benchmarks.search import gemm
from tasks.core import denoiser as denoisers
from tasks.core.artifacts import RUNS
from tasks.core.cluster import Cluster, ClusterParams
from tasks.core.cost import layer_costs
from tasks.core.machine import describe
from tasks.core.params import read_params, stage_params
from tasks.core.recipe import Recipe, bits
from tasks.core.sampler import network, sample_in_chunks, spaced_timesteps
from tasks.evolve import stage
from tasks.evolve.costs import bitops_share, precision_menus, quantisable
from tasks.evolve.lab import EvaluationLog, Lab
from tasks.evolve.problem import to_recipe
from tasks.evolve.search import Evaluation, Strategy, search
from tasks.evolve.space import Space
from tasks.evolve.weights import Weights

RESULTS, ROOM = Path(__file__).parent / "results.csv", RUNS / "search" / "scale"
TEACHER = Path("tasks/pretrain_load/teachers/mnist_dit")
PARTS = ("workers", "log", "two_workers")
WORKERS, SLEEP_S, EVALUATIONS = 64, 0.25, 6400
AHEAD = 16                   # items asked beyond the last one told, for each worker
LOGGED = (10_000, 100_000)   # evaluations of the shorter and of the longer log
IDLE_S = 5.0                 # for which workers are watched that have nothing to do
ROUNDS, ROUND_S = 7, 6.0     # of the comparison with matrix products; seconds of each of its four parts
BOUND = 0.0125               # of the cost: a tenth of W8A8 at 100 steps, as a share of fp32 at 50
REFERENCES = np.zeros((1, 1)), np.ones((1, 1))  # so that a distance is the feature itself


def cluster_of(workers: int) -> Cluster:
    return Cluster(ClusterParams(address=None, workers=workers, cpus_per_worker=1, gpus_per_worker=0.0, max_attempts=3,
                                 max_object_mb=64, storage_uri=None, connect_timeout_s=25.0, start_timeout_s=600.0))


# ---- the search whose evaluations do nothing ----

def dit_space() -> Space:
    """Timesteps, solver and bits of every layer of the shipped DiT, for the target BitOPs."""
    teacher = denoisers.load(TEACHER)
    costs = layer_costs(teacher)
    layers = tuple(c.name for c in costs if quantisable(c))
    recipe = functools.partial(to_recipe, layers=layers, weights={"teacher": Weights()}, plan=lambda *_: None)
    return Space(horizon=teacher.schedule.steps, steps=(4, 16), menus=precision_menus("bitops", layers, None), cache=(0.0,),
                 solvers=("ddim", "dpm2m"), recipe=recipe, recipe_cost=bitops_share(costs, dense(teacher)), bound=BOUND)


def dense(teacher: denoisers.Denoiser) -> Recipe:
    return Recipe(timesteps=spaced_timesteps(teacher.schedule, 50))


def make_sleeper(seconds: float) -> Callable[[tuple[str, Recipe]], np.ndarray]:
    """Fewer steps and fewer bits are worse, as they are in earnest."""
    def evaluate(item: tuple[str, Recipe]) -> np.ndarray:
        time.sleep(seconds)
        recipe = item[1]
        noise = sum(2.0 ** -sum(bits(token)) for token in recipe.precision.values())
        return np.full((1, 1), 10 / recipe.nfe ** 2 + noise)
    return evaluate


def evolve(lab: Lab, space: Space, budget: int, strategy: Strategy) -> list[Evaluation]:
    def evaluate(asked: Iterable) -> Iterator[float | None]:
        return lab.distances(REFERENCES, ((c.weights, space.recipe(c)) for c in asked), budget, "scale")
    return search(space, evaluate, np.random.default_rng(0), budget, strategy)


def strategy() -> Strategy:
    return stage_params(stage, read_params(scale="full")).strategy


def lab_of(cluster: Cluster, make: Callable, log: str, lookahead: int) -> Lab:
    path = ROOM / f"{log}.jsonl"
    path.unlink(missing_ok=True)
    return Lab(cluster, make, EvaluationLog(path), lookahead, timeout_s=60.0)


# ---- workers: are they busy, and what does the driver take ----

def measure_workers(workers: int, evaluations: int) -> dict[str, float]:
    """The time counts from when every worker is warm to the last result, beginning and end with idle ones included."""
    cluster, make = cluster_of(workers), functools.partial(make_sleeper, SLEEP_S)
    lab, space = lab_of(cluster, make, "workers", AHEAD * workers), dit_space()
    try:
        cluster.warm_workers(make).warm()
        waited = count_waiting(cluster)
        began, began_cpu = time.perf_counter(), time.process_time()
        told = evolve(lab, space, evaluations, strategy())
        wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    finally:
        cluster.close()
    assert len(told) == len(lab.log.known) == evaluations
    return {"workers_busy": evaluations * SLEEP_S / (workers * wall), "driver_ms": 1e3 * (wall - sum(waited)) / evaluations,
            "driver_cpu_ms": 1e3 * cpu / evaluations, "evaluations_per_s": evaluations / wall,
            **measure_unsearched(workers, evaluations)}


def measure_unsearched(workers: int, calls: int) -> dict[str, float]:
    """The same sleeps with nothing to choose, send or log: what a machine cannot do here it cannot do for a search."""
    cluster, make = cluster_of(workers), functools.partial(make_napper, SLEEP_S)
    try:
        cluster.warm_workers(make).warm()
        before, began = cpu_seconds("ray::"), time.perf_counter()
        time.sleep(IDLE_S)
        spent = sum(now - before[pid] for pid, now in cpu_seconds("ray::").items() if pid in before)  # others are just ending
        cores = spent / (time.perf_counter() - began)
        began = time.perf_counter()
        for _ in cluster.map(make, iter(range(calls)), "scale", lookahead=AHEAD * workers):
            pass
        wall = time.perf_counter() - began
    finally:
        cluster.close()
    return {"workers_busy_unsearched": calls * SLEEP_S / (workers * wall), "workers_idle_cores": cores}


def make_napper(seconds: float) -> Callable[[int], None]:
    return lambda _: time.sleep(seconds)


def cpu_seconds(name: str) -> dict[int, float]:
    """Of every process whose name begins so, by its number."""
    import psutil
    found = psutil.process_iter(["name", "cpu_times"])
    times = {one.pid: one.info["cpu_times"] for one in found if (one.info["name"] or "").startswith(name)}
    return {pid: time.user + time.system for pid, time in times.items() if time}


def count_waiting(cluster: Cluster) -> list[float]:
    """-> seconds of every wait for a worker, from now on."""
    waited, wait = [], cluster.workers.wait

    def timed() -> list:
        began = time.perf_counter()
        ready = wait()
        waited.append(time.perf_counter() - began)
        return ready

    cluster.workers.wait = timed
    return waited


# ---- log: time and memory over the number of evaluations ----

class Digits:
    """A space that costs next to nothing, so that what is measured is the search, the driver's loop and the log."""

    bound, length = float("inf"), 24

    def key(self, digits): return digits

    def cost(self, digits): return float(sum(digits))

    def sample(self, rng): return tuple(rng.integers(8, size=self.length).tolist())

    def mutate(self, parent, probability, rng):
        return tuple(np.where(rng.random(self.length) < probability, rng.integers(8, size=self.length), parent).tolist())

    def crossover(self, a, b, rng): return tuple(np.where(rng.random(self.length) < 0.5, a, b).tolist())


def measure_log(evaluations: int) -> dict[str, float]:
    """Of this process: a search of so many evaluations, then its log read anew."""
    import psutil
    memory = psutil.Process().memory_info
    lab, space = lab_of(cluster_of(1), functools.partial(make_sleeper, 0.0), f"log_{evaluations}", 64), Digits()
    space.recipe = lambda digits: Recipe(timesteps=tuple(10 * (space.length - i) + d for i, d in enumerate(digits)))

    def evaluate(asked: Iterable) -> Iterator[float | None]:
        return lab.distances(REFERENCES, (("teacher", space.recipe(c)) for c in asked), evaluations, "scale")

    plain = Strategy(population=50, top=10, random=0.3, crossover=0.2, mutation=0.25)
    search(space, evaluate, np.random.default_rng(1), 200, plain)  # imports and caches are not of the log
    gc.collect()
    before, began = memory().rss, time.perf_counter()
    told = search(space, evaluate, np.random.default_rng(0), evaluations, plain)
    searched, seconds = memory().rss, time.perf_counter() - began
    began = time.perf_counter()
    again = EvaluationLog(lab.log.path)
    read_s, read = time.perf_counter() - began, memory().rss
    assert len(told) == evaluations and again.known == lab.log.known
    return {"search_s": seconds, "search_mib": (searched - before) / 2**20, "read_s": read_s,
            "read_mib": (read - searched) / 2**20}


def measure_growth(sizes: tuple[int, int]) -> dict[str, float]:
    """Each size in a process of its own. growth: what the longer takes over what so many more evaluations should take."""
    short, long = map(in_child, sizes)
    times = sizes[1] / sizes[0]
    found = {f"{name}_{n}": value for n, each in zip(sizes, (short, long), strict=True) for name, value in each.items()}
    return found | {f"growth_{name}": long[name] / (times * short[name]) for name in short}


def in_child(evaluations: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.search.scale", "--log-of", str(evaluations)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


# ---- two workers: what a second one brings, beside two processes of matrix products ----

def make_sampler(folder: Path) -> Callable[[Recipe], np.ndarray]:
    teacher = denoisers.load(folder)

    def sample(recipe: Recipe) -> np.ndarray:
        chunks = sample_in_chunks(network(teacher), teacher.schedule, recipe, teacher.sample_shape, 32, 0, teacher.num_classes,
                                  chunk=32)
        return np.concatenate(list(chunks)).mean(axis=(1, 2, 3))
    return sample


def measure_two_workers(rounds: int, seconds: float) -> dict[str, float]:
    """Interleaved: evaluations by one process and by two workers, products by one process and by two."""
    make, one, two = functools.partial(make_sampler, TEACHER.resolve()), cluster_of(1), cluster_of(2)
    recipe = Recipe(timesteps=spaced_timesteps(denoisers.load(TEACHER).schedule, 10))
    gains: list[tuple[float, float]] = []
    with gemm.processes(2) as raw:
        try:
            list(one.map(make, [recipe] * 2, "scale"))
            two.warm_workers(make).warm()
            for _ in range(rounds):
                ours = rate(two, make, recipe, seconds) / rate(one, make, recipe, seconds)
                gains.append((ours, gemm.rate(raw, seconds) / gemm.rate(raw[:1], seconds)))
        finally:
            two.close()
    return {"gain_workers": median(ours for ours, _ in gains), "gain_gemm": median(gemm for _, gemm in gains),
            "gain_share": median(ours / gemm for ours, gemm in gains)}


def rate(cluster: Cluster, make: Callable, recipe: Recipe, seconds: float) -> float:
    """Evaluations a second; every one that began counts, and the time until the last one ended."""
    began = time.perf_counter()

    def asked() -> Iterator[Recipe]:
        while time.perf_counter() - began < seconds:
            yield recipe

    done = sum(1 for _ in cluster.map(make, asked(), "scale", lookahead=2 * cluster.params.workers))
    return done / (time.perf_counter() - began)


# ---- rows ----

def rows_of(part: str, asked: argparse.Namespace) -> list[dict]:
    machine = describe()
    where = f"{machine['cores']} cores, {machine['cpu']}"
    if part == "workers":
        found = measure_workers(asked.workers, asked.evaluations)
        how = (f"{asked.workers} local workers, {asked.evaluations} evaluations that sleep {SLEEP_S:g} s, "
               f"{AHEAD * asked.workers} asked ahead; search of the shipped DiT's timesteps and bits, strategy of params.yaml")
    elif part == "log":
        found = measure_growth(tuple(asked.logged))
        how = "without workers, evaluations that take no time; a process each"
    else:
        found = measure_two_workers(asked.rounds, asked.round_s)
        how = (f"32 images, 10 steps, fp32, 1 thread; products of 512 x 512 fp32; median of {asked.rounds} rounds of "
               f"{asked.round_s:g} s")
    return [{"teacher": "mnist_dit" if part != "log" else "none", "variant": f"scale.{part}", "seed": 0, "metric": metric,
             "value": round(value, 5), "protocol": f"{where}; {how}"} for metric, value in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search.scale", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all by default")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="of part workers")
    parser.add_argument("--logged", type=int, nargs=2, default=LOGGED, help="evaluations of the two logs of part log")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of part two_workers")
    parser.add_argument("--round-s", type=float, default=ROUND_S, help="seconds of each of its four parts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--log-of", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    ROOM.mkdir(parents=True, exist_ok=True)
    if asked.log_of:
        print(json.dumps(measure_log(asked.log_of)))
        return
    for part in asked.parts or PARTS:
        began = time.monotonic()
        rows = rows_of(part, asked)
        rows.append(rows[0] | {"metric": "seconds", "value": round(time.monotonic() - began, 1)})
        results.replace(asked.results, lambda row, part=part: row["variant"] == f"scale.{part}", rows)
        for row in rows:
            print(f"{row['variant']:18} {row['metric']:24} {row['value']}", flush=True)
    shutil.rmtree(ROOM)


if __name__ == "__main__":
    main()
