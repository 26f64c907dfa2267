"""What the study has to do, in order."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.sparsity.arms import (
    BASELINES,
    COARSE,
    COMMON,
    EXACT,
    FRONTIER,
    HALF,
    LAYERS,
    LONG,
    LONG_EXACT,
    MAO,
    OURS,
    PARTS_OF_OURS,
    STEPS,
    UNITS,
    Arm,
    key,
)

TEACHERS = ("mnist_dit", "mnist_unet")
SEEDS = (0, 1, 2)            # of the training of finalists; judged on noise of its own each
FRESH = (1, 2, 3)            # of arms whose seed 0 was seen while they were made
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
    dense, ours, *others = BASELINES
    yield from tasks("baselines", (dense, ours), SAMPLES)
    yield from tasks("long", LONG, SAMPLES)
    yield from tasks("units", UNITS, SAMPLES)
    yield from tasks("baselines", (LAYERS,), SAMPLES)
    yield from tasks("baselines", others, FEW)
    yield from tasks("baselines", (HALF,), SAMPLES)
    yield from tasks("mao", MAO, FEW, teachers=TEACHERS[:1])
    yield from tasks("baselines", PARTS_OF_OURS, FEW, teachers=TEACHERS[:1])


def further() -> Iterator[Task]:
    """What goes past 2 cores and hours: more training seeds, and of Mao et al. more densities and the other teacher."""
    yield from tasks("long", LONG, SAMPLES, SEEDS[1:])
    yield from tasks("baselines", (OURS, LAYERS), SAMPLES, FRESH)
    yield from tasks("units", (EXACT,), SAMPLES, teachers=TEACHERS[1:])  # of whose widths one density removes half
    yield from tasks("long", (LONG_EXACT,), SAMPLES, SEEDS, teachers=TEACHERS[1:])
    frontier = MAO[0], *FRONTIER
    yield from tasks("mao", frontier, FEW, teachers=TEACHERS[1:])
    yield from tasks("mao", [arm for arm in FRONTIER if arm not in MAO], FEW, teachers=TEACHERS[:1])
    yield from tasks("mao", (*frontier, *COARSE), FEW, SEEDS[1:], teachers=TEACHERS[:1])


def everything() -> Iterator[Task]:
    yield from queue()
    yield from further()


def seeds_of(task: Task) -> tuple[int, ...]:
    """Whose results are taken together; none where there is one."""
    if task.part == "long":
        return SEEDS
    return FRESH if task.arm.name == LAYERS.name else ()


def tasks(part: str, arms: Iterable[Arm], samples: int, seeds: Iterable[int] = SEEDS[:1],
          teachers: Iterable[str] = TEACHERS) -> Iterator[Task]:
    for teacher, seed in itertools.product(teachers, seeds):
        yield from (Task(part=part, teacher=teacher, arm=arm, seed=seed, samples=samples) for arm in arms)
