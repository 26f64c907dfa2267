"""What the study has to do, in order."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.sparsity.arms import (
    BASELINES,
    COMMON,
    HALF,
    IMPORTANCE,
    LAYERS,
    LONG,
    MAO,
    PARTS_OF_OURS,
    STEPS,
    UNITS,
    Arm,
    key,
)

TEACHERS = ("mnist_dit", "mnist_unet")
SEEDS = (0, 1, 2)            # of the training of finalists; judged on noise of its own each
SAMPLES, FEW = 10_000, 2000  # of an arm whose quality is claimed, and of the others


@dataclass(frozen=True, kw_only=True)
class Task:
    """One arm on one teacher with one seed."""

    part: str
    teacher: str
    arm: Arm
    seed: int
    samples: int

    @property
    def variant(self) -> str:
        return f"{self.part}.{self.arm.name}"

    def owns(self, row: dict) -> bool:
        return (row["teacher"], row["variant"], row["seed"]) == (self.teacher, self.variant, str(self.seed))

    @property
    def protocol(self) -> str:
        how = f"{self.arm.steps} steps of batch {COMMON['batch']}" if self.arm.method else "not trained"
        return (f"{how}; {self.samples} samples, DDIM {STEPS} uniform, report net, 9000 unseen digits; "
                f"settings {key(self.arm, self.seed).rpartition('-')[2]}")


def queue() -> Iterator[Task]:
    """What a claim needs comes first."""
    dit, _ = TEACHERS
    dense, ours, *others = BASELINES
    for part, arms, samples, seeds, teachers in (
            ("baselines", (dense, ours), SAMPLES, SEEDS[:1], TEACHERS),
            ("long", (LONG["ours"],), SAMPLES, SEEDS[:1], TEACHERS),
            ("units", UNITS, SAMPLES, SEEDS[:1], TEACHERS),
            ("baselines", (LAYERS,), SAMPLES, SEEDS[:1], TEACHERS),
            ("baselines", others, FEW, SEEDS[:1], TEACHERS),
            ("long", (LONG["ours"],), SAMPLES, SEEDS[1:], TEACHERS),
            ("long", (LONG["dense"],), SAMPLES, SEEDS[:1], TEACHERS),
            ("baselines", (HALF,), SAMPLES, SEEDS[:1], TEACHERS),
            ("mao", MAO, FEW, SEEDS[:1], (dit,)),
            ("baselines", PARTS_OF_OURS, FEW, SEEDS[:1], (dit,)),
            ("baselines", (IMPORTANCE,), FEW, SEEDS[:1], TEACHERS)):
        for teacher, seed in itertools.product(teachers, seeds):
            yield from (Task(part=part, teacher=teacher, arm=arm, seed=seed, samples=samples) for arm in arms)
