"""The study of sparsity."""

import math
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from benchmarks.claims.claim import Outcome, at_least, at_most, below, claim, study
from benchmarks.sparsity.queue import TEACHERS, Task, everything, queue


def measured(root: Path, variant: str, metric: str, seed: str = "0") -> dict[str, float]:
    """Teacher -> value, of the study of sparsity."""
    return {row["teacher"]: float(row["value"]) for row in study(root, "sparsity")
            if (row["variant"], row["metric"], row["seed"]) == (variant, metric, seed)}


def on_both(*parts: dict[str, float]) -> list[float]:
    """The values where every part has one of both teachers: a claim of all is not made from some."""
    return [value for part in parts for value in part.values()] if all(len(part) == 2 for part in parts) else []


def not_worse(root: Path, variant: str, base: str, seeds: str = "0") -> Outcome:
    """95 % bound of the FID increase."""
    return at_most(0.05, on_both(measured(root, variant, f"loss_to_{base}_upper95", seeds)))


@claim("sparsity")
def two_four_quality(root: Path) -> Outcome:
    """2:4 in every layer that takes it, over the dense model trained as long; three training seeds."""
    return not_worse(root, "long.ours", "dense", "all")


@claim("sparsity")
def two_four_quality_as_it_came(root: Path) -> Outcome:
    """The same over the teacher that was not trained on, which is the better one."""
    return not_worse(root, "long.ours", "teacher", "all")


@claim("sparsity")
def two_four_fidelity(root: Path) -> Outcome:
    """Distance to the teacher's images: one-shot 2:4 over ours, trained as long as in profile full."""
    one_shot, ours = (measured(root, variant, "fidelity") for variant in ("baselines.one_shot", "long.ours"))
    return at_least(10, on_both({teacher: one_shot[teacher] / ours[teacher] for teacher in one_shot.keys() & ours}), "x")


@claim("sparsity")
def plateau(root: Path) -> Outcome:
    """FID increase of a training of half the steps over the full one, 95 % bound: what the second half still brings."""
    return not_worse(root, "baselines.ours_half", "ours")


@claim("sparsity")
def units_speed(root: Path) -> Outcome:
    """At least 40 % of the MACs of feed-forwards or of resnets' convolutions removed, at one density: measured speed of the
    whole model over what the MACs predict, on both backends."""
    predicted = measured(root, "units.unit_uniform", "speedup_predicted")
    return at_least(0.9, on_both(*({teacher: speed / predicted[teacher] for teacher, speed in
                                    measured(root, "units.unit_uniform", f"speedup_{backend}").items()}
                                   for backend in ("eager", "openvino"))))


@claim("sparsity")
def units_quality(root: Path) -> Outcome:
    """There, over the dense model trained as long; three training seeds."""
    return not_worse(root, "long.unit_uniform", "dense", "all")


@claim("sparsity")
def units_quality_as_it_came(root: Path) -> Outcome:
    """The same over the teacher that was not trained on."""
    return not_worse(root, "long.unit_uniform", "teacher", "all")


def beats(root: Path, chosen: str, base: str, budget: str, slack: float, seeds: str = "0") -> Outcome:
    """95 % bounds, in pairs, of the increase in FID and in distance to the teacher's images of places chosen one by one over
    all alike: the worse decides. budget: the metric of which the chosen may take no more, but for `slack`; infinite if so."""
    kept, kept_alike = (measured(root, variant, budget) for variant in (chosen, base))
    fair = all(kept[teacher] <= kept_alike[teacher] + slack for teacher in kept.keys() & kept_alike)
    name = base.rpartition(".")[2]
    bounds = (measured(root, chosen, f"{change}_{name}_upper95", seeds) for change in ("loss_to", "straying_over"))
    return below(0, on_both(*bounds) if fair else [math.inf])


@claim("sparsity")
def blocks_beat_one_density(root: Path) -> Outcome:
    """Units chosen block by block over one density for all: equal steps, no more MACs."""
    return beats(root, "units.unit_as_uniform", "units.unit_uniform", "macs_share", slack=0.001)


@claim("sparsity")
def layers_beat_one_pattern(root: Path) -> Outcome:
    """N:4 chosen layer by layer over 2:4 in every layer: equal steps, no more stored bits, but more MACs; three fresh training
    seeds."""
    return beats(root, "baselines.ours_as_uniform", "baselines.ours", "storage_share", slack=1e-6, seeds="all")


@claim("sparsity")
def step_cost(root: Path) -> Outcome:
    """A step of SR-STE and of ours, the teacher's forward included, over a dense one; masks are measured apart."""
    return at_most(1.5, on_both(*(measured(root, arm, "step_ratio") for arm in ("sr_ste", "ours"))), "x")


@claim("sparsity")
def study_time(root: Path) -> Outcome:
    """All arms with one training seed, two at a time, each on one of 2 cores; setting up and timing is not in it.

    Arms that ran on a GPU or before CPU time was kept count by the rates of the others, a step and a sample.
    """
    rows = study(root, "sparsity")
    seconds = [found for teacher in TEACHERS for found in cpu_seconds(
        rows, *([task for task in tasks() if task.teacher == teacher] for tasks in (queue, everything)))]
    return at_most(6, [] if None in seconds else [sum(seconds) / 2 / 3600], " h")


def cpu_seconds(rows: list[dict], tasks: list[Task], others: list[Task]) -> list[float | None]:
    """Of each task of one teacher: measured, or by rates fitted to all of `others` that are. None: it did not run at all."""
    measured, elsewhere = (first_values(rows, tasks, *metrics) for metrics in (("seconds",), ("host_seconds", "wall_seconds")))
    timed = [(work(task), seconds) for task, seconds in zip(others, first_values(rows, others, "seconds"), strict=True)
             if seconds is not None]
    if not timed:
        return [None] * len(tasks)
    rates, _ = nnls(*(np.array(column, float) for column in zip(*timed, strict=True)))
    return [here if here is not None else None if other is None else float(np.dot(work(task), rates))
            for task, here, other in zip(tasks, measured, elsewhere, strict=True)]


def first_values(rows: list[dict], tasks: list[Task], *metrics: str) -> list[float | None]:
    """The first value of any of the metrics, for each task."""
    values = [[float(row["value"]) for row in rows if row["metric"] in metrics and task.owns(row)] for task in tasks]
    return [one[0] if one else None for one in values]


def work(task: Task) -> tuple[int, int]:
    """Steps of training, samples drawn."""
    return task.arm.steps if task.arm.method else 0, task.samples * (1 + task.arm.int8)
