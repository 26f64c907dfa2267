"""The study of sparsity."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from benchmarks.claims.claim import Outcome, at_least, at_most, below, claim, study
from benchmarks.sparsity.arms import key
from benchmarks.sparsity.queue import FORTY_PERCENT, TEACHERS, WIDE, Task, everything, queue


def measured(root: Path, variant: str, metric: str, seed: str = "0") -> dict[str, float]:
    """Teacher -> value, of the study of sparsity: what was trained under other settings does not count."""
    return {row["teacher"]: float(row["value"]) for row in study(root, "sparsity")
            if (row["variant"], row["metric"], row["seed"]) == (variant, metric, seed) and is_current(row)}


def is_current(row: dict) -> bool:
    """Whether it is of the settings that the study now asks for; of what is no arm, it is."""
    asked = {task.protocol for task in everything() if (task.teacher, task.variant) == (row["teacher"], row["variant"])}
    return not asked or any(protocol in row["protocol"] for protocol in asked)


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


def of_units(root: Path, metric: str, seed: str = "0") -> dict[str, float]:
    """Of the students without 40 % of the MACs of feed-forwards or of resnets' convolutions: teacher -> value."""
    found = {teacher: measured(root, f"long.{arm.name}", metric, seed) for teacher, arm in FORTY_PERCENT.items()}
    return {teacher: values[teacher] for teacher, values in found.items() if teacher in values}


@claim("sparsity")
def units_speed(root: Path) -> Outcome:
    """40 % of the MACs of feed-forwards or of resnets' convolutions removed: measured speed of the whole model over what the
    MACs predict, on both backends."""
    predicted = of_units(root, "speedup_predicted")
    return at_least(0.9, on_both(*({teacher: speed / predicted[teacher] for teacher, speed in
                                    of_units(root, f"speedup_{backend}").items()}
                                   for backend in ("eager", "openvino"))))


@claim("sparsity")
def units_speed_of_wide_layers(root: Path) -> Outcome:
    """The same at one density on a UNet of 128 and 256 channels, of the shape of DDPM's on CIFAR-10, with random weights."""
    predicted, *speeds = (measured(root, "long.unit_uniform", f"speedup_{metric}").get(WIDE)
                          for metric in ("predicted", "eager", "openvino"))
    return at_least(0.9, [speed / predicted for speed in speeds] if predicted else [])


@claim("sparsity")
def units_quality(root: Path) -> Outcome:
    """There, over the dense model trained as long: 95 % bound of the FID increase; three training seeds."""
    return at_most(0.05, on_both(of_units(root, "loss_to_dense_upper95", "all")))


@claim("sparsity")
def units_quality_at_one_density(root: Path) -> Outcome:
    """The same at one density on both teachers, which removes half from the UNet."""
    return not_worse(root, "long.unit_uniform", "dense", "all")


@claim("sparsity")
def units_quality_as_it_came(root: Path) -> Outcome:
    """40 % removed, over the teacher that was not trained on."""
    return at_most(0.05, on_both(of_units(root, "loss_to_teacher_upper95", "all")))


def beats(root: Path, chosen: str, base: str, budget: str, slack: float) -> Outcome:
    """95 % bounds over training seeds, in pairs, of the increase in FID and in distance to the teacher's images of places
    chosen one by one over all alike: the worse decides. budget: the metric of which the chosen may take no more, but for
    `slack`; infinite if one does."""
    most, least = extremes(root, chosen, budget, max), extremes(root, base, budget, min)
    fair = all(most[teacher] <= least[teacher] + slack for teacher in most.keys() & least)
    name = base.rpartition(".")[2]
    bounds = on_both(most, least) and on_both(*(measured(root, chosen, f"{change}_{name}_upper95", "all")
                                                for change in ("loss_to", "straying_over")))
    return below(0, bounds if fair else [math.inf])


def extremes(root: Path, variant: str, metric: str, pick: Callable[[list[float]], float]) -> dict[str, float]:
    """Teacher -> the picked value of those of all training seeds."""
    seeds = {row["seed"] for row in study(root, "sparsity") if row["variant"] == variant}
    values = [measured(root, variant, metric, seed) for seed in seeds]
    return {teacher: pick([one[teacher] for one in values if teacher in one]) for teacher in set().union(*values)}


@claim("sparsity")
def blocks_beat_one_density(root: Path) -> Outcome:
    """Units and heads chosen block by block over one density for all: equal steps, no more MACs; three training seeds."""
    return beats(root, "blocks.chosen", "blocks.one_density", "macs_share", slack=0.001)


@claim("sparsity")
def layers_beat_one_pattern(root: Path) -> Outcome:
    """N:4 chosen layer by layer over 2:4 in every layer: equal steps, no more stored bits, but more MACs; seven fresh training
    seeds."""
    return beats(root, "layers.ours_as_uniform", "layers.ours", "storage_share", slack=1e-6)


@claim("sparsity")
def step_cost(root: Path) -> Outcome:
    """A step of SR-STE and of ours, the teacher's forward included, over a dense one; masks are measured apart."""
    return at_most(1.5, on_both(*(measured(root, arm, "step_ratio") for arm in ("sr_ste", "ours"))), "x")


@claim("sparsity")
def study_time(root: Path) -> Outcome:
    """All that `queue` asks for, with one training seed, two arms at a time, each on one of 2 cores, an arm of two parts once;
    setting up and timing is not in it, nor is what `further` asks for.

    Arms that ran on a GPU, under other settings, in two goes or before CPU time was kept count by the rates of the others: a
    step, a sample and the choice of what is pruned where.
    """
    rows = study(root, "sparsity")
    spent = [found for teacher in TEACHERS for found in cpu_seconds(
        rows, *([task for task in tasks() if task.teacher == teacher] for tasks in (queue, everything)))]
    if None in spent:
        return at_most(6, [])
    hours = {timed: sum(seconds for seconds, by_clock in spent if by_clock == timed) / 2 / 3600 for timed in (True, False)}
    outcome = at_most(6, [sum(hours.values())], " h")
    return replace(outcome, measured=f"{outcome.measured}, {hours[False]:.2g} h of them by rates")


def cpu_seconds(rows: list[dict], tasks: list[Task], others: list[Task]) -> list[tuple[float, bool] | None]:
    """Of each arm of one teacher's tasks: seconds, and whether they were measured under its settings; if not, they are by rates
    fitted to all of `others` that were. None: it did not run at all, or nothing says a rate of what it does."""
    timed = [(work(task), seconds) for task in others if (seconds := seconds_of(rows, task)) is not None]
    if not timed:
        return [None] * len(tasks)
    done, clock = (np.array(column, float) for column in zip(*timed, strict=True))
    rates, known = nnls(done, clock)[0], done.any(0)

    def found(task: Task) -> tuple[float, bool] | None:
        seconds, asked = seconds_of(rows, task), np.array(work(task))
        if seconds is not None:
            return seconds, True
        if any(task.owns(row) for row in rows) and not asked[~known].any():
            return float(asked @ rates), False
        return None

    return [found(task) for task in {key(task.arm, task.seed): task for task in tasks}.values()]


def seconds_of(rows: list[dict], task: Task) -> float | None:
    """CPU time of the task under its settings."""
    return next((float(row["value"]) for row in rows if row["metric"] == "seconds" and task.owns(row)
                 and row["protocol"].startswith(task.protocol)), None)


def work(task: Task) -> tuple[int, int, int]:
    """Steps of training, samples drawn, and whether places are chosen one by one."""
    return (task.arm.steps if task.arm.method else 0, task.samples * (1 + task.arm.int8), int(task.arm.allocation != "uniform"))
