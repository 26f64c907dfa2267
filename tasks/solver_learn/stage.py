"""Solvers of few evaluations for the frozen teacher, learned along whole trajectories: times, coefficients, an opening.

Reads: data (the feature net that guides the search), pretrain_load (teacher).
Writes: solvers.json, for the weights `dense` and each number of evaluations the timesteps, the rows and what was learned from
where; pairs.npy, the teacher's images that they learned from, and pairs.json, of which noises these are; curve.csv
(evaluations, step, loss) and held.csv of the training.
Report, per number of evaluations: the start, its loss on the held noises and what was reached; where nothing better was found,
the start is kept and it is said.
Left out: weights (distill trains those along the same trajectories); guidance above 1; quality of samples (fid judges it).
"""

import csv
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.core.artifacts import Inputs, Report, write_json
from tasks.core.denoiser import load
from tasks.core.learned import SPREAD, LearnedSolver, opening_images, timesteps_of
from tasks.core.pairs import Pairs, sample_kept
from tasks.core.params import check_choice, check_different, check_range
from tasks.core.parcel import Parcel
from tasks.core.recipe import Recipe
from tasks.core.sampler import SPACINGS, spaced_timesteps
from tasks.core.schedule import Schedule
from tasks.core.serial import Failed
from tasks.core.unroll import How, Learned, PictureLoss, Weights, check_training, train_along
from tasks.data.features import load_feature_net
from tasks.runtime.solver import SOLVERS
from tasks.solver_learn.start import Start, best_start, rows_of, starts

INPUTS = ("data", "pretrain_load")
OPENING_NOISES = 32  # for each label
TRIED = 64            # of the pairs to learn from, that the start is chosen on
WEIGHTS = "dense"    # whose solvers these are


@dataclass(frozen=True, kw_only=True)
class TeacherParams:
    """How the teacher makes the images that are learned from: many steps of a good classical solver (GAS: UniPC, 20)."""

    solver: str
    spacing: str
    steps: int

    def __post_init__(self):
        check_choice("solver_learn.teacher.solver", self.solver, SOLVERS)
        check_choice("solver_learn.teacher.spacing", self.spacing, SPACINGS)
        check_range("solver_learn.teacher.steps", self.steps, 1, 1000)

    def recipe(self, schedule: Schedule) -> Recipe:
        return Recipe(timesteps=spaced_timesteps(schedule, self.steps, self.spacing), solver=self.solver)


@dataclass(frozen=True, kw_only=True)
class Params:
    evaluations: tuple[int, ...]  # a solver is learned for each of these numbers
    noises: int                   # that the teacher makes images of
    held: int                     # of these, only judged on
    teacher: TeacherParams        # how they are made
    solvers: tuple[str, ...]      # classical ones to start from
    spacings: tuple[str, ...]
    opening: bool                 # whether an analytic first step is tried
    steps: int
    batch: int
    lr: float
    warmup: int
    ema_decay: float
    judge_every: int
    loss: Weights
    seed: int

    def __post_init__(self):
        for name in ("evaluations", "solvers", "spacings"):
            check_different(f"solver_learn.{name}", getattr(self, name))
        for solver in self.solvers:
            check_choice("solver_learn.solvers", solver, SOLVERS)
        for spacing in self.spacings:
            check_choice("solver_learn.spacings", spacing, SPACINGS)
        for nfe in self.evaluations:
            check_range("solver_learn.evaluations", nfe, 1, 50)
        check_range("solver_learn.noises", self.noises, 2, 10**6)
        check_range("solver_learn.held", self.held, 1, self.noises - 1)
        check_training("solver_learn", self)

    @property
    def how(self) -> How:
        """The opening's images move at a tenth of the rate of the numbers: they are many."""
        return How(steps=self.steps, batch=self.batch, lr=0.0, images_lr=0.1 * self.lr, solver_lr=self.lr, warmup=self.warmup,
                   ema_decay=self.ema_decay, judge_every=self.judge_every, bf16=False, seed=self.seed, loss=self.loss)


@dataclass(frozen=True)
class Found:
    """Of one number of evaluations."""

    start: Start
    learned: Learned

    def to_json(self) -> dict:
        rows = self.learned.solver.rows()
        return {"timesteps": timesteps_of(rows), "rows": [row.to_json() for row in rows], "start": asdict(self.start),
                "kept_start": self.learned.kept_start, "loss": self.learned.loss, "start_loss": self.learned.start_loss}


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    teacher = load(inputs["pretrain_load"] / "teacher")
    images = sample_kept(teacher, params.teacher.recipe(teacher.schedule), params.noises, params.seed,
                         inputs.checkpoint("solver_learn_pairs"), "solver_learn, images")
    pairs = Pairs(images, params.seed, teacher.num_classes)
    pairs.write(out)
    make = functools.partial(make_learner, inputs.cluster.ship(inputs["pretrain_load"] / "teacher"),
                             inputs.cluster.ship(inputs["data"]), pairs, params, Inputs({}, inputs.key).checkpoint)
    found = {}
    for nfe, result in zip(params.evaluations, inputs.cluster.map(make, params.evaluations, "solver_learn"), strict=True):
        if isinstance(result, Failed):
            raise RuntimeError(f"solver_learn: {nfe} evaluations: {result.reason}")
        found[nfe] = result
        say(nfe, result)
    write_json(out / "solvers.json", {WEIGHTS: {str(nfe): one.to_json() for nfe, one in found.items()}})
    for name in ("curve", "held"):
        with open(out / f"{name}.csv", "w", newline="") as file:
            rows = [(nfe, *row) for nfe, one in found.items() for row in getattr(one.learned, name)]
            csv.writer(file).writerows([("evaluations", "step", "loss"), *rows])
    return Report({str(nfe): {"start": asdict(one.start), "start_loss": one.learned.start_loss, "loss": one.learned.loss,
                              "kept_start": one.learned.kept_start, "at": one.learned.at} for nfe, one in found.items()})


def say(nfe: int, found: Found) -> None:
    learned, start = found.learned, found.start
    name = f"{start.solver}, {start.spacing}{', opened' if start.opened else ''}"
    if learned.kept_start:
        print(f"solver_learn: {nfe} evaluations: nothing better than {name} was learned; it is kept", flush=True)
    else:
        print(f"solver_learn: {nfe} evaluations: {name}: loss on held noises {learned.start_loss:.4f} -> {learned.loss:.4f}",
              flush=True)


def make_learner(teacher: Parcel, data: Parcel, pairs: Pairs, params: Params, checkpoint: Callable) -> Callable[[int], Found]:
    """-> number of evaluations -> the solver learned for it."""
    denoiser, net = load(teacher.open()), load_feature_net(data.open(), "search")
    images, spread = opening_images(denoiser, OPENING_NOISES, params.seed + 1)
    candidates = list(starts(params.solvers, params.spacings, params.opening and spread <= SPREAD))
    loss = PictureLoss(net, params.loss)
    learn, held = pairs.split(params.held)

    def learner(nfe: int) -> Found:
        start = best_start(denoiser, nfe, candidates, images, learn.part(0, min(TRIED, len(learn))), loss)
        solver = LearnedSolver(denoiser.schedule, rows_of(denoiser.schedule, nfe, start, images))
        return Found(start, train_along(denoiser, solver, learn, held, net, params.how, checkpoint(f"solver_learn_{nfe}"),
                                        f"solver_learn {nfe}"))

    return learner
