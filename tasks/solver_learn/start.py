"""Where a learned solver starts from: the classical one whose images are nearest to the teacher's of the same noises."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.core.denoiser import Denoiser
from tasks.core.learned import LearnedSolver, opened
from tasks.core.pairs import Pairs
from tasks.core.sampler import spaced_timesteps
from tasks.core.schedule import Schedule
from tasks.core.unroll import PictureLoss, predicting, unroll
from tasks.runtime.solver import SolverStep, clip_bound, solver_steps


@dataclass(frozen=True)
class Start:
    solver: str
    spacing: str
    opened: bool


def rows_of(schedule: Schedule, nfe: int, start: Start, images: Tensor) -> list[SolverStep]:
    """With as many evaluations as asked for."""
    rows = solver_steps(schedule.config, spaced_timesteps(schedule, nfe + start.opened, start.spacing), start.solver)
    return opened(schedule, rows, images) if start.opened else rows


def starts(solvers: Sequence[str], spacings: Sequence[str], opening: bool) -> Iterator[Start]:
    for solver in solvers:
        for spacing in spacings:
            yield from (Start(solver, spacing, one) for one in ((False, True) if opening else (False,)))


@torch.no_grad()
def best_start(denoiser: Denoiser, nfe: int, candidates: Sequence[Start], images: Tensor, pairs: Pairs,
               loss: PictureLoss) -> Start:
    """The one of least loss on the pairs."""
    noise, labels, wanted = pairs.take(range(len(pairs)))
    clip = clip_bound(denoiser.schedule.config)
    scores = {}
    for start in candidates:
        solver = LearnedSolver(denoiser.schedule, rows_of(denoiser.schedule, nfe, start, images))
        scores[start] = loss(unroll(predicting(denoiser, False), solver, noise, labels, clip), wanted).item()
    return min(scores, key=scores.get)
