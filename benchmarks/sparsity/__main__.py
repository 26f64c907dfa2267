"""The study of sparsity: every arm on both teachers, hours of training.
`python -m benchmarks.sparsity [--only PART] [--teacher NAME] [--further] [--device cuda] [--list]`

Numbers go to results.csv as they are had; a stopped study goes on where it was, and any number of processes share the work, an
arm each. Students, samples' features and checkpoints lie below runs/sparsity.
"""

import argparse
import contextlib
import fcntl
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import results
from benchmarks.sparsity import choice, compare, study
from benchmarks.sparsity.arms import HALF, LAYERS, OURS, PARTS_OF_OURS, STEPS, UNIT, key
from benchmarks.sparsity.lab import Bench, Lab, device_of, open_lab
from benchmarks.sparsity.plot import draw
from benchmarks.sparsity.queue import TEACHERS, WIDE, Task, everything, queue, seeds_of
from benchmarks.sparsity.shapes import model_of
from tasks.core.quality import paired_distance

WORK, RESULTS = Path("runs/sparsity"), Path(__file__).parent / "results.csv"
BESIDE_OURS = {arm.name for arm in (HALF, LAYERS, *PARTS_OF_OURS)}  # what is compared with ours
SECONDS = ("seconds", "resumed_seconds", "wall_seconds", "host_seconds")  # an arm that has one of them is done
UNITS_S, MAO_S = 30, 5  # of timing on each backend


def run(tasks: list[Task], labs: dict[str, Lab], device: str) -> None:
    """Until all are done, or other processes have what is left."""
    started, finished = time.monotonic(), 0
    while due := [task for task in tasks if not done(task)]:
        for task in due:
            with own_work(task) as free:
                if free and not done(task):
                    finish(task, opened(task.teacher, labs, device))
                    break
        else:
            print(f"{len(due)} of {len(tasks)} arms are in work elsewhere", flush=True)
            return
        finished += 1
        left = (time.monotonic() - started) / finished * (len(due) - 1)
        print(f"{task.teacher} {task.variant} seed {task.seed}: done; {len(due) - 1} of {len(tasks)} arms left, "
              f"about {left / 60:.0f} min", flush=True)


def finish(task: Task, lab: Lab) -> None:
    on_cpu, begun = device_of(lab.teacher).type == "cpu", study.is_begun(task.arm, lab, task.seed)
    before, began = study.choice_seconds(task.arm, lab), time.process_time()
    numbers = study.measure(task.arm, lab, task.seed, task.samples)
    numbers["resumed_seconds" if begun else "seconds" if on_cpu else "host_seconds"] = before + time.process_time() - began
    for same in (twin for twin in twins(task) if twin == task or not done(twin)):
        found = rows(same, numbers, "" if on_cpu else f"; on {torch.cuda.get_device_name()}")
        results.replace(RESULTS, same.owns, found + (speeds(same, lab) if on_cpu else []))


def twins(task: Task) -> list[Task]:
    """Tasks of the same arm, which are done together; itself among them."""
    return [other for other in everything() if features_of(other) == features_of(task)]


@contextlib.contextmanager
def own_work(task: Task) -> Iterator[bool]:
    """Whether no other process has the arm in work: by a lock that ends with the process that holds it, not by the file."""
    path = WORK / task.teacher / "in_work" / key(task.arm, task.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def speeds(task: Task, lab: Lab) -> list[dict]:
    """Rows of what speed is measured of."""
    if not timed_s(task):
        return []
    found = rows(task, compare.speed(lab, task.arm, study.kept_masks(task.arm, lab, lab.teacher), timed_s(task)))
    return [row | {"protocol": f"{timed_on()}; {row['protocol']}"} for row in found]


def timed_s(task: Task) -> float:
    """0: no speed is measured. It is of the first seed's units that are trained long, and of all grains of Mao et al."""
    if task.seed != 0:
        return 0
    return MAO_S if task.part == "mao" else UNITS_S if (task.part, task.arm.grain) == ("long", "unit") else 0


def timed_on() -> str:
    """The part of a protocol that all timings share."""
    return f"{results.machine()}; batch {compare.TIMED_BATCH}; interleaved"


def time_again(tasks: list[Task], labs: dict[str, Lab]) -> None:
    """Speeds of the arms that are done and of a network with wider layers, on a machine that does nothing else."""
    for task in tasks:
        if timed_s(task) and done(task):
            found = speeds(task, opened(task.teacher, labs))
            results.replace(RESULTS, lambda row, of=task: of.owns(row) and row["metric"].startswith("speedup_"), found)
    if any(task.part == "long" for task in tasks):
        wide = Bench(name=WIDE, teacher=model_of(WIDE))
        found = compare.speed(wide, UNIT, study.masks_of(UNIT, wide, wide.teacher), UNITS_S)
        renew(plain_rows(WIDE, f"long.{UNIT.name}", found, f"{timed_on()}; random weights"))


def done(task: Task) -> bool:
    """Under these settings, on whatever machine: an arm whose settings changed is due again."""
    return any(task.owns(row) and row["metric"] in SECONDS and row["protocol"].startswith(task.protocol)
               for row in results.read(RESULTS))


def opened(teacher: str, labs: dict[str, Lab], device: str = "cpu") -> Lab:
    if teacher not in labs:
        labs[teacher] = open_lab(teacher, WORK, device)
    return labs[teacher]


def rows(task: Task, numbers: dict[str, float], where: str = "") -> list[dict]:
    return plain_rows(task.teacher, task.variant, numbers, task.protocol + where, task.seed)


def plain_rows(teacher: str, variant: str, numbers: dict[str, float], protocol: str, seed: int = 0) -> list[dict]:
    return [{"teacher": teacher, "variant": variant, "seed": seed, "metric": metric, "value": f"{value:.6g}",
             "protocol": protocol} for metric, value in numbers.items()]


def compare_plans(teachers: Iterable[str], labs: dict[str, Lab]) -> None:
    """What blocks are chosen by: plans as wholes, before training. Minutes."""
    said = f"untrained; {choice.WHOLE_IMAGES} images, DDIM {STEPS} uniform; the seed is that of their noise"
    for teacher in teachers:
        renew([row for name, found in choice.plan_errors(opened(teacher, labs)).items() for noise, value in enumerate(found)
               for row in plain_rows(teacher, f"plans.{name}", {"strays": value}, said, noise)])


def compare_all(tasks: list[Task], labs: dict[str, Lab]) -> None:
    """Every arm against the teacher as it came and against its bases, or in int8 against itself; then its training seeds
    together. Minutes.

    Of arms whose samples are not here, as on a machine that trained none, the rows stay as they are.
    """
    here = [task for task in tasks if features_of(task).exists() and (not task.arm.int8 or features_of(task, "-int8").exists())]
    renew([row for task in here for row in rows(task, compared(task, here, opened(task.teacher, labs)))])
    renew(pooled(results.read(RESULTS)))


def renew(found: list[dict]) -> None:
    """In the place of rows of the same name."""
    def name(row: dict) -> tuple:
        return row["teacher"], row["variant"], str(row["seed"]), row["metric"]

    names = set(map(name, found))
    results.replace(RESULTS, lambda row: name(row) in names, found)


def compared(task: Task, judged: list[Task], lab: Lab) -> dict[str, float]:
    own = np.load(features_of(task))
    if task.arm.int8:
        return {"int8_distance": paired_distance(np.load(features_of(task, "-int8")), own) / study.fidelity_unit(lab)}
    dense = study.teacher_features(lab, STEPS, task.samples, task.seed)
    numbers = compare.against(dense, "teacher", lab, own)
    for base in bases(task, judged):
        other = np.load(features_of(base))
        numbers |= compare.against(other, base.arm.name, lab, own)
        numbers |= compare.named(f"straying_over_{base.arm.name}", compare.straying(other[:len(own)], dense, own))
    return numbers


def pooled(found: list[dict]) -> list[dict]:
    """found: rows of the study. -> rows of comparisons over several training seeds, where each of them has one."""
    tasks = {(task.teacher, task.variant): task for task in everything() if seeds_of(task)}
    value = {(*name, row["seed"], row["metric"]): float(row["value"]) for row in found
             if (name := (row["teacher"], row["variant"])) in tasks and row["protocol"].startswith(tasks[name].protocol)}
    made = []
    for (teacher, variant), task in tasks.items():
        seeds = [str(seed) for seed in seeds_of(task)]
        for metric in sorted({name[3] for name in value if name[:2] == (teacher, variant) and is_comparison(name[3])}):
            of_seeds = [[value.get((teacher, variant, seed, one)) for seed in seeds] for one in (metric, f"{metric}_upper95")]
            if all(one is not None for several in of_seeds for one in several):
                several = compare.over_seeds(*of_seeds, shared=metric.startswith("loss_to_"))
                protocol = f"{task.protocol}; over seeds {', '.join(seeds)}"
                made += [row | {"seed": "all", "protocol": protocol} for row in rows(task, compare.named(metric, several))]
    return made


def is_comparison(metric: str) -> bool:
    return metric.startswith(("loss_to_", "straying_over_")) and not metric.endswith("_upper95")


def bases(task: Task, judged: list[Task]) -> list[Task]:
    """`dense` trained as long; `ours`, of its variants; one density for all blocks, of one chosen for each. Of twins one."""
    def is_base(base: Task) -> bool:
        return (base.arm.name == "dense" and task.arm.method and base.arm.steps == task.arm.steps
                or (base.part, base.arm.name) == (task.part, OURS.name) and task.arm.name in BESIDE_OURS
                or (base.variant, task.variant) == ("blocks.one_density", "blocks.chosen"))

    found = {base.arm.name: base for base in judged if (base.teacher, base.seed) == (task.teacher, task.seed)
             and base.samples >= task.samples and features_of(base) != features_of(task) and is_base(base)}
    return list(found.values())


def features_of(task: Task, of: str = "") -> Path:
    """Of its samples. of: -int8, of those in int8."""
    return WORK / task.teacher / "features" / f"{key(task.arm, task.seed)}{of}-{task.samples}.npy"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=sorted({task.part for task in everything()}), help="one part of the study")
    parser.add_argument("--teacher", choices=TEACHERS, help="one teacher")
    parser.add_argument("--further", action="store_true", help="and what goes past 2 cores and hours")
    parser.add_argument("--device", default="cpu", help="that trains and samples, such as cuda")
    parser.add_argument("--list", action="store_true", help="say what there is to do, do nothing")
    parser.add_argument("--compare", action="store_true", help="compare the arms that are done, train none")
    parser.add_argument("--plot", action="store_true", help="draw curves.png of what there is, do nothing else")
    parser.add_argument("--speed", action="store_true", help="time the arms that are done once more, train none")
    parser.add_argument("--plans", action="store_true", help="compare what blocks can be chosen by, train none")
    asked = parser.parse_args(arguments)
    tasks = [task for task in (everything() if asked.further else queue())
             if asked.only in (None, task.part) and asked.teacher in (None, task.teacher)]
    if not tasks:
        sys.exit(f"error: --only {asked.only}: nothing of it is asked for without --further"
                 + (f" on {asked.teacher}" if asked.teacher else ""))
    if asked.list:
        for task in tasks:
            print(f"{task.teacher} {task.variant} seed {task.seed}: {task.protocol}")
        return
    labs: dict[str, Lab] = {}
    try:
        if asked.plot:
            draw(results.read(RESULTS), RESULTS.with_name("curves.png"))
            return
        if asked.speed:
            time_again(tasks, labs)
            return
        if asked.plans:
            compare_plans([asked.teacher] if asked.teacher else TEACHERS, labs)
            return
        if not asked.compare:
            run(tasks, labs, asked.device)
        if asked.compare or all(done(task) for task in tasks):
            compare_all([task for task in everything() if done(task)], labs)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
