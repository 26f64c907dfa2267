"""The study of sparsity: every arm on both teachers, hours of training.
`python -m benchmarks.sparsity [--only PART] [--teacher NAME] [--list]`

Numbers go to results.csv as they are had; a stopped study goes on where it was. Students, samples' features and checkpoints lie
below runs/sparsity.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import results
from benchmarks.sparsity import compare, study
from benchmarks.sparsity.arms import STEPS
from benchmarks.sparsity.lab import Lab, open_lab
from benchmarks.sparsity.queue import SAMPLES, SEEDS, TEACHERS, Task, queue
from tasks.core.machine import describe

WORK, RESULTS = Path("runs/sparsity"), Path(__file__).parent / "results.csv"
TIMED_S = {"units": 30, "mao": 5}  # s of timing on each backend


def run(tasks: list[Task], labs: dict[str, Lab]) -> None:
    due = [task for task in tasks if not done(task)]
    print(f"{len(tasks)} arms, {len(tasks) - len(due)} of them done", flush=True)
    started = time.monotonic()
    for place, task in enumerate(due):
        lab = opened(task.teacher, labs)
        began = time.process_time()
        numbers = study.measure(task.arm, lab, task.seed, task.samples)
        timed = speeds(task, lab, numbers["macs_share"])
        found = rows(task, numbers | {"seconds": time.process_time() - began}) + timed
        results.replace(RESULTS, task.owns, found)
        left = (time.monotonic() - started) / (place + 1) * (len(due) - place - 1)
        print(f"{task.teacher} {task.variant} seed {task.seed}: done; {len(due) - place - 1} arms left, "
              f"about {left / 60:.0f} min", flush=True)


def speeds(task: Task, lab: Lab, kept_macs: float) -> list[dict]:
    """Rows of the parts whose speed is measured."""
    if task.part not in TIMED_S:
        return []
    machine = describe()
    where = f"{machine['cores']} cores, {machine['cpu']}; {torch.get_num_threads()} threads; batch {compare.TIMED_BATCH}"
    found = rows(task, compare.speed(lab, task.arm, task.seed, kept_macs, TIMED_S[task.part]))
    return [row | {"protocol": f"{where}; interleaved; {row['protocol']}"} for row in found]


def time_again(tasks: list[Task], labs: dict[str, Lab]) -> None:
    """Speeds of the arms that are done, on a machine that does nothing else."""
    for task in tasks:
        own = [row for row in results.read(RESULTS) if task.owns(row)]
        kept_macs = [float(row["value"]) for row in own if row["metric"] == "macs_share"]
        if task.part in TIMED_S and done(task):
            found = speeds(task, opened(task.teacher, labs), kept_macs[0])
            results.replace(RESULTS, lambda row, of=task: of.owns(row) and row["metric"].startswith("speedup_"), found)


def done(task: Task) -> bool:
    """Under these settings: an arm whose settings changed is due again."""
    return any(task.owns(row) and (row["metric"], row["protocol"]) == ("seconds", task.protocol)
               for row in results.read(RESULTS))


def opened(teacher: str, labs: dict[str, Lab]) -> Lab:
    if teacher not in labs:
        labs[teacher] = open_lab(teacher, WORK)
    return labs[teacher]


def rows(task: Task, numbers: dict[str, float]) -> list[dict]:
    return [{"teacher": task.teacher, "variant": task.variant, "seed": task.seed, "metric": metric, "value": f"{value:.6g}",
             "protocol": task.protocol} for metric, value in numbers.items()]


def compare_all(tasks: list[Task], labs: dict[str, Lab]) -> None:
    """Every arm against the teacher as it came and against its bases, those with all SEEDS over these. Made anew: minutes."""
    judged = [task for task in tasks if task.part != "mao"]
    found = [row for task in judged for row in rows(task, compared(task, judged, opened(task.teacher, labs)))]
    for first in judged:
        alike = [task for task in judged if (task.teacher, task.variant) == (first.teacher, first.variant)]
        if first is alike[0] and len(alike) == len(SEEDS):
            found += pooled(alike, opened(first.teacher, labs))
    kept = [row for row in results.read(RESULTS) if not row["metric"].startswith(("loss_to_", "straying_over_"))]
    results.write(RESULTS, [*kept, *found])


def compared(task: Task, judged: list[Task], lab: Lab) -> dict[str, float]:
    own, dense = features_of(task, lab), study.teacher_features(lab, STEPS, SAMPLES, task.seed)
    numbers = compare.against(dense, "teacher", lab, own)
    for base in judged:
        if is_base(base, task):
            other = features_of(base, lab)
            numbers |= compare.against(other, base.arm.name, lab, own)
            numbers |= compare.straying(other[:len(own)], base.arm.name, dense[:len(own)], own)
    return numbers


def is_base(base: Task, task: Task) -> bool:
    """`dense` trained as long; one density for all blocks or layers, of those chosen one by one; all steps, of half of them."""
    if (base.teacher, base.seed) != (task.teacher, task.seed) or base is task:
        return False
    if base.arm.name == "dense":
        return base.arm.steps == task.arm.steps
    return (base.variant, task.variant) in (("units.unit_uniform", "units.unit_as_uniform"),
                                            *(("baselines.ours", f"baselines.ours_{what}") for what in ("half", "as_uniform")))


def pooled(alike: list[Task], lab: Lab) -> list[dict]:
    """One difference of an arm to the teacher, from all its training seeds."""
    pairs = [(study.teacher_features(lab, STEPS, SAMPLES, task.seed), features_of(task, lab)) for task in alike]
    difference = compare.over_seeds(pairs, lab.judge, lab.strata(SAMPLES))
    numbers = {"loss_to_teacher": difference.estimate, "loss_to_teacher_upper95": difference.upper95}
    protocol = f"{alike[0].protocol.rpartition(';')[0]}; over seeds {', '.join(str(task.seed) for task in alike)}"
    return [row | {"seed": "all", "protocol": protocol} for row in rows(alike[0], numbers)]


def features_of(task: Task, lab: Lab) -> np.ndarray:
    return compare.features_of(lab, task.arm, task.seed, task.samples)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("baselines", "long", "units", "mao"), help="one part of the study")
    parser.add_argument("--teacher", choices=TEACHERS, help="one teacher; a second clone may work on the other")
    parser.add_argument("--list", action="store_true", help="say what there is to do, do nothing")
    parser.add_argument("--compare", action="store_true", help="compare the arms that are done, train none")
    parser.add_argument("--speed", action="store_true", help="time the arms that are done once more, train none")
    asked = parser.parse_args(arguments)
    tasks = [task for task in queue() if asked.only in (None, task.part) and asked.teacher in (None, task.teacher)]
    if asked.list:
        for task in tasks:
            print(f"{task.teacher} {task.variant} seed {task.seed}: {task.protocol}")
        return
    labs: dict[str, Lab] = {}
    try:
        if asked.speed:
            time_again(tasks, labs)
            return
        if not asked.compare:
            run(tasks, labs)
        compare_all([task for task in queue() if done(task)], labs)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
