"""The study of sparsity."""

from pathlib import Path

from benchmarks.claims.claim import Outcome, at_least, at_most, claim, study
from benchmarks.sparsity.queue import queue


def measured(root: Path, variant: str, metric: str, seed: str = "0") -> dict[str, float]:
    """Teacher -> value, of the study of sparsity."""
    return {row["teacher"]: float(row["value"]) for row in study(root, "sparsity")
            if (row["variant"], row["metric"], row["seed"]) == (variant, metric, seed)}


def on_both(*parts: dict[str, float]) -> list[float]:
    """The values where every part has one of both teachers: a claim of all is not made from some."""
    return [value for part in parts for value in part.values()] if all(len(part) == 2 for part in parts) else []


def not_worse(root: Path, variant: str, base: str, seeds: str = "0") -> Outcome:
    """95 % bound of the FID increase."""
    return at_most(0.05, on_both(measured(root, variant, f"loss_to_{base}_upper95", seeds)))


@claim("sparsity")
def two_four_quality(root: Path) -> Outcome:
    """2:4 in every layer that takes it, over the dense model trained as long."""
    return not_worse(root, "long.ours", "dense")


@claim("sparsity")
def two_four_quality_as_it_came(root: Path) -> Outcome:
    """The same over the teacher that was not trained on, which is the better one; three training seeds."""
    return not_worse(root, "long.ours", "teacher", "all")


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
    """There, over the dense model trained as long; one training seed."""
    return not_worse(root, "units.unit_as_uniform", "dense")


@claim("sparsity")
def units_quality_as_it_came(root: Path) -> Outcome:
    """The same over the teacher that was not trained on."""
    return not_worse(root, "units.unit_as_uniform", "teacher")


def beats(root: Path, chosen: str, base: str, budget: str, slack: float) -> Outcome:
    """95 % bounds, in pairs, of the increase in FID and in distance to the teacher's images of places chosen one by one over
    all alike: the worse decides. budget: the metric of which the chosen may take no more, but for `slack`."""
    kept, kept_alike = (measured(root, variant, budget) for variant in (chosen, base))
    fair = all(kept[teacher] <= kept_alike[teacher] + slack for teacher in kept.keys() & kept_alike)
    name = base.rpartition(".")[2]
    bounds = (measured(root, chosen, f"{change}_{name}_upper95") for change in ("loss_to", "straying_over"))
    return at_most(0, on_both(*bounds) if fair else [])


@claim("sparsity")
def blocks_beat_one_density(root: Path) -> Outcome:
    """Units chosen block by block over one density for all: equal steps, no more MACs."""
    return beats(root, "units.unit_as_uniform", "units.unit_uniform", "macs_share", slack=0.001)


@claim("sparsity")
def layers_beat_one_pattern(root: Path) -> Outcome:
    """N:4 chosen layer by layer over 2:4 in every layer: equal steps, no more stored bits."""
    return beats(root, "baselines.ours_as_uniform", "baselines.ours", "storage_share", slack=1e-6)


@claim("sparsity")
def step_cost(root: Path) -> Outcome:
    """A step of SR-STE and of ours, the teacher's forward included, over a dense one; masks are measured apart."""
    return at_most(1.5, on_both(*(measured(root, arm, "step_ratio") for arm in ("sr_ste", "ours"))), "x")


@claim("sparsity")
def study_time(root: Path) -> Outcome:
    """All arms of the study, two at a time, each on one of 2 cores."""
    rows = [row for row in study(root, "sparsity") if row["metric"] == "seconds"]
    whole = all(any(task.owns(row) for row in rows) for task in queue())
    return at_most(6, [sum(float(row["value"]) for row in rows) / 2 / 3600] if whole else [], " h")
