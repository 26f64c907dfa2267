"""The study of caches."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.cache import arms
from benchmarks.cache.arms import (
    DIT,
    FEWEST,
    OPPONENTS,
    OURS,
    TIMED,
    UNSEEN,
    Arm,
    Cell,
    break_even,
    cells,
    finalists,
    further,
    timed,
    trained,
    unseen,
)
from benchmarks.cache.compare import DECIDED, LEAST, left_open
from benchmarks.claims.claim import Outcome, at_least, at_most, claim, study

SIDE_BY_SIDE = ("seconds", "seconds_further", "seconds_unseen", "seconds_judging", "seconds_converged")


def of_cells(root: Path, metric: str) -> dict[tuple[str, str], float]:
    """(teacher, setting/arm/strength) -> value, of the study of caches."""
    return {(row["teacher"], row["variant"]): float(row["value"]) for row in study(root, "cache") if row["metric"] == metric}


def is_whole(found: Iterable[tuple[str, str]], wanted: Sequence[Arm]) -> bool:
    """Is every strength of these arms there, on every teacher that has them, under every setting?"""
    return {(cell.teacher, cell.variant) for cell in cells() if cell.arm in wanted} <= set(found)


@claim("cache")
def nearer_than_every_opponent(root: Path) -> Outcome:
    """Our plan against every strength of every opponent that removes something and no more than any of ours, at the opponent's
    own share of sublayer evaluations: smaller distance to the uncached run, paired, p < 0.025 after Holm's correction within a
    setting, by the first pairs or by further ones."""
    bar = "every opponent's strengths, all settings"
    if not is_whole(of_cells(root, "removed_share"), (*OPPONENTS, arms.arm(OURS))):
        return Outcome(bar, "-", None)
    found, further = of_cells(root, "behind_p_holm"), of_cells(root, "behind_further_p_holm")
    if not compared_cells(root) <= found.keys():
        return Outcome(bar, "-", None)
    other = [cell[1].split("/")[1] for cell, p in found.items() if min(p, further.get(cell, 1)) >= DECIDED]
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
    return slowest(root, [cell for cell in timed_of_ours() if cell.teacher == DIT])


@claim("cache")
def speed_of_skipped_work_on_the_unet(root: Path) -> Outcome:
    """The same on the UNet, at 20 steps."""
    return slowest(root, [cell for cell in timed_of_ours() if cell.teacher != DIT])


def timed_of_ours() -> list[Cell]:
    return [cell for cell in cells() if (cell.solver, cell.arm.name) == (TIMED, OURS)]


@claim("cache")
def speed_of_finalists(root: Path) -> Outcome:
    """The same at the budgets whose quality is claimed."""
    return slowest(root, [cell for cell in finalists() if cell.solver == TIMED])


def slowest(root: Path, wanted: Sequence[Cell]) -> Outcome:
    """Of these cells, on every backend that ours is timed on."""
    predicted = of_cells(root, "speedup_predicted")
    names, shares = [(cell.teacher, cell.variant) for cell in wanted], []
    for backend in arms.arm(OURS).backends:
        speeds = of_cells(root, f"speedup_{backend}")
        if not set(names) <= speeds.keys():
            return at_least(0.9, [])
        shares += [speeds[name] / predicted[name] for name in names]
    return at_least(0.9, shares)


@claim("cache")
def list_never_seen(root: Path) -> Outcome:
    """At 50 steps, of which the error table knows 20: distance of the plan that the table has by itself, weights included, over
    that of ours, searched and trained for the list. By 1,000 pairs that judge nothing else."""
    fidelity = of_cells(root, "fidelity_unseen")
    wanted = [(cell.teacher, cell.variant) for cell in unseen()]
    if not set(wanted) <= fidelity.keys():
        return at_most(1.1, [], "x")
    table, own = (f"/{name}/" for name in UNSEEN)
    return at_most(1.1, [fidelity[teacher, variant] / fidelity[teacher, variant.replace(table, own)]
                         for teacher, variant in wanted if table in variant], "x")


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


def remove_enough(root: Path) -> bool:
    """Whether the finalists skip the share that they are claimed at."""
    removed = of_cells(root, "removed_share")
    return all(removed.get((cell.teacher, cell.variant), 0) >= cell.value - 1e-6 for cell in finalists())


@claim("cache")
def half_of_fewer_steps(root: Path) -> Outcome:
    """On the DiT, at 25 % (20 steps) and 40 % (50 steps) removed: distance to the uncached run over that of the same solver
    taking proportionally fewer steps."""
    fidelity = of_cells(root, "fidelity")
    pairs = [(cell.teacher, cell.variant, cell.variant.replace(f"/{OURS}/", "/fewer_steps/")) for cell in finalists()]
    there = remove_enough(root) and all((teacher, name) in fidelity for teacher, *both in pairs for name in both)
    return at_most(0.5, [fidelity[teacher, ours] / fidelity[teacher, fewer] for teacher, ours, fewer in pairs] if there else [])


@claim("cache")
def quality_of_finalists(root: Path) -> Outcome:
    """There: 95 % bound of the FID increase over the uncached run."""
    bounds = of_cells(root, "loss_upper95")
    wanted = {(cell.teacher, cell.variant) for cell in finalists()}
    there = remove_enough(root) and wanted <= bounds.keys()
    return at_most(0.05, [bounds[cell] for cell in wanted] if there else [])


@claim("cache")
def study_time(root: Path) -> Outcome:
    """The whole study on 2 cores. Samples are drawn on one of them, so those parts run two at a time; what is timed has
    both."""
    again = further(left_open(study(root, "cache")))
    parts = {"seconds": cells(), "seconds_further": again, "seconds_unseen": unseen(), "seconds_judging": finalists(),
             "seconds_converged": break_even(), "seconds_timing": timed(), "router_s": trained()}
    spent = {metric: of_cells(root, metric) for metric in parts}
    if not all({(cell.teacher, cell.variant) for cell in wanted} <= spent[metric].keys() for metric, wanted in parts.items()):
        return at_most(3, [])
    seconds = {metric: sum(found.values()) / (2 if metric in SIDE_BY_SIDE else 1) for metric, found in spent.items()}
    return at_most(3, [sum(seconds.values()) / 3600], " h")
