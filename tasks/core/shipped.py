"""Few-step students that ship beside a teacher: few_steps/few_<evaluations>.safetensors in its folder, and a card in JSON."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tasks.core.artifacts import read_json
from tasks.core.denoiser import Denoiser
from tasks.core.recipe import Recipe
from tasks.core.weights import read_header
from tasks.runtime.checks import read_object
from tasks.runtime.meaning import LEARNED, check_opening_fits, check_recipe
from tasks.runtime.solver import KNOWN

FOLDER = "few_steps"
NAME = re.compile(r"few_(\d+)")


def students(teacher: Path) -> list[str]:
    """Names of those beside a teacher's folder."""
    return sorted(path.stem for path in (teacher / FOLDER).glob("*.safetensors") if NAME.fullmatch(path.stem))


def check_student(teacher: Path, name: str, denoiser: Denoiser) -> Recipe:
    """How it samples. teacher: folder; denoiser: the teacher, with or without its weights.

    Raises ValueError, one line, unless the file's header names all weights of such a network, and the card's rows are as many
    as the name says and mean something for the teacher's schedule and images.
    """
    path, card = teacher / FOLDER / f"{name}.safetensors", teacher / FOLDER / f"{name}.json"
    found = {entry.name: tuple(entry.shape) for entry in read_header(path, type(denoiser.model).__name__)}
    if found != {key: tuple(value.shape) for key, value in denoiser.model.state_dict().items()}:
        raise ValueError(f"{path}: its weights are not those of the teacher's network, name by name and shape by shape")
    said = read_object(card)
    try:
        recipe = {"timesteps": said["timesteps"], "solver": LEARNED, "rows": said["rows"], "cache": None, "precision": {},
                  "sparsity": None}
        check_recipe(recipe, KNOWN, denoiser.schedule.steps)
        if len(recipe["rows"]) != int(NAME.fullmatch(name)[1]):
            raise ValueError(f"it has {len(recipe['rows'])} rows, one an evaluation, and not as many as its name says")
        check_opening_fits(recipe["rows"][0].get("opening"), denoiser.sample_shape, denoiser.num_classes)
    except (KeyError, TypeError, ValueError) as error:
        missing = f"key {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{card}: {missing}") from None
    return Recipe.from_json(recipe)


def read_student(teacher: Path, name: str, denoiser: Denoiser) -> tuple[Recipe, dict[str, Tensor]]:
    """How it samples, and its weights in fp32. Raises ValueError as `check_student`, and for weights that are not finite."""
    recipe, path = check_student(teacher, name, denoiser), teacher / FOLDER / f"{name}.safetensors"
    weights = {key: value.float() for key, value in load_file(path).items()}
    for key, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {key} is not finite")
    return recipe, weights


def learned_from(teacher: Path) -> dict[str, list]:
    """Seeds of the noises of all pairs that they learned from, by card; of those whose card says it."""
    cards = [teacher / FOLDER / f"{name}.json" for name in students(teacher)]
    return {str(card): list(seeds_of(read_json(card))) for card in cards}


def seeds_of(said: Any) -> Iterator:
    """Of every object under the key `pairs`, wherever it is: a student may have been trained in parts."""
    for value in said.values() if isinstance(said, dict) else said if isinstance(said, list) else ():
        yield from seeds_of(value)
    pairs = said.get("pairs") if isinstance(said, dict) else None
    if isinstance(pairs, dict) and "seed" in pairs:
        yield pairs["seed"]
