"""The study of sparsity: every arm on both teachers, hours of training. `python -m benchmarks.sparsity [--only PART] [--list]`.

Numbers go to results.csv as they are had; a stopped study goes on where it was. Students, samples' features and checkpoints lie
below runs/sparsity.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.sparsity import compare, study
from benchmarks.sparsity.arms import BASELINES, COMMON, FINALISTS, HALF, MAO, UNITS, Arm
from benchmarks.sparsity.lab import Lab, open_lab

TEACHERS = ("mnist_dit", "mnist_unet")
WORK, RESULTS = Path("runs/sparsity"), Path(__file__).parent / "results.csv"
SAMPLES, FEW = 10_000, 2000  # of an arm whose quality is claimed, and of Mao's study


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
    for part, arms in (("baselines", (*BASELINES, *HALF)), ("units", UNITS)):
        for teacher in TEACHERS:
            yield from (Task(part=part, teacher=teacher, arm=arm, seed=0, samples=SAMPLES) for arm in arms)
    for teacher in TEACHERS:
        yield from (Task(part="baselines", teacher=teacher, arm=arm, seed=seed, samples=SAMPLES)
                    for seed in (1, 2) for arm in BASELINES if arm.name in FINALISTS)
    yield from (Task(part="mao", teacher="mnist_dit", arm=arm, seed=0, samples=FEW) for arm in MAO)


def run(tasks: list[Task]) -> None:
    labs: dict[str, Lab] = {}
    done = {(row["teacher"], row["variant"], row["seed"]) for row in results.read(RESULTS)}
    due = [task for task in tasks if (task.teacher, task.variant, str(task.seed)) not in done]
    print(f"{len(tasks)} arms, {len(tasks) - len(due)} of them done", flush=True)
    started = time.monotonic()
    for place, task in enumerate(due):
        if task.teacher not in labs:
            labs[task.teacher] = open_lab(task.teacher, WORK)
        began = time.monotonic()
        numbers = study.measure(task.arm, labs[task.teacher], task.seed, task.samples)
        if task.part == "units":
            numbers |= compare.speed(labs[task.teacher], task.arm, task.seed, numbers["macs_share"])
        results.append(RESULTS, rows(task, numbers | {"seconds": time.monotonic() - began}))
        left = (time.monotonic() - started) / (place + 1) * (len(due) - place - 1)
        print(f"{task.teacher} {task.variant} seed {task.seed}: done; {len(due) - place - 1} arms left, "
              f"about {left / 60:.0f} min", flush=True)
    compare_all(tasks, labs)


def rows(task: Task, numbers: dict[str, float]) -> list[dict]:
    return [{"teacher": task.teacher, "variant": task.variant, "seed": task.seed, "metric": metric, "value": f"{value:.6g}",
             "protocol": task.protocol} for metric, value in numbers.items()]


def compare_all(tasks: list[Task], labs: dict[str, Lab]) -> None:
    """Every arm against `dense` of its seed, units block by block against units all alike. Made anew each time: minutes."""
    found, judged = [], [task for task in tasks if task.samples == SAMPLES]
    for teacher, seed in dict.fromkeys((task.teacher, task.seed) for task in judged):
        lab = labs.setdefault(teacher, open_lab(teacher, WORK))
        group = {task.arm.name: task for task in judged if (task.teacher, task.seed) == (teacher, seed)}
        for base, names in (("dense", [name for name in group if name != "dense"]), ("unit_uniform", ["unit_searched"])):
            if base in group and group.keys() >= set(names):
                losses = compare.against(base, lab, names, seed, SAMPLES)
                found += [row for name, numbers in losses.items() for row in rows(group[name], numbers)]
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
    asked = parser.parse_args(arguments)
    tasks = [task for task in queue() if asked.only in (None, task.part)]
    if asked.list:
        for task in tasks:
            print(f"{task.teacher} {task.variant} seed {task.seed}: {task.protocol}")
        return
    try:
        run(tasks)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
