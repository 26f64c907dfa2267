"""Every claim that the README or a "how good" makes, computed from committed files and printed: id, bar, measured, verdict.

`python -m benchmarks.claims [--only GROUP]`; exit status 1 if a claim falls short. A claim whose file is not
there is "not measured", which is no failure and no pass: nothing is measured here.
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cache import arms
from benchmarks.cache.arms import DIT, FEWEST, OPPONENTS, OURS, SOLVERS, TIMED, Arm, break_even, cells, finalists
from benchmarks.cache.compare import LEAST
from benchmarks.search.curves import SEEDS, curves, shares
from benchmarks.sparsity.queue import queue
from tasks.core.artifacts import read_json

GROUPS = ("spine", "sparsity", "cache", "search", "runtime", "operations", "models")
EXEMPT = ("profile", "benchmark", "report")  # stages that hold what a clock said


@dataclass(frozen=True)
class Outcome:
    bar: str
    measured: str
    holds: bool | None  # None: not measured

    @property
    def word(self) -> str:
        return {True: "holds", False: "falls short", None: "not measured"}[self.holds]


@dataclass(frozen=True)
class Claim:
    group: str
    name: str
    check: Callable[[Path], Outcome]  # given the top of the repository

    @property
    def id(self) -> str:
        return f"{self.group}.{self.name}"


CLAIMS: list[Claim] = []


def claim(group: str) -> Callable:
    """Register a function of the repository's top as the claim `<group>.<function's name>`."""
    assert group in GROUPS

    def register(check: Callable[[Path], Outcome]) -> Callable[[Path], Outcome]:
        CLAIMS.append(Claim(group, check.__name__, check))
        return check

    return register


# ---- what a claim is made of ----

def at_least(bar: float, found: list[float], unit: str = "") -> Outcome:
    """The smallest one decides."""
    return compared(f">= {bar:g}{unit}", min(found, default=None), unit, lambda value: value >= bar)


def at_most(bar: float, found: list[float], unit: str = "") -> Outcome:
    """The largest one decides."""
    return compared(f"<= {bar:g}{unit}", max(found, default=None), unit, lambda value: value <= bar)


def compared(bar: str, value: float | None, unit: str, holds: Callable[[float], bool]) -> Outcome:
    return Outcome(bar, "-", None) if value is None else Outcome(bar, f"{value:.4g}{unit}", holds(value))


def report(root: Path, name: str) -> dict:
    """A committed report; {} where there is none yet."""
    path = root / "reports" / f"{name}.json"
    return read_json(path) if path.exists() else {}


def study(root: Path, name: str) -> list[dict]:
    """The rows of a study's results.csv; none where it has not run."""
    path = root / "benchmarks" / name / "results.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def values(rows: list[dict], metric: str) -> list[float]:
    """Of every machine and variant on which it was measured."""
    return [float(row["value"]) for row in rows if row["metric"] == metric]


# ---- spine ----

@claim("spine")
def teacher_class_accuracy(root: Path) -> Outcome:
    """A classifier of the real train split agrees with the label of 1,000 samples (50 steps, guidance 1) or more."""
    cards = [read_json(path) for path in sorted((root / "tasks" / "pretrain_load" / "teachers").glob("*/card.json"))]
    return at_least(0.95, [card["class_accuracy"] for card in cards if "class_accuracy" in card and card["samples"] >= 1000
                           and card["sampling_steps"] == 50])


@claim("spine")
def teacher_file_size(root: Path) -> Outcome:
    sizes = [path.stat().st_size / 1e6 for path in (root / "tasks" / "pretrain_load" / "teachers").rglob("*.safetensors")]
    return at_most(5, sizes, " MB")


@claim("spine")
def make_run(root: Path) -> Outcome:
    """The slower of two clean runs on 2 cores, after installation."""
    return at_most(480, values(study(root, "spine"), "make_run_s"), " s")


@claim("spine")
def second_make_run(root: Path) -> Outcome:
    return at_most(20, values(study(root, "spine"), "make_run_again_s"), " s")


@claim("spine")
def noop_repro(root: Path) -> Outcome:
    return at_most(3, values(study(root, "spine"), "noop_repro_s"), " s")


@claim("spine")
def make_test(root: Path) -> Outcome:
    """In a fresh clone, installation included."""
    return at_most(600, values(study(root, "spine"), "make_test_s"), " s")


@claim("spine")
def same_hashes(root: Path) -> Outcome:
    """Two clean runs that choose from one profile agree on every out of every stage that holds no timing."""
    same = [row for row in study(root, "spine") if row["metric"] == "same_outs" and row["variant"] not in EXEMPT]
    other = sorted({row["variant"] for row in same if float(row["value"]) != 1})
    measured = f"{len(same) - len(other)} of {len(same)}{': not ' if other else ''}{', '.join(other)}" if same else "-"
    return Outcome("all stages but profile, benchmark, report", measured, not other if same else None)


@claim("spine")
def checkout_restores(root: Path) -> Outcome:
    """`dvc checkout` after `rm -rf artifacts` leaves nothing to recompute."""
    return at_least(1, values(study(root, "spine"), "checkout_restores"))


@claim("spine")
def clean_after_noop(root: Path) -> Outcome:
    return at_least(1, values(study(root, "spine"), "clean_after_noop"))


@claim("spine")
def verdict_is_said(root: Path) -> Outcome:
    """Whatever the verdict is, the committed report has one."""
    found = report(root, "report")
    said = [key for key in ("met", "beats_dull_best") if isinstance(found.get(key), bool)]
    measured = ", ".join(f"{key} {str(found[key]).lower()}" for key in said) or "-"
    return Outcome("met and beats_dull_best are said", measured, len(said) == 2 if found else None)


# ---- sparsity ----

def measured(root: Path, variant: str, metric: str, seed: str = "0") -> dict[str, float]:
    """Teacher -> value, of the study of sparsity."""
    return {row["teacher"]: float(row["value"]) for row in study(root, "sparsity")
            if (row["variant"], row["metric"], row["seed"]) == (variant, metric, seed)}


def on_both(*parts: dict[str, float]) -> list[float]:
    """The values where every part has one of both teachers: a claim of all is not made from some."""
    return [value for part in parts for value in part.values()] if all(len(part) == 2 for part in parts) else []


def not_worse(root: Path, variant: str, seeds: str) -> Outcome:
    """95 % bound of the FID increase over dense trained as long (seed 0) and over the teacher as it came: the worse decides."""
    return at_most(0.05, on_both(measured(root, variant, "loss_to_dense_upper95"),
                                 measured(root, variant, "loss_to_teacher_upper95", seeds)))


@claim("sparsity")
def two_four_quality(root: Path) -> Outcome:
    """2:4 in every layer that takes it, three training seeds."""
    return not_worse(root, "long.ours", "all")


@claim("sparsity")
def two_four_fidelity(root: Path) -> Outcome:
    """Distance to the teacher's images: one-shot 2:4 over ours, trained as long as in profile full."""
    one_shot, ours = (measured(root, variant, "fidelity") for variant in ("baselines.one_shot", "long.ours"))
    return at_least(10, on_both({teacher: one_shot[teacher] / ours[teacher] for teacher in one_shot.keys() & ours}), "x")


@claim("sparsity")
def plateau(root: Path) -> Outcome:
    """FID increase of a training of half the steps over the full one: what the second half still brings."""
    return at_most(0.05, on_both(measured(root, "baselines.ours_half", "loss_to_ours")))


@claim("sparsity")
def units_speed(root: Path) -> Outcome:
    """40 % of the MACs of feed-forwards or of resnets' convolutions removed: measured speed of the whole model over what the
    MACs predict, on both backends."""
    predicted = measured(root, "units.unit_as_uniform", "speedup_predicted")
    return at_least(0.9, on_both(*({teacher: speed / predicted[teacher] for teacher, speed in
                                    measured(root, "units.unit_as_uniform", f"speedup_{backend}").items()}
                                   for backend in ("eager", "openvino"))))


@claim("sparsity")
def units_quality(root: Path) -> Outcome:
    """One training seed."""
    return not_worse(root, "units.unit_as_uniform", "0")


@claim("sparsity")
def blocks_beat_one_density(root: Path) -> Outcome:
    """95 % bound of the FID increase of units chosen block by block over one density for all: equal steps, no more MACs."""
    kept, kept_uniform = (measured(root, f"units.{arm}", "macs_share") for arm in ("unit_as_uniform", "unit_uniform"))
    fair = all(kept[teacher] <= kept_uniform[teacher] + 0.001 for teacher in kept.keys() & kept_uniform)
    return at_most(0, on_both(measured(root, "units.unit_as_uniform", "loss_to_unit_uniform_upper95")) if fair else [])


@claim("sparsity")
def step_cost(root: Path) -> Outcome:
    """A step of SR-STE and of ours, the teacher's forward included, over a dense one; masks are measured apart."""
    return at_most(1.5, on_both(*(measured(root, arm, "step_ratio") for arm in ("sr_ste", "ours"))), "x")


@claim("sparsity")
def study_time(root: Path) -> Outcome:
    """All arms of the study on 2 cores."""
    rows = [row for row in study(root, "sparsity") if row["metric"] == "seconds"]
    whole = all(any(task.owns(row) for row in rows) for task in queue())
    return at_most(6, [sum(float(row["value"]) for row in rows) / 3600] if whole else [], " h")


# ---- cache ----

def of_cells(root: Path, metric: str) -> dict[tuple[str, str], float]:
    """(teacher, setting/arm/strength) -> value, of the study of caches."""
    return {(row["teacher"], row["variant"]): float(row["value"]) for row in study(root, "cache") if row["metric"] == metric}


def is_whole(found: Iterable[tuple[str, str]], wanted: Sequence[Arm], solvers: Sequence[str] = SOLVERS,
             teachers: Sequence[str] = arms.TEACHERS) -> bool:
    """Is every strength of these arms there, on every teacher that has them, under every setting?"""
    return {(cell.teacher, cell.variant) for cell in cells()
            if cell.arm in wanted and cell.solver in solvers and cell.teacher in teachers} <= set(found)


@claim("cache")
def nearer_than_every_opponent(root: Path) -> Outcome:
    """Our plan against every strength of every opponent that removes something and no more than any of ours, at the opponent's
    own share of sublayer evaluations: smaller distance to the uncached run, paired, p < 0.05 after Holm's correction within a
    setting."""
    bar = "every opponent's strengths, all settings"
    if not is_whole(of_cells(root, "removed_share"), (*OPPONENTS, arms.arm(OURS))):
        return Outcome(bar, "-", None)
    found = of_cells(root, "behind_p_holm")
    if not compared_cells(root) <= found.keys():
        return Outcome(bar, "-", None)
    other = [variant.split("/")[1] for (_, variant), p in found.items() if p >= 0.05]
    names = ", ".join(f"{name} ({other.count(name)})" for name in sorted(set(other)))
    return Outcome(bar, f"{len(found) - len(other)} of {len(found)}{': not ' if other else ''}{names}", not other)


def compared_cells(root: Path) -> set[tuple[str, str]]:
    """Those of opponents that remove something, and no more than ours at most does under the same setting."""
    removed = of_cells(root, "removed_share")
    most: dict[tuple[str, str], float] = {}
    for cell in cells():
        if cell.arm.name == OURS:
            setting = cell.teacher, cell.setting
            most[setting] = max(most.get(setting, 0), removed.get((cell.teacher, cell.variant), 0))
    return {(cell.teacher, cell.variant) for cell in cells() if cell.arm in OPPONENTS
            and LEAST <= removed.get((cell.teacher, cell.variant), 0) <= most[cell.teacher, cell.setting]}


@claim("cache")
def speed_of_skipped_work(root: Path) -> Outcome:
    """Measured speed of our plan at batch 8 over what the MACs that are left predict: the slowest of all budgets, numbers of
    steps and backends, on the DiT under DDIM."""
    predicted = of_cells(root, "speedup_predicted")
    ours = arms.arm(OURS)
    shares = []
    for backend in ours.backends:
        speeds = {cell: speed for cell, speed in of_cells(root, f"speedup_{backend}").items()
                  if cell[0] == DIT and f"/{OURS}/" in cell[1]}
        if not is_whole(speeds, [ours], [TIMED], [DIT]):
            return at_least(0.9, [])
        shares += [speed / predicted[cell] for cell, speed in speeds.items()]
    return at_least(0.9, shares)


@claim("cache")
def list_never_seen(root: Path) -> Outcome:
    """At 50 steps, of which the error table knows 20: distance of the best plan that it and rules propose, over the nearer
    of those trained for the list: ours, searched and trained, and the router's."""
    fidelity = of_cells(root, "fidelity")
    ratios = []
    for cell in cells():
        if (cell.teacher, cell.nfe, cell.arm.name) == (DIT, 50, "table"):
            rivals = [name for name in (OURS, "router") if cell.value in arms.arm(name).values]
            trained = [fidelity.get((DIT, cell.variant.replace("/table/", f"/{name}/"))) for name in rivals]
            found = [fidelity.get((DIT, cell.variant)), *trained]
            ratios.append(None if None in found else found[0] / min(trained))
    return at_most(1.1, ratios if None not in ratios else [], "x")


@claim("cache")
def router_time(root: Path) -> Outcome:
    """Training Learning-to-Cache's router for 20 steps, on 2 cores."""
    return at_most(90, list(of_cells(root, "router_s").values()), " s")


@claim("cache")
def break_even_is_said(root: Path) -> Outcome:
    """From which numbers of steps of DPM-Solver++ a quarter is better saved by the cache than by taking fewer of them: smaller
    distance to the images of 50 steps."""
    found = of_cells(root, "converged_distance")
    if not {(cell.teacher, cell.variant) for cell in break_even()} <= found.keys():
        return Outcome("said", "-", None)
    pays = [nfe for nfe in FEWEST if found[DIT, f"dpm2m{nfe}/{OURS}/{arms.SAVED:g}"] <
            found[DIT, f"dpm2m{nfe}/fewer_steps/{arms.SAVED:g}"]]
    return Outcome("said", f"pays at {', '.join(map(str, pays)) or 'none'} of {', '.join(map(str, FEWEST))} steps", True)


@claim("cache")
def half_of_fewer_steps(root: Path) -> Outcome:
    """On the DiT, at 25 % (20 steps) and 40 % (50 steps) removed: distance to the uncached run over that of the same solver
    taking proportionally fewer steps."""
    fidelity = of_cells(root, "fidelity")
    pairs = [(cell.teacher, cell.variant, cell.variant.replace(f"/{OURS}/", "/fewer_steps/")) for cell in finalists()]
    there = all({(teacher, ours), (teacher, fewer)} <= fidelity.keys() for teacher, ours, fewer in pairs)
    return at_most(0.5, [fidelity[teacher, ours] / fidelity[teacher, fewer] for teacher, ours, fewer in pairs] if there else [])


@claim("cache")
def quality_of_finalists(root: Path) -> Outcome:
    """There, and that much is removed: 95 % bound of the FID increase over the uncached run."""
    bounds = of_cells(root, "loss_upper95")
    wanted = [(cell.teacher, cell.variant) for cell in finalists()]
    removed = of_cells(root, "removed_share")
    if any(removed.get((cell.teacher, cell.variant), 0) < cell.value - 1e-6 for cell in finalists()):
        return at_most(0.05, [])
    return at_most(0.05, [bounds[cell] for cell in wanted] if set(wanted) <= bounds.keys() else [])


# ---- search ----

def fewer_evaluations(root: Path, opponent: str, bar: float) -> Outcome:
    """Of the opponent's N evaluations, what ours needs for the hypervolume (fresh noise) that it has at its end: worst seed."""
    found = shares(curves(study(root, "search")), opponent)
    return at_most(bar, found if len(found) == len(SEEDS) else [])


@claim("search")
def efficiency_random(root: Path) -> Outcome:
    """Random search, given the same seeds, repair and prior of steps."""
    return fewer_evaluations(root, "random", 1 / 3)


@claim("search")
def efficiency_tmpq(root: Path) -> Outcome:
    """TMPQ-DM's own evolution."""
    return fewer_evaluations(root, "tmpq_dm", 1 / 2)


@claim("search")
def efficiency_optuna(root: Path) -> Outcome:
    """Optuna's NSGA-II."""
    return fewer_evaluations(root, "optuna", 1 / 2)


def of_search(root: Path, variant: str, metric: str) -> list[float]:
    """Of all rows of the study of search whose variant begins like this."""
    return values([row for row in study(root, "search") if row["variant"].startswith(variant)], metric)


@claim("search")
def workers_busy(root: Path) -> Outcome:
    """64 workers, evaluations that sleep 0.25 s."""
    return at_least(0.95, of_search(root, "scale.", "workers_busy"))


@claim("search")
def driver_time(root: Path) -> Outcome:
    """There: what an evaluation takes of the driver's time, asking and logging included."""
    return at_most(3, of_search(root, "scale.", "driver_ms"), " ms")


@claim("search")
def log_growth(root: Path) -> Outcome:
    """Time and memory of 100,000 logged evaluations and of reading their log, over ten times those of 10,000: the worst."""
    found = [of_search(root, "scale.", f"growth_{name}") for name in ("search_s", "search_mib", "read_s", "read_mib")]
    return at_most(1.1, [max(one) for one in found] if all(found) else [], "x")


@claim("search")
def two_workers(root: Path) -> Outcome:
    """What a second worker brings, over what a second process of matrix products brings in the same run."""
    return at_least(0.9, of_search(root, "scale.", "gain_share"))


@claim("search")
def evaluation_cost(root: Path) -> Outcome:
    """An evaluation over a plain one of equal samples, the dearer of the targets; both give the same fitness to 1e-5."""
    same = of_search(root, "evaluation.", "fitness_difference")
    return at_most(1 / 3, of_search(root, "evaluation.", "evaluation_ratio") if same and max(same) <= 1e-5 else [])


@claim("search")
def precision_switch(root: Path) -> Outcome:
    """Every layer of the model to another width."""
    return at_most(1, of_search(root, "evaluation.switch", "switch_ms"), " ms")


# ---- the command ----

def table(claims: list[Claim], root: Path) -> tuple[str, bool]:
    """-> the lines to print, and whether none falls short."""
    outcomes = [(c.id, o.bar, o.measured, o.word) for c in claims for o in [c.check(root)]]
    rows = [("claim", "bar", "measured", ""), *outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
    return "\n".join(lines), all(word != "falls short" for *_, word in outcomes)


def main(arguments: list[str] | None = None, root: Path = Path(".")) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=GROUPS, help="one group of claims")
    only = parser.parse_args(arguments).only
    text, good = table([c for c in CLAIMS if only in (None, c.group)], root)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
