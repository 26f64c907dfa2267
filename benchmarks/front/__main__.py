"""The study of the front: what anyone gets, what peers get and what we get, quality against images/s; and the factorial.
`python -m benchmarks.front [time|compare|plot] [--few] [--teacher NAME] [--only PART]`.

Numbers go to results.csv as they are had; a stopped study goes on where it was. It runs in an environment of its own below
runs/front, which it builds once. `time` times all points that were judged, in turns, anew; `compare` renews what follows from
samples and times; `plot` draws what there is.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from benchmarks import results
from benchmarks.cache.arms import TEACHERS
from benchmarks.environment import Environment
from benchmarks.front import compare, selection, study
from benchmarks.front.lab import FEW, FULL, Lab, Sizes, best_samplers, open_lab
from benchmarks.front.plot import draw
from benchmarks.front.points import (
    DENSE,
    PRECISIONS,
    Point,
    at,
    factorial,
    factors,
    heat,
    ours,
    peers,
    steps_of,
)
from tasks.core import quality
from tasks.core.artifacts import read_json, write_json
from tasks.core.params import read_params
from tasks.core.quality import Difference

HOME, WORK = Path(__file__).parent, Path("runs/front")
PARTS = ("heats", "trials", "ours", "finals", "peers", "factorial")


class Study:
    """Rows and labs of one study, full or few."""

    def __init__(self, few: bool):
        self.sizes: Sizes = FEW if few else FULL
        self.work = WORK / "few" if few else WORK / "full"
        self.results = self.work / "results.csv" if few else HOME / "results.csv"
        self.labs: dict[str, Lab] = {}

    def lab(self, teacher: str) -> Lab:
        if teacher not in self.labs:
            self.labs[teacher] = open_lab(teacher, self.work, self.sizes)
        return self.labs[teacher]

    def rows(self, teacher: str, variant: str, numbers: Mapping[str, float], protocol: str) -> list[dict]:
        return [{"teacher": teacher, "variant": variant, "seed": 0, "metric": metric, "value": f"{value:.6g}",
                 "protocol": protocol} for metric, value in numbers.items()]

    def values(self, teacher: str, metric: str, group: str = "") -> dict[str, float]:
        """Variant -> value, as far as there are rows."""
        return {row["variant"]: float(row["value"]) for row in results.read(self.results)
                if (row["teacher"], row["metric"]) == (teacher, metric) and row["variant"].startswith(group)}

    def keep(self, rows: list[dict]) -> None:
        self.results.parent.mkdir(parents=True, exist_ok=True)
        results.append(self.results, rows)

    @property
    def trial(self) -> str:
        """The metric of few samples."""
        return quality.fid_name(self.sizes.trial)

    def best(self, teacher: str) -> dict[int, str]:
        return best_samplers(results.read(self.results), teacher, self.trial)

    # ---- the parts ----

    def run(self, part: str, teacher: str) -> None:
        began = time.monotonic()
        getattr(self, part)(teacher)
        print(f"{part} {teacher}: done in {time.monotonic() - began:.0f} s", flush=True)

    def heats(self, teacher: str) -> None:
        """All dull solvers and spacings of each number of steps, few images."""
        done = self.values(teacher, "heat_distance")
        for steps in self.sizes.steps:
            points = heat(steps)
            if not {point.name for point in points} <= done.keys():
                found = study.heat_distances(points, self.lab(teacher))
                protocol = f"{self.sizes.heat} pairs, OpenVINO {points[0].precision}, report net"
                self.keep([row for name, distance in found.items()
                           for row in self.rows(teacher, name, {"heat_distance": distance}, protocol)])

    def trials(self, teacher: str) -> None:
        """Those nearest to the converged image, more samples."""
        self.judge_all(teacher, [DENSE, *self.tried(teacher)], self.sizes.trial)

    def tried(self, teacher: str) -> list[Point]:
        distances = self.values(teacher, "heat_distance")
        found = []
        for steps in self.sizes.steps:
            points = {point.name: point for point in heat(steps)}
            there = {name: distances[name] for name in points if name in distances}
            found += [points[name] for name in selection.nearest(there, self.sizes.kept)]
        return found

    def ours(self, teacher: str) -> None:
        self.judge_all(teacher, [DENSE, *ours(teacher)], self.sizes.finals)

    def finals(self, teacher: str) -> None:
        """The best of each number of steps at bf16 and int8, on few samples at fp32: from the fewest steps on, until both are
        not shown to be worse than the best of ours. Those of more steps are slower."""
        n = self.sizes.finals
        for point in self.finalists(teacher):
            both = [point, at(point, "int8")]
            self.judge_all(teacher, both, n)
            self.judge_all(teacher, [at(point, "fp32")], self.sizes.trial)
            fids = self.values(teacher, quality.fid_name(n), "ours/")
            bar = min(fids, key=fids.get, default=DENSE.name)
            lower = {one.name: compare.lower95(self.over(teacher, one.name, bar, n)) for one in both}
            if len(selection.not_worse(lower)) == len(both):
                print(f"{teacher}: {point.name} is as good as {bar}, at int8, too: no dull point of more steps is judged on "
                      f"{n} samples", flush=True)
                return

    def finalists(self, teacher: str) -> list[Point]:
        """By rising steps; none of steps whose best point is clearly worse than dense."""
        fids = self.values(teacher, self.trial)
        points = {point.name: point for point in self.tried(teacher) if point.name in fids}
        groups = selection.by_steps(list(points), {name: steps_of(point) for name, point in points.items()})
        best = [selection.finalist({name: fids[name] for name in names}, fids[DENSE.name])
                for _, names in sorted(groups.items())]
        return [points[name] for name in best if name is not None]

    def peers(self, teacher: str) -> None:
        for point in peers(teacher):
            self.judge_all(teacher, [point], self.sizes.finals if point.backend == "openvino" else self.sizes.trial)

    def factorial(self, teacher: str) -> None:
        self.judge_all(teacher, factorial(teacher), self.sizes.factorial)

    def judge_all(self, teacher: str, points: Iterable[Point], n: int) -> None:
        done = self.values(teacher, quality.fid_name(n))
        for point in points:
            if point.name not in done:
                self.judge(teacher, point, n)

    def judge(self, teacher: str, point: Point, n: int) -> None:
        """What is said of the loss on fewer samples goes."""
        began, lab = time.monotonic(), self.lab(teacher)
        numbers = study.judged(point, lab, n, self.best(teacher)) | {"seconds_judging": time.monotonic() - began}
        protocol = (f"{n} samples, {len(lab.judge.features)} unseen digits, report net, {point.backend}, "
                    f"sampler {self.sampler(teacher, point)}")
        self.results.parent.mkdir(parents=True, exist_ok=True)
        results.replace(self.results, lambda row: (row["teacher"], row["variant"]) == (teacher, point.name)
                        and row["metric"] in numbers, self.rows(teacher, point.name, numbers, protocol))
        print(f"{teacher} {point.name}: {', '.join(f'{name} {value:.4g}' for name, value in numbers.items())}", flush=True)

    def sampler(self, teacher: str, point: Point) -> str:
        return self.best(teacher)[steps_of(point)] if point.sampler.startswith("best_") else point.sampler

    # ---- time ----

    def points(self, teacher: str) -> list[Point]:
        """All that were judged."""
        judged = {row["variant"] for row in results.read(self.results)
                  if row["teacher"] == teacher and row["metric"] == "seconds_judging"}
        dull = [at(point, precision) for point in self.tried(teacher) for precision in PRECISIONS]
        return [point for point in (DENSE, *dull, *peers(teacher), *ours(teacher), *factorial(teacher)) if point.name in judged]

    def time(self, teacher: str) -> None:
        """Anew, all of them in one run; what an earlier run timed is dropped."""
        lab, points = self.lab(teacher), self.points(teacher)
        times = study.timed(points, lab, self.best(teacher))
        write_json(self.times_path(teacher), times)
        rounds = min(map(len, times.values()))
        protocol = f"{results.machine()}; whole trajectories, {len(points)} points in turns, {rounds} rounds or more, median"
        found = {batch: compare.speeds(times, batch) for batch in study.BATCHES}
        rows = [row for point in points for row in self.rows(
            teacher, point.name, {f"images_per_s_b{batch}": found[batch][point.name] for batch in found}, protocol)]
        results.replace(self.results, lambda row: row["teacher"] == teacher and row["metric"].startswith("images_per_s"), rows)

    def times_path(self, teacher: str) -> Path:
        return self.work / teacher / "times.json"

    # ---- the comparison ----

    def compare(self, teacher: str) -> None:
        """Made anew where the times of this machine are there."""
        if not self.times_path(teacher).exists():
            print(f"{teacher}: was not timed on this machine; its comparison stays as it was")
            return
        rows = [*self.gains(teacher), *self.effects(teacher)]
        results.replace(self.results, lambda row: row["teacher"] == teacher and row["metric"].startswith(COMPARED), rows)

    def gains(self, teacher: str) -> Iterator[dict]:
        times, n, margin = read_json(self.times_path(teacher)), self.sizes.finals, read_params()["goal"]["max_quality_loss"]
        equally = self.values(teacher, quality.fid_name(n))
        bounds = {name: bound for name, bound in self.values(teacher, "loss_upper95", "ours/").items() if name in equally}
        dull = {point.name: point for point in self.points(teacher) if point.group == "dull" and point.name in equally}
        for batch in study.BATCHES:
            found = compare.gain(bounds, dull, margin, lambda x, base: self.over(teacher, x, base, n), times, batch)
            if found is None:
                continue
            our, best, numbers, differences = found
            protocol = (f"{n} samples, paired; {len(dull)} dull points; ours: the fastest whose 95 % bound over dense is at "
                        f"most {margin:.0%}, or the one of the least bound")
            yield from self.rows(teacher, f"{our} over {best}", numbers, protocol)
            for name, d in differences.items() if batch == study.BATCHES[0] else ():
                yield from self.rows(teacher, name, {"over_ours": d.estimate, "over_ours_lower95": compare.lower95(d),
                                                     "over_ours_upper95": d.upper95}, f"FID over {our}, {n} samples, paired")

    def over(self, teacher: str, name: str, base: str, n: int) -> Difference:
        points, lab, best = {p.name: p for p in self.points(teacher)}, self.lab(teacher), self.best(teacher)
        return study.difference(lab, *(study.features_of(points[one], lab, n, best) for one in (name, base)))

    def effects(self, teacher: str) -> Iterator[dict]:
        points, lab, best, n = factorial(teacher), self.lab(teacher), self.best(teacher), self.sizes.factorial
        names, times = factors(teacher), read_json(self.times_path(teacher))
        if not {point.name for point in points} <= self.values(teacher, "images_per_s_b8").keys():
            return
        fids, drawn = zip(*(lab.bootstrap.fids(study.features_of(point, lab, n, best)) for point in points), strict=True)
        found = {"effect_log_fid": compare.quality_effects(fids, drawn, names),
                 **{f"effect_log_images_per_s_b{batch}": compare.speed_effects(times, points, names, batch)
                    for batch in study.BATCHES}}
        for metric, terms in found.items():
            for term, numbers in terms.items():
                named = dict(zip((metric, f"{metric}_low95", f"{metric}_high95"), numbers, strict=True))
                yield from self.rows(teacher, f"effect/{term}", named, f"{len(points)} packages, {n} samples each")


COMPARED = ("gain_over_dull", "over_ours", "effect_")


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front", description=__doc__.partition("\n")[0])
    parser.add_argument("command", nargs="?", choices=("run", "time", "compare", "plot"), default="run")
    parser.add_argument("--only", choices=PARTS, help="one part of the study, without times")
    parser.add_argument("--teacher", choices=TEACHERS, help="one teacher")
    parser.add_argument("--few", action="store_true", help="a trial in minutes, below runs/front/few: says nothing of quality")
    return parser.parse_args(arguments)


def carry_out(asked: argparse.Namespace) -> None:
    work = Study(asked.few)
    if asked.command == "plot":
        for teacher in TEACHERS:
            draw(results.read(work.results), teacher, work.results.with_name(f"{teacher}.png"))
        return
    Environment("front").enter(sys.argv[1:])
    for teacher in TEACHERS if asked.teacher is None else (asked.teacher,):
        for part in (PARTS if asked.only is None else (asked.only,)) if asked.command == "run" else ():
            work.run(part, teacher)
        if asked.only is None:
            if asked.command in ("run", "time"):
                work.run("time", teacher)
            work.compare(teacher)


def main(arguments: list[str] | None = None) -> None:
    try:
        carry_out(parsed(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
