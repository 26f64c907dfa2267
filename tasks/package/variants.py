"""The rows of the result table: which weights, which masks and which recipe each package holds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.core.denoiser import Schedule
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import dense_recipe, spaced_timesteps

DULL = {"dull_fp32": "fp32", "dull_bf16": "bf16", "dull_int8": "w8a8"}  # precisions of the front that everyone can have
FINISHED = "finished"  # file of the stage finish, without its ending


@dataclass(frozen=True, kw_only=True)
class Variant:
    weights: str         # teacher, or a file of distill (or finish: finished) without its ending
    grain: str | None    # of the masks that are live: 2:4 | unit | None
    masks: str | None = None  # file of distill that holds them, where the weights come from there
    recipe: Recipe       # its sparsity is set from the masks when the package is written


def variants(schedule: Schedule, layers: Iterable[str], dense_steps: int, plan: Mapping, best: Recipe,
             single: Mapping[str, Recipe], weights: Mapping) -> dict[str, Variant]:
    """Every variant by name, in the order of the table.

    layers: paths of all layers that can be quantised. plan: `cache_learn/plan.json`, whose timesteps are the base list.
    best, single: what evolve found, together and for one idea alone. weights: those of the best, `finish/weights.json`.
    """
    base = Recipe(timesteps=tuple(plan["timesteps"]))
    few = spaced_timesteps(schedule, best.nfe)
    on_teacher = {
        "dense": dense_recipe(schedule, dense_steps),
        "few_steps_ddim": Recipe(timesteps=few),
        "few_steps_dpm": Recipe(timesteps=few, solver="dpm2m"),
        "cache": replace(base, cache=CachePlan.from_json(plan)),
        "precision": single["precision"],
        "timesteps": single["timesteps"],
        **{name: replace(base, precision=uniform_precision(layers, token)) for name, token in DULL.items()},
    }
    file = FINISHED if weights["finished"] else Path(weights["file"] or "teacher").stem
    return {
        **{name: Variant(weights="teacher", grain=None, recipe=recipe) for name, recipe in on_teacher.items()},
        "sparse": Variant(weights="teacher", grain="2:4", recipe=base),
        "sparse_distilled": Variant(weights="student_2_4", grain="2:4", recipe=base, masks="masks_2_4.safetensors"),
        "compressed": Variant(weights=file, grain=weights["grain"], recipe=best,
                              masks=weights["masks"]),
    }


def uniform_precision(layers: Iterable[str], token: str) -> dict[str, str]:
    """The same precision for every layer; fp32 is what a missing layer has."""
    return {} if token == "fp32" else dict.fromkeys(layers, token)
