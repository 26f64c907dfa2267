"""The study of few steps: learned solvers, a student of four evaluations, what it keeps under compression, and losses.
`python -m benchmarks.few_steps [--only PART] [--teacher NAME] [--seeds 1 2] [--few] [--list] [--table]`

Numbers go to results.csv as they are had; a stopped study goes on where it was.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import results
from benchmarks.few_steps import losses, solvers, students, table
from benchmarks.few_steps.lab import FEW, FULL, PRECISION, Lab, Sizes, open_lab
from tasks.core.quality import fid_name
from tasks.pretrain_load.stage import TEACHERS

HOME, WORK = Path(__file__).parent, Path("runs/few_steps")
README = HOME / "README.md"
PARTS = ("solvers", "student", "composition", "losses")
COMPRESSED = ((None, students.INTEGERS), ("2:4", PRECISION), ("2:4", students.INTEGERS), ("unit", PRECISION),
              ("unit", students.INTEGERS))  # masks, precision
BOTH = tuple(students.variant(grain, students.INTEGERS) for grain in ("2:4", "unit"))
TOGETHER = "composition_over_few_steps"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is measured in one go. measure -> variant -> metric -> value."""

    part: str
    variant: str
    done: str  # the metric that says so
    measure: Callable[[Lab], Mapping[str, Mapping[str, float]]]
    seed: int = 0


def jobs(lab: Lab, seeds: Iterable[int]) -> list[Job]:
    """In the order in which they are carried out."""
    found = [Job(part="solvers", variant=f"learned_{nfe}", done=fid_name(lab.sizes.samples),
                 measure=partial(solvers.beside, nfe=nfe)) for nfe in solvers.NUMBERS]
    trained = [seed for seed in (0, *seeds) if seed or students.ships(lab)]
    found += [Job(part="student", variant=students.NAME, seed=seed, done=fid_name(lab.sizes.samples),
                  measure=partial(over_more_steps, seed=seed)) for seed in trained]
    if students.ships(lab):
        found += [Job(part="composition", variant=students.variant(*pair), done="over_few_steps",
                      measure=partial(over_few_steps, grain=pair[0], token=pair[1])) for pair in COMPRESSED]
    return found + [Job(part="losses", variant=f"{loss}_{nfe}", done=fid_name(lab.sizes.loss_samples),
                        measure=partial(of_loss, loss=loss, nfe=nfe)) for nfe in losses.NUMBERS for loss in losses.LOSSES]


def over_more_steps(lab: Lab, seed: int) -> Mapping[str, Mapping[str, float]]:
    return {students.NAME: students.over_more_steps(lab, seed)}


def over_few_steps(lab: Lab, grain: str | None, token: str) -> Mapping[str, Mapping[str, float]]:
    return {students.variant(grain, token): students.over_few_steps(lab, grain, token)}


def of_loss(lab: Lab, loss: str, nfe: int) -> Mapping[str, Mapping[str, float]]:
    return {f"{loss}_{nfe}": losses.judged(lab, loss, nfe)}


def said(lab: Lab, job: Job) -> str:
    """The protocol of a job's rows."""
    sizes = lab.sizes
    judged = (f"{PRECISION}, OpenVINO; judged by {len(lab.judge.features)} real images on the report net; {sizes.resamples} "
              "resamples")
    how = {"solvers": f"spacings chosen on {sizes.fewer} of the samples that judge; learned in {lab.how.steps} steps of batch "
                      f"{lab.how.batch}, {sizes.noises} noises; Holm over all solvers and the numbers up to this one",
           "student": "the shipped student" if job.seed == 0 else f"{sizes.student_steps} steps, {sizes.student_noises} noises",
           "composition": f"{sizes.adapt_steps} steps of batch {sizes.adapt_batch} under masks, units {students.UNITS:g} kept; "
                          "precisions of all layers; over few_4",
           "losses": f"{sizes.minutes:g} minutes of CPU each, batch {losses.SIZE}, {sizes.noises} noises"}
    return f"{how[job.part]}; {judged}"


class Study:
    """Rows and labs of one study, full or few."""

    def __init__(self, few: bool):
        self.sizes: Sizes = FEW if few else FULL
        self.work = WORK / "few" if few else WORK
        self.results = self.work / "results.csv" if few else HOME / "results.csv"

    def has(self, lab: Lab, job: Job) -> bool:
        return any((row["teacher"], row["variant"], row["metric"], row["seed"]) == (lab.name, job.variant, job.done,
                                                                                    str(job.seed))
                   for row in results.read(self.results))

    def run(self, lab: Lab, due: list[Job]) -> None:
        started = time.monotonic()
        for place, job in enumerate(due):
            began = time.monotonic()
            self.put(lab, job, job.measure(lab))
            due_still = len(due) - place - 1
            left = (time.monotonic() - started) / (place + 1) * due_still
            print(f"{lab.name} {job.part} {job.variant}: done in {time.monotonic() - began:.0f} s; {due_still} left, about "
                  f"{left / 60:.0f} min", flush=True)

    def put(self, lab: Lab, job: Job, found: Mapping[str, Mapping[str, float]]) -> None:
        """In the place of rows of the same name."""
        rows = [{"teacher": lab.name, "variant": variant, "seed": job.seed, "metric": metric, "value": f"{value:.6g}",
                 "protocol": said(lab, job)} for variant, numbers in found.items() for metric, value in numbers.items()]
        names = {(row["variant"], row["metric"], str(row["seed"])) for row in rows}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        results.replace(self.results, lambda row: row["teacher"] == lab.name and (
            row["variant"], row["metric"], row["seed"]) in names, rows)

    def conclude(self, lab: Lab) -> None:
        """`composition_over_few_steps`: of masks of both kinds in int8 the one that is better on the held noises."""
        value = {(row["variant"], row["metric"]): float(row["value"]) for row in results.read(self.results)
                 if row["teacher"] == lab.name}
        if all((variant, "held_loss") in value for variant in BOTH):
            best = min(BOTH, key=lambda variant: value[variant, "held_loss"])
            job = Job(part="composition", variant=best, done=TOGETHER, measure=dict)
            results.replace(self.results, lambda row: (row["teacher"], row["metric"]) == (lab.name, TOGETHER), ())
            self.put(lab, job, {best: {TOGETHER: value[best, "over_few_steps"]}})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_steps", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="one part of the study")
    parser.add_argument("--teacher", choices=sorted(path.name for path in TEACHERS.iterdir() if path.is_dir()),
                        help="one teacher")
    parser.add_argument("--seeds", type=int, nargs="*", default=(), help="train students of these seeds, an hour each")
    parser.add_argument("--few", action="store_true", help="a trial in minutes, below runs/few_steps/few")
    parser.add_argument("--table", action="store_true", help="write the README's tables of the rows, do nothing else")
    parser.add_argument("--list", action="store_true", help="say what there is to do, do nothing")
    asked = parser.parse_args(arguments)
    study = Study(asked.few)
    if asked.table:
        README.write_text(table.replaced(README.read_text(), results.read(study.results)))
        return
    try:
        for name in [asked.teacher] if asked.teacher else sorted(path.name for path in TEACHERS.iterdir() if path.is_dir()):
            lab = open_lab(name, study.work, study.sizes)
            due = [job for job in jobs(lab, asked.seeds) if asked.only in (None, job.part) and not study.has(lab, job)]
            if asked.list:
                print(*(f"{name} {job.part} {job.variant} seed {job.seed}: {job.done}" for job in due), sep="\n")
                continue
            study.run(lab, due)
            study.conclude(lab)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
