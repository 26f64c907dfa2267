"""The page's plots and images, from what the stages wrote. A stage that left nothing to show has no section."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tasks.core.artifacts import REPORTS, Inputs, read_json
from tasks.core.recipe import Recipe, bits
from tasks.evolve.table import read_evaluations
from tasks.report import plots
from tasks.report.page import Plot
from tasks.report.results import Row, fid_key
from tasks.report.table import share, significant

SHEETS = ("dense", "compressed", "dull_best")
COSTS = {"latency": "time, share of dense's", "bitops": "BitOPs, share of dense's", "size": "bytes of weights"}


# ---- images ----

def sheets(fid: Path, rows: dict[str, Row], images: int, columns: int) -> list[dict]:
    """fid: folder of the stage, whose samples/<variant>.npy hold the first samples, uint8 (N, C, H, W)."""
    def sheet(name: str) -> dict:
        shown = np.load(fid / "samples" / f"{name}.npy")[:images]
        return {"name": name, "src": plots.png(plots.contact_sheet(shown, columns)), "note": sheet_note(rows[name], rows)}

    return [sheet(name) for name in SHEETS]


def sheet_note(row: Row, rows: dict[str, Row]) -> str:
    key = fid_key(rows)
    said = [row.quality["point"]] if "point" in row.quality else []
    said += [f"{row.quality['nfe']} steps"] if "nfe" in row.quality else []
    said += [f"{key} {significant(row.quality[key])}"] if key in row.quality else []
    said += [f"fidelity {significant(row.quality['fidelity'])}"] if row.quality.get("fidelity") else []
    return ", ".join(said)


# ---- plots ----

def all_plots(rows: dict[str, Row], setting: tuple[str, int], inputs: Inputs, target: str) -> list[Plot]:
    """target: of the goal."""
    found = [front(rows, setting, inputs["fid"]), *searched(inputs["evolve"], target), cache(inputs["package"]), layers(inputs),
             curves(inputs)]
    return [plot for plot in found if plot is not None]


def front(rows: dict[str, Row], setting: tuple[str, int], fid: Path) -> Plot:
    key, speeds = fid_key(rows), {name: row.images_per_s(*setting) for name, row in rows.items()}
    ours = [plots.Point(name=name, images_per_s=speeds[name], distance=row.quality[key]) for name, row in rows.items()
            if speeds[name] and key in row.quality]
    drawing = plots.front(ours, key, read_dull(fid / "dull.csv", speeds["dull_best"]), speeds["compressed"],
                          f"images/s ({setting[0]}, batch {setting[1]})")
    return Plot(title="Quality against speed", svg=drawing,
                text="The dull front is what anyone gets from fewer steps, a better solver and one precision for all layers; "
                     "what lies below and to the right of it is a gain. dull_best was selected on it with other seeds and the "
                     "net that guides the search. Each point is compared with compressed on the same noise; clearly worse "
                     "ones, and those dearer than one that is as good, were given fewer samples, by which KID, unlike FID, is "
                     "not biased. Speeds of dull points are the profile's, in proportion to that of dull_best, which was "
                     "measured.")


def read_dull(path: Path, measured: float) -> list[plots.Point]:
    """fid/dull.csv -> the points of the grid, dull_best under this name, their KID less that of compressed.

    measured: images/s of dull_best; the profile's speeds are scaled by one factor so that it has this one.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["precision"]]
    factor = measured / next(float(row["images_per_s"]) for row in rows if row["best"] == "True")
    return [plots.Point(name="dull_best" if row["best"] == "True" else row["name"], kind=row["precision"],
                        images_per_s=factor * float(row["images_per_s"]), distance=float(row["kid_above"])) for row in rows]


def searched(evolve: Path, target: str) -> list[Plot]:
    """What the search evaluated; its front beside all others."""
    if not (evolve / "evaluations.jsonl").exists():
        return []
    table = read_evaluations(evolve / "evaluations.jsonl").dropna(subset="distance").reset_index(drop=True)
    cost, distance, on_front = (table[name].to_numpy() for name in ("cost", "distance", "on_front"))
    shipped = read_json(evolve / "recipe.json")
    chosen = next((i for i, recipe in enumerate(table["recipe"]) if recipe == shipped), None)
    report = read_json(REPORTS / "evolve.json")
    growth = report["hypervolume"]
    keys = (("orange", "compressed"), ("blue", "front"), ("line", "the others"))
    return [Plot(title="The search", svg=plots.search(cost, distance, on_front, growth, COSTS[target]),
                 text=f"Every candidate that was evaluated, by its cost ({COSTS[target]}) and by the distance of its images to "
                      "dense's, 1 being what twice dense's steps change. Those that no other beats in both are the front. "
                      "Hypervolume is the share that the front dominates of the box up to the dearest and the farthest "
                      f"candidate. {said_of_choice(report)}"),
            Plot(title="What the front is made of", svg=plots.parallel(scales_of(table, target), on_front, chosen),
                 text="One line per candidate across its genes, its cost and its distance (on a logarithmic axis). Every layer "
                      "whose precision is searched counts once.",
                 keys=tuple({"colour": colour, "name": name} for colour, name in keys))]


def said_of_choice(report: Mapping) -> str:
    """What was handed over and why, the other answer beside it, and what anyone would try at the same cost."""
    choice, goal, dull = report["choice"], report["goal"], report["dull"]
    best, cheapest, nearest = report["best"], choice["cheapest"], choice["nearest"]
    tolerated = f"a distance of {significant(goal['tolerated_distance'])} for certain (proxy: {choice['proxy']}, 95 % bound)"
    if cheapest is None:
        said = f"No candidate within the bound on cost holds {tolerated}, so compressed is the nearest: {said_of_point(best)}."
    else:
        said = (f"Of those that hold {tolerated} compressed is the cheapest: {said_of_point(best)}. The nearest: "
                f"{said_of_point(nearest)}.")
    if dull["ahead"]:
        return f"{said} By the proxy nothing on the dull front is as near at no more cost."
    point = said_of_point(dull["nearest_at_its_cost"])
    return f"{said} By the proxy a point of the dull front is as near at no more cost: {point}."


def said_of_point(point: Mapping) -> str:
    return (f"{point['nfe']} steps of {point['solver']}, weights {point['weights']}, cost {significant(point['cost'])}, "
            f"distance {significant(point['distance'])}")


def scales_of(table, target: str) -> list[plots.Scale]:
    """On a CPU precision is one of three classes, else bits of weights and of activations."""
    precision = [("int8 layers", "int8_share", share)] if target == "latency" else \
        [("mean W bits", "w_bits", significant), ("mean A bits", "a_bits", significant)]
    shown = [("steps", "steps", "{:.0f}".format), *precision, ("cache removed", "removed_share", share),
             (COSTS[target], "cost", significant), ("distance", "distance", significant)]
    return [plots.Scale(name=name, values=table[column].to_numpy(float), show=show, log=column == "distance")
            for name, column, show in shown]


SKIPPED = {"none": ("reuse the last output", "reused"), "taylor": ("are forecast from the last two outputs", "forecast"),
           "learned": ("are weighted sums of the last outputs, weights learned", "weighted sum")}


def cache(package: Path) -> Plot | None:
    """The plan that ships; where the search chose none, the one of the variant `cache`."""
    recipes = {name: read_recipe(package, name) for name in ("compressed", "cache")}
    name = next((name for name, recipe in recipes.items() if recipe.cache), None)
    if name is None:
        return None
    recipe = recipes[name]
    plan = recipe.cache
    said, key = SKIPPED[plan.forecast]
    other = "" if name == "compressed" else " The search chose no cache for compressed: this is the plan of the variant cache."
    return Plot(title="Layer cache",
                svg=plots.cache([short(s) for s in plan.sublayers], np.asarray(plan.compute), recipe.timesteps),
                text=f"Which sublayer is computed at which step of {name}; {100 * plan.removed_share:.0f} % of the evaluations "
                     f"{said}, with {len(plan.masks)} distinct step masks.{other}",
                keys=({"colour": "blue", "name": "computed"}, {"colour": "faint", "name": key}))


def layers(inputs: Inputs) -> Plot:
    """Of `compressed`; the names of all layers are those that the int8 package quantises."""
    recipe, choice = read_recipe(inputs["package"], "compressed"), read_json(inputs["mask_search"] / "choice.json")
    names = sorted(read_recipe(inputs["package"], "dull_int8").precision, key=natural)
    density = (recipe.sparsity or {}).get("density", {})
    tokens = [recipe.precision.get(name, "fp32") for name in names]
    drawing = plots.layers([short(name) for name in names], [density.get(name, 1.0) for name in names],
                           [bits(token) for token in tokens])
    weights = read_json(inputs["finish"] / "weights.json")["name"]
    if weights != "teacher":
        kept = f"Its weights are those of {weights}{', grain ' + recipe.sparsity['grain'] if recipe.sparsity else ''}."
    elif choice["chosen"] == "none":
        kept = "Its weights are dense: no student was offered to the search."
    else:
        kept = "The search kept the dense weights: no student came as close at the same cost."
    return Plot(title="Density and bits of every layer", svg=drawing,
                text=f"Of compressed. {kept} The mask search preferred {choice['chosen']} ({choice['why']}). "
                     f"{plans_text(choice)}")


def plans_text(choice: Mapping) -> str:
    """The mask search's plans beside their uniform opponents, all within one budget; untrained."""
    names = {"unit": "units block by block", "unit_uniform": "one density of units for all blocks",
             "mixed": "every layer its own grain", "uniform": "the best grain at one density"}
    if not choice["plans"]:
        return "No block has units that can go, so there are no plans of them."
    said = [f"{names[name]} {plan['error']['measured']:.3f} at {plan['cost']:.2f} of the cost"
            for name, plan in choice["plans"].items()]
    return f"One-shot error of plans that save the same ({choice['budget']['counted']}): {'; '.join(said)}."


def curves(inputs: Inputs) -> Plot | None:
    """Of every stage that trained: the teacher where it was trained here, the sparse students, the cache router."""
    files = {"teacher": inputs["pretrain_load"], "sparse students": inputs["distill"], "cache router": inputs["cache_learn"]}
    found = {title: read_curve(folder / "curve.csv") for title, folder in files.items() if (folder / "curve.csv").exists()}
    if not found:
        return None
    return Plot(title="Training", svg=plots.curves(found), text="Training loss of everything that was trained in this run.")


def read_curve(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """curve.csv, columns step, loss and perhaps grain -> {grain: (steps, losses)}."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        steps, losses = series.setdefault(row.get("grain", ""), ([], []))
        steps.append(float(row["step"]))
        losses.append(float(row["loss"]))
    return series


def read_recipe(package: Path, variant: str) -> Recipe:
    return Recipe.from_json(read_json(package / variant / "recipe.json"))


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which block 10 follows block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def short(name: str) -> str:
    return name.removeprefix("transformer_blocks.")
