"""The study of the search."""

from pathlib import Path

from benchmarks.claims.claim import Outcome, at_least, at_most, claim, study, values
from benchmarks.search.curves import DULL_SPACINGS, FEW_STEPS, MARGIN, SEEDS, SOLVERS, STRATEGIES, curves, shares

BESIDE = (*(f"efficiency.{name}" for name in STRATEGIES),
          *(f"evaluation.seconds_{part}" for part in ("floor", "supernet", "promotion", "correlation")))  # parts of one thread
ALONE = (*(f"bitops.seconds_{name}" for name in ("equal", "steps5", "steps6")),
         *(f"scale.{part}" for part in ("workers", "log", "two_workers")),
         *(f"evaluation.seconds_{part}" for part in ("cost", "switch")))


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


def last_judged(root: Path, name: str) -> dict[str, float]:
    """Of "dull" the cheapest that is as good as W8A8 at 100 steps; of "tenth" the only one; {} before any was judged."""
    found: dict[int, dict[str, float]] = {}
    for row in study(root, "search"):
        front, _, place = row["variant"].removeprefix("bitops.").partition(".")
        if row["variant"].startswith("bitops.") and front == name:
            found.setdefault(int(place or 0), {})[row["metric"]] = float(row["value"])
    return found[max(found)] if found else {}


def fewer_bitops(bar: float, own: dict[str, float], base: dict[str, float]) -> Outcome:
    """Of the base over ours, where both are as good as W8A8 at 100 steps: 95 % bound of the increase of FID, 20,000 samples."""
    if not own or not base:
        return at_least(bar, [], "x")
    worse = {name: point["loss_upper95"] for name, point in (("ours", own), ("dull", base)) if point["loss_upper95"] > MARGIN}
    if worse:
        said = ", ".join(f"{name} loses up to {bound:.1%}" for name, bound in worse.items())
        return Outcome(f">= {bar:g}x", f"none is as good: {said}", False)
    return at_least(bar, [base["cost"] / own["cost"]], "x")


@claim("search")
def bitops_of_eight_bits(root: Path) -> Outcome:
    """BitOPs of W8A8 at 100 uniform DDIM steps over those of what the search found within a tenth, if that is as good."""
    base = of_search(root, "bitops.w8a8_100", "cost")
    return fewer_bitops(10, last_judged(root, "tenth"), {"cost": base[0], "loss_upper95": 0.0} if base else {})


@claim("search")
def bitops_of_the_dull_front(root: Path) -> Outcome:
    """The same for the cheapest as good of all solvers, spacings, numbers of steps and uniform bits."""
    return fewer_bitops(1.5, last_judged(root, "tenth"), last_judged(root, "dull"))


@claim("search")
def better_at_few_steps(root: Path) -> Outcome:
    """FID of the searched list over that of DDIM and DPM-Solver++ 2M, uniform and log-SNR, at 5 and 6 steps: 95 % bound of the
    relative increase, the worst."""
    found = [bound for steps in FEW_STEPS for bound in of_search(root, f"bitops.steps{steps}.", "loss_upper95")]
    return at_most(0, found if len(found) == len(FEW_STEPS) * len(SOLVERS) * len(DULL_SPACINGS) else [])


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
def study_time(root: Path) -> Outcome:
    """All parts of the study on 2 cores, searches and fresh noise and judging included. What takes one thread and is not timed
    runs two at a time. Not measured where a part went on from what an earlier run had kept: it took longer than its row."""
    rows = [row for row in study(root, "search") if row["metric"] in ("seconds", "seconds_fresh")]
    whole = {row["variant"] for row in rows} >= {*ALONE, *BESIDE}
    seconds = [float(row["value"]) / (2 if row["variant"] in BESIDE else 1) for row in rows]
    if whole and any("earlier run kept" in row["protocol"] for row in rows):
        return Outcome("<= 3 h", f">= {sum(seconds) / 3600:.4g} h", None)
    return at_most(3, [sum(seconds) / 3600] if whole else [], " h")


@claim("search")
def precision_switch(root: Path) -> Outcome:
    """Every layer of the model to another width."""
    return at_most(1, of_search(root, "evaluation.switch", "switch_ms"), " ms")
