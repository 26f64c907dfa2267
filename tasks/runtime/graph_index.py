"""`graph.json`: which graph runs at which step, of what a skipped output is made, and what the files beside it must be.

Not shipped inside packages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core.recipe import CachePlan, Recipe
from tasks.runtime.cache import sources, weights_of
from tasks.runtime.checks import check_file, check_manifest, read_object
from tasks.runtime.compiling import WEIGHTS
from tasks.runtime.meaning import check_precision, check_timesteps, is_list, is_number, short
from tasks.runtime.packed import MANIFEST, PACKING, RECIPE, SCHEDULER, blamed_on, read_manifest
from tasks.runtime.packed import WEIGHTS as TENSORS
from tasks.runtime.precision import widths

INDEX = "graph.json"
CONDITIONING = "conditioning.xml"
STORED = "graphs.zip"  # in a package in place of all of them (`graph_store.py`)
KEYS = {"forms", "labelled", "rows", "steps", "sums", "inference_precision", "precision", "files"}


@dataclass(frozen=True)
class Form:
    """What a graph leaves out, and what it puts out beside the prediction."""

    skipped: tuple[tuple[str, int], ...]  # sublayer, of how many kept outputs its own is made
    kept: tuple[str, ...]                 # sublayers whose outputs later steps may need
    summed: bool                          # whether they are added up by weights, or each is the one kept output as it is


def sums(plan: CachePlan, timesteps: Sequence[int]) -> dict[str, list]:
    """Sublayer -> for every step [[computed step, weight], ...] of which a skipped output is the sum, [] where it is computed.
    Of the sublayers that some step skips."""
    weights = plan.weights or weights_of(plan.compute, plan.forecast, timesteps)
    found = {}
    for i, (name, column) in enumerate(zip(plan.sublayers, zip(*plan.compute, strict=True), strict=True)):
        if not all(column):
            found[name] = [[list(pair) for pair in zip(steps, row[i], strict=True)]
                           for steps, row in zip(sources(column, plan.forecast), weights, strict=True)]
    return found


def step_forms(terms: dict[str, list], steps: int) -> list[Form]:
    """terms: as `sums` returns them. A step that is needed later keeps all that it can, so that a step mask has two forms at
    most. To put outputs out takes time, so where there are several, a step that no later one needs keeps nothing; a single one
    takes less than the switch to another graph, whose weights are a copy of their own, cold in the caches."""
    summed = any([weight for _, weight in found] not in ([], [1]) for rows in terms.values() for found in rows)
    most = {name: max(map(len, rows)) for name, rows in terms.items()}
    needed = range(steps) if len(terms) == 1 else {s for rows in terms.values() for found in rows for s, _ in found}
    return [Form(tuple((name, most[name]) for name, rows in terms.items() if rows[step]),
                 tuple(name for name, rows in terms.items() if not rows[step]) if step in needed else (), summed)
            for step in range(steps)]


def lowered(precision: Mapping[str, str]) -> dict[str, str]:
    """Without the layers that stay in fp32."""
    return {layer: token for layer, token in precision.items() if token != "fp32"}


def graph_files(forms: int) -> list[str]:
    return [*(f"{i}.xml" for i in range(forms)), CONDITIONING]


def weight_bits(precision: Mapping[str, str]) -> int:
    """Of the widest integers among the weights, 0 if there are none."""
    return max((both[0] for both in map(widths, precision.values()) if both is not None), default=0)


def read_index(folder: Path) -> dict:
    """`graph.json` of a folder, once its files are found to be those that were exported, and of a package those that it was
    sealed with. Raises ValueError otherwise, and where the package's recipe means nothing or is not the graph's."""
    folder = folder.resolve()
    packaged = folder.name == "openvino" and any((folder.parent / part).exists() for part in (MANIFEST, RECIPE, "denoiser"))
    if packaged:
        check_sealed(folder)
    index = read_object(folder / INDEX)
    if not index.keys() >= KEYS:
        raise ValueError(f"{folder / INDEX}: written by an older version; write the package again")
    check_index(folder / INDEX, index)
    for name, expected in index["files"].items() if not is_stored(folder) else ():
        check_file(folder, name, expected)
    if packaged:
        check_same(folder, index)
    return index


def is_stored(folder: Path) -> bool:
    """Whether the graphs are to be unpacked, and their weights taken from the package."""
    return (folder / STORED).exists()


def check_sealed(folder: Path) -> None:
    """Raise ValueError unless the graph's index, the recipe, the schedule and what the graphs are unpacked from are those that
    the package was sealed with. folder: its `openvino/`."""
    package, files = folder.parent, read_manifest(folder.parent)
    stored = (f"{folder.name}/{STORED}", f"denoiser/{TENSORS}", f"denoiser/{PACKING}") if is_stored(folder) else ()
    for wanted in (f"{folder.name}/{INDEX}", RECIPE, SCHEDULER, *stored):
        if wanted not in files:
            raise ValueError(f"{package / MANIFEST}: does not name {wanted}")
        check_file(package, wanted, files[wanted])


def check_same(folder: Path, index: dict) -> None:
    """Raise ValueError unless the recipe of the package means something, and the graph is its form."""
    path = folder.parent / RECIPE
    data, schedule = read_object(path), read_object(folder.parent / SCHEDULER)
    with blamed_on(path):
        recipe = Recipe.from_json(data)
        check_timesteps(recipe.timesteps, schedule.get("num_train_timesteps", 1000))
    wanted, found = lowered(recipe.precision), index["precision"]
    for layer in sorted(wanted.keys() | found.keys()):
        if wanted.get(layer) != found.get(layer):
            raise ValueError(f"{path}: precision of {layer} is {wanted.get(layer, 'fp32')}, but {folder / INDEX} was exported "
                             f"with {found.get(layer, 'fp32')}")
    terms = sums(recipe.cache, recipe.timesteps) if recipe.cache else {}
    if terms != index["sums"] or len(index["steps"] or ()) != (recipe.nfe if recipe.cache else 0):
        raise ValueError(f"{path}: the cache plan is not the one that {folder / INDEX} was exported with")


def check_index(path: Path, index: dict) -> None:
    """Raise ValueError where `graph.json` is of another shape than `export` writes."""
    forms, steps, terms = index["forms"], index["steps"], index["sums"]
    if not is_list(forms, dict) or not forms or not all(map(is_form, forms)):
        raise ValueError(f"{path}: forms: {short(forms)} is not a list of graphs, each with skipped, kept and summed")
    if not isinstance(index["labelled"], bool) or index["inference_precision"] not in ("f32", "bf16"):
        raise ValueError(f"{path}: labelled is not true or false, or inference_precision is neither f32 nor bf16")
    rows = index["rows"]
    if not isinstance(rows, dict) or rows.keys() != {"labels", "width"} or not all(type(n) is int for n in rows.values()):
        raise ValueError(f"{path}: rows: {short(rows)} does not give how many labels and numbers a table of rows has")
    if steps is not None and not (is_list(steps, int) and steps and all(step in range(len(forms)) for step in steps)):
        raise ValueError(f"{path}: steps: {short(steps)} is not a list of graphs between 0 and {len(forms) - 1}")
    if not isinstance(terms, dict) or not all(is_sums(rows, len(steps or ())) for rows in terms.values()):
        raise ValueError(f"{path}: sums: {short(terms)} does not give for each step the earlier ones that an output is made of")
    with blamed_on(path):
        check_precision(index["precision"])
    check_manifest(path, index["files"])
    names = {WEIGHTS, *graph_files(len(forms))}
    if index["files"].keys() != names:
        raise ValueError(f"{path}: files: names {', '.join(sorted(index['files']))}, expected {', '.join(sorted(names))}")


def is_form(form: Mapping) -> bool:
    return (form.keys() == {"skipped", "kept", "summed"} and isinstance(form["summed"], bool) and is_list(form["kept"], str)
            and is_list(form["skipped"], list) and all(len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int)
                                                       for pair in form["skipped"]))


def is_sums(rows: Any, steps: int) -> bool:
    """rows: of one sublayer, for each of `steps` steps pairs of an earlier step and its weight."""
    return is_list(rows, list) and len(rows) == steps and all(
        is_list(row, list) and all(len(pair) == 2 and pair[0] in range(step) and is_number(pair[1]) for pair in row)
        for step, row in enumerate(rows))
