"""What the study has to do, in order."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.sparsity.arms import BASELINES, COMMON, FINALISTS, HALF, MAO, STEPS, UNITS, Arm, key

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
        return (f"{how}; {self.samples} samples, DDIM {STEPS} uniform, report net, 1000 holdout images; "
                f"settings {key(self.arm, self.seed).rpartition('-')[2]}")


def queue() -> Iterator[Task]:
    """What a claim needs comes first."""
    finalists = [arm for arm in BASELINES if arm.name in FINALISTS]
    others = [arm for arm in BASELINES if arm not in finalists]
    for part, arms, samples, seeds in (("baselines", finalists, SAMPLES, SEEDS[:1]), ("units", UNITS, SAMPLES, (0,)),
                                       ("baselines", others, FEW, (0,)), ("baselines", HALF, SAMPLES, (0,)),
                                       ("baselines", finalists, SAMPLES, SEEDS[1:])):
        for teacher, seed in itertools.product(TEACHERS, seeds):
            yield from (Task(part=part, teacher=teacher, arm=arm, seed=seed, samples=samples) for arm in arms)
    yield from (Task(part="mao", teacher="mnist_dit", arm=arm, seed=0, samples=FEW) for arm in MAO)
