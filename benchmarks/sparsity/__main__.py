"""The study of sparsity: every arm on both teachers, hours of training. `python -m benchmarks.sparsity [--only PART] [--list]`.

Numbers go to results.csv as they are had; a stopped study goes on where it was. Students, samples' features and checkpoints lie
below runs/sparsity.
"""

import argparse
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.sparsity import compare, study
from benchmarks.sparsity.arms import BASELINES, COMMON, FINALISTS, HALF, MAO, UNITS, Arm
from benchmarks.sparsity.lab import Lab, open_lab

TEACHERS = ("mnist_dit", "mnist_unet")
WORK, RESULTS = Path("runs/sparsity"), Path(__file__).parent / "results.csv"
TIMED_S = {"units": 30, "mao": 5}  # s of timing on each backend
SAMPLES, FEW = 10_000, 2000  # of an arm whose quality is claimed, and of the others


@dataclass(frozen=True, kw_only=True)
class Task:
    """One arm on one teacher with one seed."""

    part: str
    teacher: str
    arm: Arm
    seed: int
    samples: int

    @property
    def variant(self) -> str:
        return f"{self.part}.{self.arm.name}"

    @property
    def protocol(self) -> str:
        how = f"{self.arm.steps} steps of batch {COMMON['batch']}" if self.arm.method else "not trained"
        return f"{how}; {self.samples} samples, DDIM {study.STEPS} uniform, report net"


def queue() -> Iterator[Task]:
    """What a claim needs comes first."""
    finalists = [arm for arm in BASELINES if arm.name in FINALISTS]
    others = [arm for arm in BASELINES if arm not in finalists]
    for part, arms, samples, seeds in (("baselines", finalists, SAMPLES, (0,)), ("units", UNITS, SAMPLES, (0,)),
                                       ("baselines", others, FEW, (0,)), ("baselines", HALF, SAMPLES, (0,)),
                                       ("baselines", finalists, SAMPLES, (1, 2))):
        for teacher, seed in itertools.product(TEACHERS, seeds):
            yield from (Task(part=part, teacher=teacher, arm=arm, seed=seed, samples=samples) for arm in arms)
    yield from (Task(part="mao", teacher="mnist_dit", arm=arm, seed=0, samples=FEW) for arm in MAO)


def run(tasks: list[Task], labs: dict[str, Lab]) -> None:
    due = [task for task in tasks if not done(task)]
    print(f"{len(tasks)} arms, {len(tasks) - len(due)} of them done", flush=True)
    started = time.monotonic()
    for place, task in enumerate(due):
        lab = opened(task.teacher, labs)
        began = time.monotonic()
        numbers = study.measure(task.arm, lab, task.seed, task.samples)
        if task.part in TIMED_S:
            numbers |= compare.speed(lab, task.arm, task.seed, numbers["macs_share"], TIMED_S[task.part])
        results.append(RESULTS, rows(task, numbers | {"seconds": time.monotonic() - began}))
        left = (time.monotonic() - started) / (place + 1) * (len(due) - place - 1)
        print(f"{task.teacher} {task.variant} seed {task.seed}: done; {len(due) - place - 1} arms left, "
              f"about {left / 60:.0f} min", flush=True)


def done(task: Task) -> bool:
    return any((row["teacher"], row["variant"], row["seed"]) == (task.teacher, task.variant, str(task.seed))
               for row in results.read(RESULTS))


def opened(teacher: str, labs: dict[str, Lab]) -> Lab:
    if teacher not in labs:
        labs[teacher] = open_lab(teacher, WORK)
    return labs[teacher]


def rows(task: Task, numbers: dict[str, float]) -> list[dict]:
    return [{"teacher": task.teacher, "variant": task.variant, "seed": task.seed, "metric": metric, "value": f"{value:.6g}",
             "protocol": task.protocol} for metric, value in numbers.items()]


def compare_all(tasks: list[Task], labs: dict[str, Lab]) -> None:
    """Every arm against `dense` of its seed, units block by block against units all alike. Made anew each time: minutes."""
    found, judged = [], [task for task in tasks if task.part != "mao"]
    bases = {(task.teacher, task.seed, task.arm.name): task for task in judged}
    for name, members in (("dense", [task for task in judged if task.arm.name != "dense"]),
                          ("unit_uniform", [task for task in judged if task.arm.name == "unit_searched"])):
        groups = defaultdict(list)
        for task in members:
            groups[task.teacher, task.seed, task.samples].append(task)
        for (teacher, seed, samples), group in groups.items():
            if base := bases.get((teacher, seed, name)):
                losses = compare.against(base.arm, opened(teacher, labs), [task.arm for task in group], seed, samples,
                                         base.samples)
                found += [row for task in group for row in rows(task, losses[task.arm.name])]
    kept = [row for row in results.read(RESULTS) if not row["metric"].startswith("loss_to_")]
    results.write(RESULTS, [*kept, *found, *over_seeds(found)])


def over_seeds(found: list[dict]) -> list[dict]:
    """Of arms with several seeds: one difference to `dense`."""
    values = {(row["teacher"], row["variant"], row["metric"], row["seed"]): float(row["value"]) for row in found}
    pooled = []
    for teacher, variant in dict.fromkeys((row["teacher"], row["variant"]) for row in found):
        seeds = [key[3] for key in values if key[:3] == (teacher, variant, "loss_to_dense")]
        if len(seeds) > 1:
            estimates, uppers = ([values[teacher, variant, metric, seed] for seed in seeds]
                                 for metric in ("loss_to_dense", "loss_to_dense_upper95"))
            difference = compare.over_seeds(estimates, uppers)
            pooled += [{"teacher": teacher, "variant": variant, "seed": "all", "metric": metric, "value": f"{value:.6g}",
                        "protocol": f"over seeds {', '.join(map(str, seeds))}"} for metric, value in
                       (("loss_to_dense", difference.estimate), ("loss_to_dense_upper95", difference.upper95))]
    return pooled


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("baselines", "units", "mao"), help="one part of the study")
    parser.add_argument("--list", action="store_true", help="say what there is to do, do nothing")
    parser.add_argument("--compare", action="store_true", help="compare the arms that are done, train none")
    asked = parser.parse_args(arguments)
    tasks = [task for task in queue() if asked.only in (None, task.part)]
    if asked.list:
        for task in tasks:
            print(f"{task.teacher} {task.variant} seed {task.seed}: {task.protocol}")
        return
    labs: dict[str, Lab] = {}
    try:
        if not asked.compare:
            run(tasks, labs)
        compare_all([task for task in queue() if done(task)], labs)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
