"""The strategies that are compared, each with the signature of `tasks.evolve.search.search` but for the strategy itself.

All are given the same seeds and draw timesteps from the same prior. Optuna is imported where it is used: it lives in the
study's own environment.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tasks.core.params import read_params, stage_params
from tasks.core.sampler import strictly_decreasing
from tasks.evolve import stage
from tasks.evolve.search import Evaluate, Evaluation, Strategy, search
from tasks.evolve.space import Candidate, Space, resize

TRIALS_EACH = 20  # trials of Optuna for each evaluation that it is given: the others are infeasible, or asked before


def ours(**changes) -> Strategy:
    """As params.yaml has it at full scale."""
    how = stage_params(stage, read_params(scale="full")).strategy
    return Strategy(**{**vars(how), "kind": "ours", **changes})


def optuna_nsga2(space: Space, evaluate: Evaluate, rng: np.random.Generator, budget: int, seeds: Sequence[Candidate] = (),
                 ) -> list[Evaluation]:
    """Optuna's NSGAIISampler as it comes. The bound is a constraint in its own way: a trial beyond it is told as infeasible and
    costs no evaluation, and neither does one whose recipe was asked before, which fails."""
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.NSGAIISampler(seed=int(rng.integers(2**31)))
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for seed in seeds:
        study.enqueue_trial(to_values(space, seed))
    pending, keys, told = deque(), set(), []

    def ask() -> Iterator[Candidate]:
        for k in range(TRIALS_EACH * budget):
            if len(keys) == budget:
                return
            trial = study.ask()
            values = suggested(space, trial)
            candidate = seeds[k] if k < len(seeds) else from_values(space, values)
            cost, key = space.cost(candidate), space.key(candidate)
            trial.set_constraint("cost", cost - space.bound)
            if cost > space.bound:
                study.tell(trial, (cost, float("inf")))  # by Optuna's rules its objectives do not count
            elif key in keys:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                keys.add(key)
                pending.append((trial, candidate, cost))
                yield candidate

    for loss in evaluate(ask()):
        trial, candidate, cost = pending.popleft()
        if loss is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, (cost, loss))
        told.append(Evaluation(candidate, cost, loss))
    return told


def suggested(space: Space, trial) -> dict:
    """A candidate as numbers and choices: steps, solver, one of every menu, a place in each of the quadratic groups."""
    values = {"steps": trial.suggest_int("steps", *space.steps), "solver": trial.suggest_categorical("solver", space.solvers)}
    values |= {f"gene{i}": trial.suggest_int(f"gene{i}", 0, len(menu) - 1) for i, menu in enumerate(space.menus)}
    return values | {f"place{i}": trial.suggest_float(f"place{i}", 0, 1) for i in range(space.steps[1])}


def from_values(space: Space, values: dict) -> Candidate:
    """The places are of a list of as many steps as there may be; a shorter one keeps its course."""
    most = space.steps[1]
    course = [(i + values[f"place{i}"]) ** 2 / most**2 * space.horizon for i in reversed(range(most))]
    timesteps = resize(strictly_decreasing(np.minimum(course, space.horizon - 1).astype(int)), values["steps"])
    genes = tuple(menu[values[f"gene{i}"]] for i, menu in enumerate(space.menus))
    return Candidate(timesteps, genes, space.cache[0], values["solver"], space.weights[0], space.reuse[0])


def to_values(space: Space, candidate: Candidate) -> dict:
    """The nearest: a list that has two steps in one group loses one of them to the next."""
    most = space.steps[1]
    course = np.sqrt(np.array(resize(candidate.timesteps, most)[::-1]) / space.horizon) * most
    values = {"steps": len(candidate.timesteps), "solver": candidate.solver}
    values |= {f"gene{i}": menu.index(gene) for i, (menu, gene) in enumerate(zip(space.menus, candidate.genes, strict=True))}
    return values | {f"place{i}": float(np.clip(place - i, 0, 1)) for i, place in enumerate(course)}


SEARCHES: dict[str, Callable[..., list[Evaluation]]] = {"optuna": optuna_nsga2} | {
    kind: lambda *args, kind=kind, **kwargs: search(*args, strategy=ours(kind=kind), **kwargs)
    for kind in ("ours", "random", "tmpq_dm")}
