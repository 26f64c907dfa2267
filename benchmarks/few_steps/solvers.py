"""Learned solvers of the frozen teacher beside every classical one: at as many evaluations, and at half as many again."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np

from benchmarks.few_steps.lab import Lab, read_rows, write_learned
from benchmarks.results import made
from tasks.core import quality
from tasks.core.learned import timesteps_of
from tasks.core.parcel import Parcel
from tasks.core.quality import Difference
from tasks.core.recipe import Recipe
from tasks.core.sampler import SPACINGS, spaced_timesteps
from tasks.core.schedule import Schedule
from tasks.pretrain_load.stage import TEACHERS
from tasks.runtime.solver import SOLVERS
from tasks.solver_learn.stage import make_learner

NUMBERS = (5, 6, 8, 10)  # of evaluations
MORE = 1.5               # times as many, for the best classical solver
SURE = 3.0               # standard errors above the learned solver's FID on fewer samples: it is judged on no more


@dataclass(frozen=True, kw_only=True)
class Classical:
    solver: str
    spacing: str
    nfe: int

    @property
    def name(self) -> str:
        return f"{self.solver}_{self.spacing}_{self.nfe}"

    def recipe(self, schedule: Schedule) -> Recipe:
        return Recipe(timesteps=spaced_timesteps(schedule, self.nfe, self.spacing), solver=self.solver)


def more_evaluations(nfe: int) -> int:
    """In favour of the classical solver where it is no whole number."""
    return int(np.ceil(MORE * nfe))


# ---- classical ----

def ranked(lab: Lab, nfe: int, solvers: Sequence[str] = SOLVERS) -> list[Classical]:
    """Each solver with each spacing, the lowest FID on fewer samples first. By the noise that they are judged on, which is in
    their favour."""
    cells = [Classical(solver=solver, spacing=spacing, nfe=nfe) for solver in solvers for spacing in SPACINGS]
    return sorted(cells, key=lambda cell: quality.fid(judged(lab, cell, lab.sizes.fewer), lab.judge.reference))


def chosen(lab: Lab, nfe: int) -> list[Classical]:
    """Each solver with its best spacing."""
    order = ranked(lab, nfe)
    return [next(cell for cell in order if cell.solver == solver) for solver in dict.fromkeys(cell.solver for cell in order)]


def judged(lab: Lab, cell: Classical, n: int) -> np.ndarray:
    return lab.features(cell.name, cell.recipe(lab.teacher.schedule), n)


def field(lab: Lab, nfe: int) -> dict[Classical, int]:
    """The classical solvers, and how many samples each is judged on: all if it is the best of them on fewer, or if the learned
    one is not clearly better on these, which happens by chance to an equal one once in 700 times."""
    own, cells = judged_learned(lab, nfe), chosen(lab, nfe)
    return {cell: lab.sizes.samples if cell == cells[0] or not beaten(lab, own, cell) else lab.sizes.fewer for cell in cells}


def beaten(lab: Lab, own: np.ndarray, cell: Classical) -> bool:
    found = lab.difference(own, judged(lab, cell, lab.sizes.fewer))
    return found.estimate < -SURE * found.error


# ---- learned ----

def learned_folder(lab: Lab, nfe: int) -> Path:
    return made(lab.folder / "solvers" / f"{nfe}-{lab.how.steps}-{lab.how.batch}", partial(learn, lab, nfe))


def learn(lab: Lab, nfe: int, out: Path) -> None:
    """As the stage solver_learn does."""
    key = [lab.how.steps, lab.how.batch, lab.how.noises]
    learner = make_learner(Parcel("teacher", here=TEACHERS / lab.name), Parcel("data", here=lab.data), lab.pairs(), lab.how,
                           lambda name: lab.checkpoint(name, key))
    found = learner(nfe)
    write_learned(found.learned, out, weights=False, start=vars(found.start))


def learned_recipe(lab: Lab, nfe: int) -> Recipe:
    rows = read_rows(learned_folder(lab, nfe))
    return Recipe(timesteps=timesteps_of(rows), solver="learned", rows=rows)


# ---- beside each other ----

def beside(lab: Lab, nfe: int) -> dict[str, dict[str, float]]:
    """Variant -> metric -> value of all that is judged at a number of evaluations and of the best with more, and the verdict on
    all numbers up to this one."""
    own, found = judged_learned(lab, nfe), {}
    for cell, n in field(lab, nfe).items():
        other = judged(lab, cell, n)
        difference = lab.difference(own, other)
        found[cell.name] = {**named_fid(lab, other), "learned_over_this": difference.estimate,
                            "learned_over_this_upper95": difference.upper95}
    best, concluded = best_of_more(lab, nfe), verdict(lab, NUMBERS[:NUMBERS.index(nfe) + 1])
    concluded[f"learned_{nfe}"] |= named_fid(lab, own)
    return {**found, best.name: named_fid(lab, judged(lab, best, lab.sizes.samples)), **concluded}


def judged_learned(lab: Lab, nfe: int) -> np.ndarray:
    return lab.features(f"learned_{nfe}", learned_recipe(lab, nfe), lab.sizes.samples)


def best_of_more(lab: Lab, nfe: int) -> Classical:
    return ranked(lab, more_evaluations(nfe))[0]


def named_fid(lab: Lab, found: np.ndarray) -> dict[str, float]:
    return {quality.fid_name(len(found)): quality.fid(found, lab.judge.reference)}


def bounds(found: Mapping[Hashable, Difference]) -> dict[Hashable, float]:
    """Upper bounds of 95 % with Holm's correction: the one of the smallest p-value has a share of the 5 %, the next one a share
    of one fewer, and so on. All are below 0 just where all of Holm's p-values of "not lower" are below 0.05."""
    order = sorted(found, key=lambda name: found[name].p_worse_by(0.0))
    return {name: found[name].estimate + NormalDist().inv_cdf(1 - 0.05 / (len(order) - rank)) * found[name].error
            for rank, name in enumerate(order)}


def verdict(lab: Lab, numbers: Sequence[int]) -> dict[str, dict[str, float]]:
    """The learned solver over the classical one that it beats least, by Holm's bounds over all solvers and numbers of
    evaluations; and over the best classical one of half as many evaluations again."""
    own = {nfe: judged_learned(lab, nfe) for nfe in numbers}
    differences = {(nfe, cell): lab.difference(own[nfe], judged(lab, cell, n)) for nfe in numbers
                   for cell, n in field(lab, nfe).items()}
    upper, found = bounds(differences), {}
    for nfe in numbers:
        cells = [key for key in differences if key[0] == nfe]
        more = lab.difference(own[nfe], judged(lab, best_of_more(lab, nfe), lab.sizes.samples))
        found[f"learned_{nfe}"] = {
            "learned_over_classical": max(differences[key].estimate for key in cells),
            "learned_over_classical_upper95": max(upper[key] for key in cells),
            "learned_over_best_at_1.5x": more.estimate, "learned_over_best_at_1.5x_upper95": more.upper95}
    return found
