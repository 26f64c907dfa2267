"""What all points share: a shipped teacher, its judge, the noise, the sizes of the study, and what is learned once."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from benchmarks.front.points import FASTEST, STUDENT
from benchmarks.holdout import judge_unseen
from benchmarks.results import made
from benchmarks.sparsity.lab import Bootstrap
from tasks.core import denoiser as denoisers
from tasks.core.artifacts import Inputs, digest, read_json
from tasks.core.cluster import Cluster
from tasks.core.denoiser import Denoiser
from tasks.core.pairs import Pairs
from tasks.core.params import read_params, stage_params
from tasks.core.sampler import labels_for
from tasks.core.shipped import FOLDER as STUDENTS
from tasks.core.shipped import read_student
from tasks.data import stage as data_stage
from tasks.data.features import load_feature_net
from tasks.distill.few_steps import Beginning
from tasks.fid.measure import Judge
from tasks.pretrain_load.stage import TEACHERS as FOLDERS
from tasks.runtime.solver import SolverStep
from tasks.solver_learn import stage as solver_stage

NOISE = 987_654        # seed of the noise of what is judged: the same for every point, so points are compared in pairs
HEAT_NOISE = 2_121     # of heats
CALIBRATION = 24_680   # of what ranges and cache plans are made from


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is small in a trial run."""

    heat: int         # images of every dull solver and spacing
    kept: int         # of each number of steps, nearest to the converged image, go on to the trial
    trial: int        # samples of those, and of peers in eager torch
    finals: int       # samples of the best of each number of steps, of ours and of peers in OpenVINO
    factorial: int    # samples of every package of the factorial
    pairs: int        # noises and images of the teacher that are learned from
    solver_steps: int    # of learning a solver
    network_steps: int   # of training pruned networks
    steps: tuple[int, ...]   # of the dull front
    rounds: int       # of timing, at least
    budget_s: float   # of timing at one batch size


FULL = Sizes(heat=50, kept=3, trial=500, finals=5000, factorial=1000, pairs=2048, solver_steps=80, network_steps=120,
             steps=(4, 5, 6, 8, 10, 12, 16, 20), rounds=7, budget_s=90)
FEW = Sizes(heat=10, kept=1, trial=20, finals=40, factorial=20, pairs=256, solver_steps=2, network_steps=2,
            steps=(4, 8, 12, 20), rounds=2, budget_s=1)


@dataclass(frozen=True, kw_only=True)
class Lab:
    name: str
    folder: Path
    data: Path
    teacher: Denoiser
    judge: Judge
    sizes: Sizes
    kept: dict = field(default_factory=dict)  # networks and graphs that are open

    @cached_property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(self.judge, self.strata)

    def strata(self, n: int) -> np.ndarray | None:
        """Labels (n,) of samples 0 .. n - 1; None from a teacher without classes."""
        labels = labels_for(range(n), self.teacher.num_classes)
        return None if labels is None else labels.numpy()

    def inputs(self, key: str) -> Inputs:
        folders = {"data": self.data, "pretrain_load": self.shipped}
        return Inputs(folders, key, Cluster.from_params({**read_params()["cluster"], "workers": 1}))

    @cached_property
    def shipped(self) -> Path:
        """As the stage pretrain_load leaves it: the teacher, and students beside it."""
        def link(out: Path) -> None:
            (out / "teacher").symlink_to((FOLDERS / self.name).resolve())
            (out / STUDENTS).symlink_to((FOLDERS / self.name / STUDENTS).resolve())
        return made(self.folder / "teacher", link)

    @cached_property
    def solvers(self) -> Path:
        """The stage solver_learn at its scale quick, with more pairs, for pruned networks learn from them, too."""
        how = replace(stage_params(solver_stage, read_params(scale="quick")), noises=self.sizes.pairs,
                      steps=self.sizes.solver_steps)
        inputs = self.inputs(digest([self.name, how.noises, how.steps]))
        return made(self.folder / "solvers", lambda out: solver_stage.run(how, inputs, out))

    @cached_property
    def pairs(self) -> Pairs:
        return Pairs.read(self.solvers)

    def learned_rows(self, evaluations: int) -> list[SolverStep]:
        found = read_json(self.solvers / "solvers.json")[solver_stage.WEIGHTS][str(evaluations)]
        return [SolverStep.from_json(row) for row in found["rows"]]

    @property
    def student(self) -> Beginning:
        recipe, weights = read_student(FOLDERS / self.name, STUDENT, self.teacher)
        return Beginning(recipe.rows, weights, "shipped")

    @cached_property
    def search_net(self) -> nn.Module:
        return load_feature_net(self.data, "search")


def open_lab(name: str, work: Path, sizes: Sizes) -> Lab:
    """name: of a shipped teacher, a folder in tasks/pretrain_load/teachers. The data are one for all sizes."""
    params = stage_params(data_stage, read_params(scale="full"))
    data = made(work.parent / "data", lambda out: data_stage.run(params, Inputs({}, "front-data"), out))
    teacher = denoisers.load(FOLDERS / name)
    judge = judge_unseen(load_feature_net(data, "report"), "judges", teacher.sample_shape)
    return Lab(name=name, folder=work / name, data=data, teacher=teacher, judge=judge, sizes=sizes)


def best_samplers(rows: list[Mapping], teacher: str, trial: str) -> dict[int, str]:
    """Steps -> solver_spacing_steps of the least FID in the trials, of this teacher. trial: their metric."""
    found: dict[int, tuple[float, str]] = {}
    for row in rows:
        group, _, name = row["variant"].partition("/")
        sampler, _, precision = name.rpartition("_")
        if (row["teacher"], group, row["metric"], precision) == (teacher, "dull", trial, FASTEST):
            steps = int(sampler.rpartition("_")[2])
            found[steps] = min(found.get(steps, (np.inf, "")), (float(row["value"]), sampler))
    return {steps: sampler for steps, (_, sampler) in found.items()}
