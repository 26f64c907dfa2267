"""The study of caches: ours, rules and packages beside each other. `python -m benchmarks.cache [--few] [--only PART]`.

Numbers go to results.csv as they are had; a stopped study goes on where it was. It runs in an environment of its own below
runs/cache, which it builds once. `python -m benchmarks.cache plot` draws what there is.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import results
from benchmarks.cache import study
from benchmarks.cache.arms import (
    ARMS,
    CONVERGED,
    OPPONENTS,
    OURS,
    TEACHERS,
    Cell,
    break_even,
    cells,
    finalists,
    further,
    timed,
    trained,
    unseen,
)
from benchmarks.cache.compare import distances, left_open, nearer
from benchmarks.cache.lab import BATCH, FEW, FULL, Lab, Sizes, first_pairs, further_pairs, open_lab
from benchmarks.cache.plot import draw
from benchmarks.environment import Environment

HOME, WORK = Path(__file__).parent, Path("runs/cache")
PARTS = ("fidelity", "further", "unseen", "finalists", "break_even", "router", "speed")
DONE_BY = {"fidelity": "fidelity", "further": "fidelity_further", "unseen": "fidelity_unseen", "finalists": "loss",
           "break_even": "converged_distance", "router": "router_s", "speed": "speedup_eager"}  # the metric that says: done


class Study:
    """Rows, labs and sizes of one study, full or few."""

    def __init__(self, few: bool):
        self.sizes: Sizes = FEW if few else FULL
        self.work = WORK / "few" if few else WORK / "full"
        self.results = self.work / "results.csv" if few else HOME / "results.csv"
        self.plot = self.results.with_name("curves.png")
        self.labs: dict[str, Lab] = {}

    def lab(self, teacher: str) -> Lab:
        if teacher not in self.labs:
            self.labs[teacher] = open_lab(teacher, self.work, self.sizes)
        return self.labs[teacher]

    def rows(self, cell: Cell, numbers: dict[str, float], protocol: str) -> list[dict]:
        return [{"teacher": cell.teacher, "variant": cell.variant, "seed": 0, "metric": metric, "value": f"{value:.6g}",
                 "protocol": protocol} for metric, value in numbers.items()]

    def has(self, cell: Cell, metric: str) -> bool:
        return any((row["teacher"], row["variant"], row["metric"]) == (cell.teacher, cell.variant, metric)
                   for row in results.read(self.results))

    # ---- the parts ----

    def jobs(self, part: str, chosen: Iterable[Cell]) -> list[list[Cell]]:
        """What is measured together and is not there yet."""
        due = [cell for cell in chosen if not self.has(cell, DONE_BY[part])]
        if part == "speed":
            return study.groups(due)
        return [[cell] for cell in due]

    def run(self, part: str, chosen: list[Cell]) -> None:
        jobs, started = self.jobs(part, chosen), time.monotonic()
        for place, job in enumerate(jobs):
            began = time.monotonic()
            self.results.parent.mkdir(parents=True, exist_ok=True)
            results.append(self.results, list(MEASURES[part](self, job, began)))
            left = (time.monotonic() - started) / (place + 1) * (len(jobs) - place - 1)
            print(f"{part} {job[0].teacher} {job[-1].variant}: done in {time.monotonic() - began:.0f} s; "
                  f"{len(jobs) - place - 1} left, about {left / 60:.0f} min", flush=True)

    def fidelity(self, job: list[Cell], began: float) -> Iterator[dict]:
        cell, = job
        numbers = study.straying(cell, self.lab(cell.teacher))
        protocol = f"{self.sizes.pairs} pairs, batch {BATCH}, eager fp32, report net"
        yield from self.rows(cell, numbers | {"seconds": time.monotonic() - began}, protocol)

    def further(self, job: list[Cell], began: float) -> Iterator[dict]:
        cell, = job
        numbers = study.straying_further(cell, self.lab(cell.teacher))
        protocol = f"{self.sizes.further} other pairs, batch {BATCH}, eager fp32, report net"
        yield from self.rows(cell, numbers | {"seconds_further": time.monotonic() - began}, protocol)

    def unseen(self, job: list[Cell], began: float) -> Iterator[dict]:
        cell, = job
        numbers = study.straying_unseen(cell, self.lab(cell.teacher))
        protocol = f"{self.sizes.unseen} pairs, none of the others, batch {BATCH}, OpenVINO fp32, report net"
        yield from self.rows(cell, numbers | {"seconds_unseen": time.monotonic() - began}, protocol)

    def speed(self, job: list[Cell], began: float) -> Iterator[dict]:
        numbers = study.timed(job, self.lab(job[0].teacher))
        protocol = (f"{results.machine()}; whole trajectories of {BATCH} images, in turns with the uncached run, "
                    f"{self.sizes.timed_s:g} s in all")
        for cell in job:
            seconds = {"seconds_timing": (time.monotonic() - began) / len(job)}
            yield from self.rows(cell, numbers[cell.variant] | seconds, protocol)

    def finalists(self, job: list[Cell], began: float) -> Iterator[dict]:
        cell, = job
        numbers = study.judged(cell, self.lab(cell.teacher))
        protocol = f"{self.sizes.finalists} samples, OpenVINO fp32, report net, 9000 unseen digits, paired bootstrap"
        yield from self.rows(cell, numbers | {"seconds_judging": time.monotonic() - began}, protocol)

    def break_even(self, job: list[Cell], began: float) -> Iterator[dict]:
        cell, = job
        numbers = study.to_converged(cell, self.lab(cell.teacher))
        protocol = f"{self.sizes.pairs} pairs, batch {BATCH}, eager fp32, report net, to {CONVERGED.variant}"
        yield from self.rows(cell, numbers | {"seconds_converged": time.monotonic() - began}, protocol)

    def router(self, job: list[Cell], began: float) -> Iterator[dict]:
        cell, = job
        lab = self.lab(cell.teacher)
        yield from self.rows(cell, study.router_time(cell, lab), f"{results.machine()}; {lab.learn.router.steps} steps")

    # ---- the comparison ----

    def compare(self) -> None:
        """Made anew for every teacher and setting whose samples lie in the work folder; those of another machine are kept."""
        self.compare_by(first_pairs(self.sizes), "fidelity", "behind")
        self.compare_by(further_pairs(self.sizes), "fidelity_further", "behind_further")

    def compare_by(self, pairs: range, measure: str, metric: str) -> None:
        """measure: the metric that says that these pairs were sampled. metric: what the comparison's rows are called."""
        measured = [cell for cell in cells() if (cell.arm.name == OURS or cell.arm in OPPONENTS) and self.has(cell, measure)]
        for teacher, setting in dict.fromkeys((cell.teacher, cell.setting) for cell in measured):
            group = [cell for cell in measured if (cell.teacher, cell.setting) == (teacher, setting)]
            missing = [cell for cell in group if not self.path(cell, pairs).exists()]
            if missing:
                print(f"{teacher} {setting}: the samples of {len(missing)} cells are not here; its comparison stays as it was")
            else:
                found = self.compared(group, self.lab(teacher), pairs, metric)
                results.replace(self.results, partial(is_comparison, metric, teacher, setting), found)

    def compared(self, group: list[Cell], lab: Lab, pairs: range, metric: str) -> list[dict]:
        """Rows of one setting; none before ours is measured."""
        removed = {row["variant"]: float(row["value"]) for row in results.read(self.results)
                   if row["teacher"] == lab.name and row["metric"] == "removed_share"}
        base = lab.uncached(group[0].solver, group[0].nfe, pairs)
        points = {cell: (removed[cell.variant], distances(np.load(self.path(cell, pairs)), base) / lab.unit) for cell in group}
        ours = [points[cell] for cell in group if cell.arm.name == OURS]
        others = {cell: points[cell] for cell in group if cell.arm in OPPONENTS}
        if not ours:
            return []
        found = nearer(ours, others, BATCH)
        protocol = (f"against {OURS} at the same removed share, {len(pairs)} pairs, batches as clusters, Holm over "
                    f"{len(found)} cells; {len(others) - len(found)} remove next to nothing or more than any of ours")
        return [row for cell, (behind, p) in found.items()
                for row in self.rows(cell, {metric: behind, f"{metric}_p_holm": p}, protocol)]

    def path(self, cell: Cell, pairs: range) -> Path:
        """Of the features of its samples."""
        return self.work / cell.teacher / "features" / f"{study.features_path(cell, pairs)}.npy"


def is_comparison(metric: str, teacher: str, setting: str, row: Mapping) -> bool:
    return (row["metric"] in (metric, f"{metric}_p_holm") and row["teacher"] == teacher
            and row["variant"].startswith(f"{setting}/"))


MEASURES: dict[str, Callable[[Study, list[Cell], float], Iterator[dict]]] = {part: getattr(Study, part) for part in PARTS}


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__.partition("\n")[0])
    parser.add_argument("command", nargs="?", choices=("run", "compare", "plot"), default="run")
    parser.add_argument("--only", choices=PARTS, help="one part of the study")
    parser.add_argument("--arm", choices=[arm.name for arm in ARMS], help="one arm")
    parser.add_argument("--teacher", choices=TEACHERS, help="one teacher")
    parser.add_argument("--setting", help="one solver and number of steps: ddim20, dpm2m50, ...")
    parser.add_argument("--few", action="store_true", help="a trial in minutes, below runs/cache/few: says nothing of quality")
    parser.add_argument("--list", action="store_true", help="say what there is to do, do nothing")
    return parser.parse_args(arguments)


def wanted(asked: argparse.Namespace, work: Study, part: str) -> list[Cell]:
    """Of the part, those asked for; a trial takes the fewer steps alone."""
    there = {"fidelity": cells, "further": lambda: further(left_open(results.read(work.results))),
             "unseen": unseen, "break_even": break_even, "router": trained, "finalists": finalists, "speed": timed}
    return [cell for cell in there[part]() if cell.nfe <= max(work.sizes.nfes) and asked.arm in (None, cell.arm.name)
            and asked.teacher in (None, cell.teacher) and asked.setting in (None, cell.setting)]


def carry_out(asked: argparse.Namespace) -> None:
    work, parts = Study(asked.few), PARTS if asked.only is None else (asked.only,)
    if asked.command == "plot":
        draw(results.read(work.results), work.plot)
        return
    if asked.list:
        for part in parts:
            for job in work.jobs(part, wanted(asked, work, part)):
                print(part, job[0].teacher, *(cell.variant for cell in job))
        return
    if asked.command == "run":
        Environment("cache").enter(sys.argv[1:])
        for part in parts:
            if part == "further":
                work.compare()  # which says what is left open
            work.run(part, wanted(asked, work, part))
    work.compare()


def main(arguments: list[str] | None = None) -> None:
    try:
        carry_out(parsed(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
