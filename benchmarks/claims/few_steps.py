"""Few steps: what learned solvers and few-step students gain over what anyone would try, in published runs and studies."""

from pathlib import Path

from benchmarks.cache.arms import DIT, UNET
from benchmarks.claims.claim import Outcome, at_least, at_most, claim, report, study, values


def told(root: Path, scale: str, key: str, bar: str) -> Outcome:
    """What the verdict of a published run says of `key`."""
    found = report(root, "report", scale).get(key)
    return Outcome(bar, "-" if found is None else str(found).lower(), found)


@claim("few_steps")
def quick_beats_dull_best(root: Path) -> Outcome:
    return told(root, "quick", "beats_dull_best", "true")


@claim("few_steps")
def quick_goal(root: Path) -> Outcome:
    """The goal of params.yaml, by 1,000 samples."""
    return told(root, "quick", "met", "true")


@claim("few_steps")
def full_goal(root: Path) -> Outcome:
    """The same, by 10,000."""
    return told(root, "full", "met", "true")


@claim("few_steps")
def full_over_dull_best(root: Path) -> Outcome:
    """Images/s of compressed over dull_best's, batch 8, in one interleaved run; dull_best is of equal or better quality."""
    found = report(root, "report", "full").get("gain_over_dull_best")
    return at_least(2.0, [] if found is None else [found], "x")


@claim("few_steps")
def full_over_eager(root: Path) -> Outcome:
    """Images/s of compressed over dense's in eager PyTorch at fp32, batch 8."""
    timings = report(root, "benchmark.timings", "full")
    if not timings:
        return at_least(25.0, [], "x")
    ours, eager = timings["compressed"]["openvino"], timings["dense"]["eager"]
    return at_least(25.0, [ours["b8"]["images_per_s"] / eager["b8"]["images_per_s"]], "x")


def all_of(root: Path, metric: str, count: int) -> list[float]:
    """The values of the study, where there are as many as the claim is of: it is not made from some."""
    found = values(study(root, "few_steps"), metric)
    return found if len(found) >= count else []


@claim("few_steps")
def learned_solver(root: Path) -> Outcome:
    """FID of the learned solver over the best classical one's at the same number of evaluations (5, 6, 8, 10), three teachers,
    upper bound (Holm)."""
    return at_most(0.0, all_of(root, "learned_over_classical_upper95", 4 * 3))


@claim("few_steps")
def student_of_four(root: Path) -> Outcome:
    """FID of a student of 4 evaluations over DPM-Solver++ 2M at 12, upper bound, the worst of three training seeds."""
    return at_most(0.0, all_of(root, "few_4_over_dpm2m_12_upper95", 3))


def gains(root: Path, teacher: str, batch: int) -> list[float]:
    """Images/s of our fastest point over those of the fastest dull one that is not shown to be worse: paired samples, one
    interleaved run."""
    return values([row for row in study(root, "front") if row["teacher"] == teacher], f"gain_over_dull_b{batch}")


@claim("few_steps")
def front_of_the_dit(root: Path) -> Outcome:
    """Gain over the dull front at batch 8."""
    return at_least(2.0, gains(root, DIT, 8), "x")


@claim("few_steps")
def front_of_the_dit_at_batch_1(root: Path) -> Outcome:
    return at_least(1.6, gains(root, DIT, 1), "x")


@claim("few_steps")
def front_of_the_unet(root: Path) -> Outcome:
    return at_least(1.5, gains(root, UNET, 8), "x")


@claim("few_steps")
def composition(root: Path) -> Outcome:
    """FID of 2:4 or units, few steps and int8 together over few steps alone."""
    return at_most(0.03, values(study(root, "few_steps"), "composition_over_few_steps"))
