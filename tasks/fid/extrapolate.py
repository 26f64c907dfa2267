"""DDIM that skips evaluations and extrapolates the network's last two outputs: what OpenVINO GenAI does by default.

Its name there is TaylorSeer Lite (after arXiv 2503.06923), and it is on for Flux and Stable Diffusion 3. An extrapolated output
is a weighted sum of earlier ones, and each of these follows from its state and its x0. So the steps between two evaluations
come to one row of a solver, which weighs all x0 so far. Clipping is not linear: x0 is clipped where the network was evaluated,
and not in the steps between.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tasks.core.denoiser import Schedule
from tasks.core.sampler import spaced_timesteps
from tasks.runtime.cache import forecast_weights
from tasks.runtime.solver import SolverStep, solver_steps

EXTRAPOLATED = "extrapolated"            # in the place of a solver's name
INTERVAL, BEFORE, AFTER = 3, 6, -2       # cache_interval, disable_cache_before_step, disable_cache_after_step: the defaults


def evaluated_steps(steps: int) -> list[int]:
    """Of a list of so many steps: all before BEFORE and from AFTER on, and the last of every INTERVAL between."""
    return [i for i in range(steps) if i < BEFORE or i >= steps + AFTER or (i - BEFORE) % INTERVAL == INTERVAL - 1]


def extrapolated_sampling(schedule: Schedule, evaluations: int, spacing: str) -> dict:
    """Arguments of a Recipe: the longest list of the spacing that takes so many evaluations.

    Raises ValueError where the schedule has too few timesteps for one.
    """
    lengths = range(evaluations, min(schedule.steps, INTERVAL * evaluations) + 1)
    found = [steps for steps in lengths if len(evaluated_steps(steps)) == evaluations]
    if not found:
        raise ValueError(f"fid.dull.steps: no list of {EXTRAPOLATED} takes {evaluations} evaluations with {schedule.steps} "
                         "timesteps")
    timesteps, evaluated = spaced_timesteps(schedule, found[-1], spacing), evaluated_steps(found[-1])
    return {"timesteps": tuple(timesteps[i] for i in evaluated), "solver": "learned",
            "rows": tuple(extrapolated_rows(schedule.config, timesteps, evaluated))}


def extrapolated_rows(scheduler_config: dict, timesteps: Sequence[int], evaluated: Sequence[int]) -> list[SolverStep]:
    """One row for each evaluated step of the list, from it to the next one. States and outputs are weights of the noise and of
    every x0: the noise's give a, what is left of the next state gives b."""
    plain, weights_of = solver_steps(scheduler_config, timesteps, "ddim"), np.eye(1 + len(evaluated))
    x, states, outputs = weights_of[0], [], []
    for i, row in enumerate(plain):
        if i in evaluated:
            states.append(x)
            x0 = weights_of[len(states)]
            outputs.insert(0, (x0 - row.p * x) / row.q)
        else:
            last = [step for step in reversed(evaluated) if step < i][:2]
            output = sum(w * y for w, y in zip(forecast_weights(i, last), outputs, strict=False))
            x0 = row.p * x + row.q * output
        x = row.a * x + row.b[0] * x0
    rows = []
    for k, (step, before, after) in enumerate(zip(evaluated, states, [*states[1:], x], strict=True)):
        a = float(after[0] / before[0])
        rows.append(replace(plain[step], a=a, b=tuple((after - a * before)[k + 1:0:-1].tolist())))
    return rows
