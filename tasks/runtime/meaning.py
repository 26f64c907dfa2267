"""What a recipe may say. One set of rules for all who read one: the search, the OpenVINO form, a package in plain diffusers.

Shipped inside packages. A recipe is checked as JSON gives it; what only a model can tell (that it has a layer of a name) is
told where the recipe is made live on it.
"""

import base64
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from .cache import FORECASTS, TRUNK, check_forecast
from .precision import widths

KEYS = ("timesteps", "solver", "cache", "precision", "sparsity", "rows")  # the last one came later: a recipe may leave it out
ROW_KEYS = ("t", "p", "q", "a", "b")
OPENING_KEYS = ("a", "b", "shape", "x0")
LEARNED = "learned"  # the solver whose rows are in the recipe
PLAN_KEYS = ("sublayers", "compute", "forecast", "weights")  # the last two came later: a plan may leave them out
GRAINS = ("2:4", "unit")


def check_recipe(recipe: Any, solvers: Collection[str] | None = None, total: int | None = None) -> None:
    """Raise ValueError in one line unless the recipe means something.

    solvers: those that there are; None where another file knows them. total: the schedule's number of timesteps, if known.
    """
    check_keys("recipe", recipe, KEYS, KEYS[:5])
    if solvers is not None and recipe["solver"] not in solvers:
        raise ValueError(f"recipe: solver {recipe['solver']!r} is not one of {', '.join(solvers)}")
    check_timesteps(recipe["timesteps"], total)
    check_rows(recipe.get("rows"), recipe["solver"], recipe["timesteps"], total)
    check_precision(recipe["precision"])
    check_sparsity(recipe["sparsity"])
    if recipe["cache"] is not None:
        check_cache(recipe["cache"], recipe["timesteps"])


def check_keys(what: str, data: Any, known: Sequence[str], needed: Sequence[str]) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{what}: {short(data)} is not an object with keys {', '.join(known)}")
    for key in data:
        if key not in known:
            raise ValueError(f"{what}: unknown key {key!r}; the keys are {', '.join(known)}")
    for key in needed:
        if key not in data:
            raise ValueError(f"{what}: key {key!r} is missing; the keys are {', '.join(known)}")


def check_timesteps(steps: Any, total: int | None = None) -> None:
    """Whole numbers, strictly decreasing, from below `total` to 0 at the least; one at least."""
    if total is not None and (type(total) is not int or total < 1):
        raise ValueError(f"recipe: timesteps: the schedule's num_train_timesteps {short(total)} is not a whole number from 1")
    top = "T - 1" if total is None else total - 1
    if not isinstance(steps, (list, tuple)):
        raise ValueError(f"recipe: timesteps {short(steps)} is not a list of whole numbers")
    for t in steps:
        if isinstance(t, bool) or not isinstance(t, Integral):
            raise ValueError(f"recipe: timesteps: {short(t)} is not a whole number from {top} to 0")
    if not steps or min(steps) < 0 or any(after >= before for before, after in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"recipe: timesteps {short(list(steps))} are not strictly decreasing from {top} to 0")
    if total is not None and steps[0] >= total:
        raise ValueError(f"recipe: timesteps start at {steps[0]}, but the schedule has {total} and its last is {top}")


def check_rows(rows: Any, solver: str, timesteps: Sequence[int], total: int | None = None) -> None:
    """One row for each timestep, of the learned solver alone; times fall strictly, from T - 1 to 0 at the most."""
    if (rows is not None) != (solver == LEARNED):
        raise ValueError(f"recipe: rows are {'missing' if rows is None else 'given'}, but the solver is {short(solver)}; "
                         f"{LEARNED} has rows, and no other")
    if rows is None:
        return
    if not is_list(rows, dict) or len(rows) != len(timesteps):
        raise ValueError(f"recipe: rows {short(rows)} is not a list of one object for each of {len(timesteps)} timesteps")
    opened = rows[0].get("opening") is not None
    if opened:
        check_opening(rows[0]["opening"])
    for step, row in enumerate(rows):
        check_row(step, row, step + 1 + opened)
    times, top = [row["t"] for row in rows], math.inf if total is None else total - 1
    if not top >= times[0] or times[-1] < 0 or any(after >= before for before, after in zip(times, times[1:], strict=False)):
        raise ValueError(f"recipe: rows: times {short(times)} do not fall strictly from "
                         f"{'T - 1' if total is None else top} to 0")
    for step, (t, whole) in enumerate(zip(times, timesteps, strict=True)):
        if abs(t - whole) > len(rows):  # equal whole numbers are pushed apart, by one each
            raise ValueError(f"recipe: rows: step {step}: t {t} is not near {whole}, its timestep")


def check_opening(opening: Any) -> None:
    """Two finite numbers, and an image of finite numbers for each label, as many bytes as its shape says."""
    check_keys("recipe: rows: opening", opening, OPENING_KEYS, OPENING_KEYS)
    for key in OPENING_KEYS[:2]:
        if not is_number(opening[key]):
            raise ValueError(f"recipe: rows: opening: {key} {short(opening[key])} is not a finite number")
    shape = opening["shape"]
    if not is_list(shape, int) or len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"recipe: rows: opening: shape {short(shape)} is not labels, channels, height and width")
    try:
        halves = base64.b64decode(opening["x0"], validate=True)
    except (TypeError, ValueError):
        raise ValueError(f"recipe: rows: opening: x0 {short(opening['x0'])} is not base64") from None
    if len(halves) != 2 * math.prod(shape):
        raise ValueError(f"recipe: rows: opening: x0 has {len(halves)} bytes, not {2 * math.prod(shape)}, two a value of its "
                         "shape")
    if not np.isfinite(np.frombuffer(halves, "<f2")).all():
        raise ValueError("recipe: rows: opening: x0 is not finite")


def check_opening_fits(opening: Any, images: Sequence[int], num_classes: int) -> None:
    """Raise ValueError unless it is of such images, (C, H, W), and has one for all labels or one for each."""
    if opening is None:
        return
    labels, *shape = opening["shape"]
    if shape != list(images) or labels not in (1, num_classes):
        raise ValueError(f"recipe: rows: opening: shape {opening['shape']} does not fit the model, which makes images of "
                         f"{list(images)} of {num_classes} classes")


def check_row(step: int, row: dict, known: int) -> None:
    """Finite numbers; b weighs the x0 of this step and of those before it, at most as many as are known."""
    check_keys(f"recipe: rows: step {step}", row, ROW_KEYS if step else (*ROW_KEYS, "opening"), ROW_KEYS)
    for key in ROW_KEYS[:4]:
        if not is_number(row[key]):
            raise ValueError(f"recipe: rows: step {step}: {key} {short(row[key])} is not a finite number")
    if not isinstance(row["b"], (list, tuple)) or not all(map(is_number, row["b"])):
        raise ValueError(f"recipe: rows: step {step}: b {short(row['b'])} is not a list of finite numbers")
    if not 1 <= len(row["b"]) <= known:
        raise ValueError(f"recipe: rows: step {step}: b has {len(row['b'])} numbers, not 1 to {known}: one an x0 so far")


def check_precision(precision: Any) -> None:
    if not isinstance(precision, Mapping):
        raise ValueError(f"recipe: precision {short(precision)} is not an object of layers and their precisions")
    for layer, token in precision.items():
        try:
            widths(token)
        except (TypeError, ValueError):
            raise ValueError(f"recipe: precision {short(token)} of {layer} is not fp32, bf16 or w3..8a3..8") from None


def check_sparsity(sparsity: Any) -> None:
    if sparsity is None:
        return
    check_keys("recipe: sparsity", sparsity, ("grain", "density"), ("grain", "density"))
    if sparsity["grain"] not in GRAINS:
        raise ValueError(f"recipe: sparsity: grain {short(sparsity['grain'])} is not one of {', '.join(GRAINS)}")
    if not isinstance(sparsity["density"], dict):
        raise ValueError(f"recipe: sparsity: density {short(sparsity['density'])} is not an object of layers and kept shares")
    for layer, share in sparsity["density"].items():
        if not is_number(share) or not 0 <= share <= 1:
            raise ValueError(f"recipe: sparsity: density {short(share)} of {layer} is not a share between 0 and 1")


def check_cache(plan: Any, timesteps: Sequence[int]) -> None:
    check_keys("recipe: cache", plan, PLAN_KEYS, PLAN_KEYS[:2])
    names, compute, weights = plan["sublayers"], plan["compute"], plan.get("weights")
    if not is_list(names, str) or len(set(names)) < len(names) or not names:
        raise ValueError(f"recipe: cache: sublayers {short(names)} is not a list of different names")
    if TRUNK in names and len(names) > 1:
        raise ValueError(f"recipe: cache: {TRUNK} holds all other sublayers, it is cached alone")
    if not is_list(compute, (list, tuple)) or not all(is_list(row, bool) for row in compute):
        raise ValueError("recipe: cache: compute is not a list of steps, each a list of true and false")
    if len(compute) != len(timesteps):
        raise ValueError(f"recipe: the cache plan has {len(compute)} steps, the timestep list {len(timesteps)}")
    for step, row in enumerate(compute):
        if len(row) != len(names):
            raise ValueError(f"recipe: cache: step {step} has {len(row)} entries for {len(names)} sublayers")
    if not all(compute[0]):
        raise ValueError("recipe: cache: step 0 computes every sublayer; there is nothing to reuse yet")
    if not is_table(weights):
        raise ValueError("recipe: cache: weights is not a list of steps, each of sublayers, each a list of numbers")
    forecast = plan.get("forecast", "none")
    if not isinstance(forecast, str):
        raise ValueError(f"recipe: cache: forecast {short(forecast)} is not one of {', '.join(FORECASTS)}")
    check_forecast(compute, forecast, timesteps, weights)


def is_table(weights: Any) -> bool:
    """Whether it is [step][sublayer] -> numbers, or None."""
    rows = (list, tuple)
    return weights is None or (is_list(weights, rows) and all(is_list(row, rows) for row in weights)
                               and all(is_number(value) for row in weights for cell in row for value in cell))


def is_list(data: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(data, (list, tuple)) and all(isinstance(item, kind) for item in data)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def short(value: Any) -> str:
    """As it may stand in a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
