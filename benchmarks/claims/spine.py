"""The pipeline itself: its teachers, its commands, what a second run does."""

from pathlib import Path

from benchmarks.claims.claim import Outcome, at_least, at_most, claim, report, study, values
from tasks.core.artifacts import read_json

CHOOSING = ("mask_search", "distill", "cache_learn", "evolve", "finish", "package", "fid")  # by a profile; they hold no time


@claim("spine")
def teacher_class_accuracy(root: Path) -> Outcome:
    """A classifier of the real train split agrees with the label of 1,000 samples (50 steps, guidance 1) or more."""
    cards = [read_json(path) for path in sorted((root / "tasks" / "pretrain_load" / "teachers").glob("*/card.json"))]
    conditional = [card for card in cards if "class_accuracy" in card]
    fair = all(card["samples"] >= 1000 and card["sampling_steps"] == 50 for card in conditional)
    return at_least(0.95, [card["class_accuracy"] for card in conditional] if fair else [])


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
    """Two clean runs that choose from one profile agree on every out of every stage that reads it and holds no timing, the
    second run having been killed once in each."""
    rows = [row for row in study(root, "spine") if row["metric"] == "same_outs"]
    same, commits = {row["variant"] for row in rows if float(row["value"]) == 1}, {row["protocol"][-12:] for row in rows}
    bar = f"all stages from {CHOOSING[0]} to {CHOOSING[-1]}"
    if not set(CHOOSING) <= {row["variant"] for row in rows}:
        return Outcome(bar, "-", None)
    other = [stage for stage in CHOOSING if stage not in same]
    return Outcome(bar, f"{'all' if not other else 'not ' + ', '.join(other)} at {', '.join(sorted(commits))}", not other)


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
