"""Few-step students: weights trained for the evaluations that will be taken, together with their solver.

From the teacher alone: its images of the noises in `artifacts/solver_learn`, through the whole trajectory
(`tasks/core/unroll.py`). A student starts from the teacher's weights (under its masks, if it has some) and a learned solver, or
from a student that ships beside the teacher.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tasks.core.artifacts import Inputs, read_json
from tasks.core.denoiser import Denoiser
from tasks.core.learned import SPREAD, LearnedSolver, opened, opening_images, timesteps_of
from tasks.core.pairs import Pairs
from tasks.core.params import check_choice, check_different, check_range
from tasks.core.sampler import spaced_timesteps
from tasks.core.shipped import read_student, students
from tasks.core.unroll import How, Learned, Weights, check_training, train_along
from tasks.runtime.solver import SolverStep, solver_steps

STARTS = ("shipped", "teacher")
NOISES = 32            # for each label, of the opening's images


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    evaluations: tuple[int, ...]  # a student is trained for each of these numbers; none: no few-step students
    grains: tuple[str, ...]       # dense | 2:4 | unit: of the masks that are live
    start: str                    # shipped | teacher
    steps: int
    batch: int
    lr: float                     # of the weights
    solver_lr: float
    warmup: int
    ema_decay: float
    judge_every: int
    held: int                     # pairs that are only judged on
    recompute: bool               # evaluations for the gradient, for less memory
    loss: Weights

    def __post_init__(self):
        check_choice("distill.few_steps.start", self.start, STARTS)
        check_different("distill.few_steps.evaluations", self.evaluations, least=0)
        check_different("distill.few_steps.grains", self.grains, least=min(1, len(self.evaluations)))
        for grain in self.grains:
            check_choice("distill.few_steps.grains", grain, ("dense", "2of4", "unit"))
        for nfe in self.evaluations:
            check_range("distill.few_steps.evaluations", nfe, 1, 50)
        check_training("distill.few_steps", self)

    def how(self, bf16: bool, seed: int) -> How:
        return How(steps=self.steps, batch=self.batch, lr=self.lr, images_lr=3 * self.lr, solver_lr=self.solver_lr,
                   warmup=self.warmup, ema_decay=self.ema_decay, judge_every=self.judge_every, bf16=bf16, seed=seed,
                   loss=self.loss, recompute=self.recompute)


@dataclass(frozen=True)
class Beginning:
    """Of one student: the solver's rows, and parameters in place of the teacher's."""

    rows: Sequence[SolverStep]
    weights: Mapping[str, Tensor]
    origin: str  # in words


def grain_name(token: str) -> str:
    """As masks are named, of a token of params.yaml, which has no colon."""
    return token.replace("2of4", "2:4")


def name_of(nfe: int, grain: str) -> str:
    return f"few_{nfe}" if grain == "dense" else f"few_{nfe}_{grain.replace(':', '_')}"


def train_student(teacher: Denoiser, nfe: int, grain: str, beginning: Beginning, masks: Mapping[str, Tensor], pairs: Pairs,
                  net: nn.Module, params: FewSteps, bf16: bool, seed: int, inputs: Inputs) -> Learned:
    """One student for `nfe` evaluations, under `masks`."""
    student = Denoiser(copy.deepcopy(teacher.model), teacher.schedule)
    student.model.load_state_dict(beginning.weights, strict=False)
    solver = LearnedSolver(teacher.schedule, beginning.rows)
    for name, mask in masks.items():
        student.model.get_parameter(name).data.mul_(mask)
    learn, held = pairs.split(params.held)
    label = name_of(nfe, grain)
    return train_along(student, solver, learn, held, net, params.how(bf16, seed), inputs.checkpoint(f"distill_{label}"),
                       f"distill {label}", masks)


def beginning_of(teacher: Denoiser, nfe: int, grain: str, weights: Mapping[str, Tensor], inputs: Inputs,
                 params: FewSteps, seed: int) -> Beginning:
    """The student that ships beside the teacher, if one is to be taken and there is; else `weights` with a solver of
    solver_learn, or with a classical one where none was learned for this number."""
    if params.start == "shipped" and grain == "dense" and name_of(nfe, grain) in students(inputs["pretrain_load"]):
        recipe, shipped = read_student(inputs["pretrain_load"], name_of(nfe, grain), teacher)
        return Beginning(recipe.rows, shipped, "shipped")
    learned = read_json(inputs["solver_learn"] / "solvers.json")["dense"].get(str(nfe))
    if learned is not None:
        return Beginning(read_rows(learned), weights, "a learned solver")
    images, spread = opening_images(teacher, NOISES, seed + 1)
    rows = solver_steps(teacher.schedule.config, spaced_timesteps(teacher.schedule, nfe + (spread <= SPREAD)), "dpm2m")
    return Beginning(opened(teacher.schedule, rows, images) if spread <= SPREAD else rows, weights, "a classical solver")


# ---- files ----

def entry(name: str, nfe: int, grain: str, masks: str | None, rows: Sequence[SolverStep]) -> dict:
    """Of one student in students.json."""
    return {"name": name, "file": f"student_{name}.safetensors", "masks": masks, "grain": None if grain == "dense" else grain,
            "nfe": nfe, "timesteps": timesteps_of(rows), "rows": [row.to_json() for row in rows]}


def read_rows(entry: Mapping) -> list[SolverStep]:
    return [SolverStep.from_json(row) for row in entry["rows"]]
