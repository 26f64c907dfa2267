"""The study of sparsity: every arm on both teachers, hours of training. `python -m benchmarks.sparsity [--only PART] [--list]`.

Numbers go to results.csv as they are had; a stopped study goes on where it was. Students, samples' features and checkpoints lie
below runs/sparsity.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks import results
from benchmarks.sparsity import compare, study
from benchmarks.sparsity.arms import STEPS
from benchmarks.sparsity.lab import Lab, open_lab
from benchmarks.sparsity.queue import SAMPLES, SEEDS, Task, queue

WORK, RESULTS = Path("runs/sparsity"), Path(__file__).parent / "results.csv"
TIMED_S = {"units": 30, "mao": 5}  # s of timing on each backend


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
        results.write(RESULTS, [row for row in results.read(RESULTS) if not task.owns(row)])
        results.append(RESULTS, rows(task, numbers | {"seconds": time.monotonic() - began}))
        left = (time.monotonic() - started) / (place + 1) * (len(due) - place - 1)
        print(f"{task.teacher} {task.variant} seed {task.seed}: done; {len(due) - place - 1} arms left, "
              f"about {left / 60:.0f} min", flush=True)


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
    """Every arm against `dense` of its seed and against the teacher as it came; blocks chosen one by one against all alike;
    half of the steps against all. Made anew each time: minutes."""
    judged = [task for task in tasks if task.part != "mao"]
    found = []
    for teacher, seed in dict.fromkeys((task.teacher, task.seed) for task in judged):
        lab = opened(teacher, labs)
        group = {task.arm.name: task for task in judged if (task.teacher, task.seed) == (teacher, seed)}
        features = {name: compare.features_of(lab, task.arm, seed, task.samples) for name, task in group.items()}
        bases = features | {"teacher": study.teacher_features(lab, STEPS, SAMPLES, seed)}
        for base, names in (("teacher", [*group]), ("dense", [*group]), ("unit_uniform", ["unit_as_uniform"]),
                            ("ours", ["ours_half"])):
            if base in bases:
                ours = {name: features[name] for name in names if name in group and name != base}
                losses = compare.against(bases[base], base, lab, ours)
                found += [row for name, numbers in losses.items() for row in rows(group[name], numbers)]
    kept = [row for row in results.read(RESULTS) if not row["metric"].startswith("loss_to_")]
    results.write(RESULTS, [*kept, *found, *over_seeds(found)])


def over_seeds(found: list[dict]) -> list[dict]:
    """Of arms with all SEEDS: one difference to each base."""
    values = {(row["teacher"], row["variant"], row["metric"], row["seed"]): float(row["value"]) for row in found}
    pooled = []
    for teacher, variant, metric in dict.fromkeys(key[:3] for key in values if not key[2].endswith("_upper95")):
        if all((teacher, variant, metric, seed) in values for seed in SEEDS):
            difference = compare.over_seeds(*([values[teacher, variant, name, seed] for seed in SEEDS]
                                              for name in (metric, f"{metric}_upper95")))
            pooled += [{"teacher": teacher, "variant": variant, "seed": "all", "metric": name, "value": f"{value:.6g}",
                        "protocol": f"over seeds {', '.join(map(str, SEEDS))}"} for name, value in
                       ((metric, difference.estimate), (f"{metric}_upper95", difference.upper95))]
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
