"""What the study has to do, in order."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from benchmarks.sparsity.arms import (
    BASELINES,
    BLOCKS,
    COARSE,
    COMMON,
    EQUAL_STEPS,
    EXACT,
    FRONTIER,
    HALF,
    LAYERS,
    LAYERS_STEPS,
    LONG_STEPS,
    LONGER,
    MAO,
    ONE_SHOTS,
    OURS,
    PARTS_OF_OURS,
    STEPS,
    UNIT,
    Arm,
    key,
)

TEACHERS = ("mnist_dit", "mnist_unet")
WIDE = "ddpm_cifar10"  # of 128 and 256 channels, where the shipped UNet has 16 and 32: its speed alone is measured
FORTY_PERCENT = dict(zip(TEACHERS, (UNIT, EXACT), strict=True))  # of the MACs go; one density takes half of the UNet's widths
SEEDS = (0, 1, 2)            # of the training of finalists; judged on noise of its own each
BLOCKS_SEEDS = (1, 2, 3)
LAYERS_SEEDS = tuple(range(4, 11))  # those up to 3 were seen while the arm was made
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
    def training(self) -> str:
        """What a protocol says of it first."""
        how = f"{self.arm.steps} steps of batch {COMMON['batch']}" if self.arm.method else "not trained"
        return f"{how}; {self.samples} samples"

    @property
    def protocol(self) -> str:
        return (f"{self.training}, DDIM {STEPS} uniform, report net, 9000 unseen digits; "
                f"settings {key(self.arm, self.seed).rpartition('-')[2]}")


def queue() -> Iterator[Task]:
    """Everything with one training seed, what a claim needs first."""
    dense, ours, *others = BASELINES
    yield from tasks("baselines", (dense, ours), SAMPLES, steps=EQUAL_STEPS)
    yield from long((ours, dense), SEEDS[:1])
    yield from forty_percent(SEEDS[:1])
    yield from tasks("blocks", BLOCKS, SAMPLES, BLOCKS_SEEDS[:1])
    yield from tasks("baselines", (LAYERS,), SAMPLES, steps=EQUAL_STEPS)
    yield from tasks("baselines", others, FEW, steps=EQUAL_STEPS)
    yield from tasks("baselines", (HALF,), SAMPLES, steps={teacher: steps // 2 for teacher, steps in EQUAL_STEPS.items()})
    yield from tasks("mao", MAO, FEW, teachers=TEACHERS[:1])


def further() -> Iterator[Task]:
    """What goes past 2 cores and hours: more training seeds, more steps, what ours is made of, other ways of one-shot, one
    density of units on the UNet, and of Mao et al. more densities and the other teacher."""
    yield from long((OURS, BASELINES[0]), SEEDS[1:])
    yield from forty_percent(SEEDS[1:])
    yield from long((UNIT,), SEEDS, TEACHERS[1:])
    yield from tasks("longer", (LONGER,), SAMPLES, teachers=TEACHERS[1:])  # does it come nearer to the teacher?
    yield from tasks("blocks", BLOCKS, SAMPLES, BLOCKS_SEEDS[1:])
    yield from tasks("layers", (OURS, LAYERS), SAMPLES, LAYERS_SEEDS, steps=LAYERS_STEPS)
    yield from tasks("baselines", PARTS_OF_OURS, FEW, teachers=TEACHERS[:1])
    yield from tasks("baselines", ONE_SHOTS, FEW)
    frontier = MAO[0], *FRONTIER
    yield from tasks("mao", frontier, FEW, teachers=TEACHERS[1:])
    yield from tasks("mao", [arm for arm in FRONTIER if arm not in MAO], FEW, teachers=TEACHERS[:1])
    yield from tasks("mao", (*frontier, *COARSE), FEW, SEEDS[1:], teachers=TEACHERS[:1])


def long(arms: Iterable[Arm], seeds: Iterable[int], teachers: Iterable[str] = TEACHERS) -> Iterator[Task]:
    return tasks("long", arms, SAMPLES, seeds, teachers, dict.fromkeys(TEACHERS, LONG_STEPS))


def forty_percent(seeds: Iterable[int]) -> Iterator[Task]:
    for teacher, arm in FORTY_PERCENT.items():
        yield from long((arm,), seeds, (teacher,))


def everything() -> Iterator[Task]:
    yield from queue()
    yield from further()


def seeds_of(task: Task) -> tuple[int, ...]:
    """Whose results are taken together; none where there is one."""
    return {"long": SEEDS, "blocks": BLOCKS_SEEDS, "layers": LAYERS_SEEDS}.get(task.part, ())


def tasks(part: str, arms: Iterable[Arm], samples: int, seeds: Iterable[int] = SEEDS[:1],
          teachers: Iterable[str] = TEACHERS, steps: Mapping[str, int] = MappingProxyType({})) -> Iterator[Task]:
    """steps: of a teacher's arms that are trained, where they are not the arms' own."""
    for teacher, seed in itertools.product(teachers, seeds):
        for arm in arms:
            own = replace(arm, steps=steps.get(teacher, arm.steps)) if arm.method else arm
            yield Task(part=part, teacher=teacher, arm=own, seed=seed, samples=samples)
