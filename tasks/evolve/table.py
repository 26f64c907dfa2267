"""What a search evaluated, as a table."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.recipe import Recipe, bits

if TYPE_CHECKING:
    import pandas

COLUMNS = ("asked", "cost", "distance", "failed", "on_front", "steps", "solver", "weights", "removed_share", "w_bits", "a_bits",
           "int8_share", "recipe")


def read_evaluations(path: str | Path = "artifacts/evolve/evaluations.jsonl") -> "pandas.DataFrame":
    """One row per candidate, in the order in which they were asked.

    asked: its place; cost: on goal.target; distance: to the dense teacher's images, NaN where the evaluation failed, for the
    reason in `failed`; on_front: no other candidate is both as cheap and as near; weights: teacher, or a student's name. Of its
    recipe: steps (NFE), solver, removed_share (of sublayer evaluations, by the cache), w_bits and a_bits (means over the layers
    whose precision is searched, fp32 being 32), int8_share (of these layers), and the recipe itself, a dict.
    Raises ValueError naming the file and the line that is none of ours.
    """
    import pandas
    rows = [read_line(path, number, line) for number, line in enumerate(Path(path).read_text().splitlines(), 1)]
    layers = sorted({layer for row in rows for layer in row["recipe"]["precision"]})
    table = pandas.DataFrame([flat(row, layers) for row in rows], columns=COLUMNS)
    table["on_front"] = on_front(table)
    return table.sort_values("asked", ignore_index=True)


def read_line(path: str | Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
        Recipe.from_json(row["recipe"])
        return row
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: line {number} is no evaluation: {error}") from None


def flat(row: dict, layers: list[str]) -> dict:
    recipe = Recipe.from_json(row["recipe"])
    tokens = [recipe.precision.get(layer, "fp32") for layer in layers]
    w_bits, a_bits = ([bits(token)[i] for token in tokens] or [32] for i in range(2))
    return {"asked": row["asked"], "cost": row["cost"], "distance": row["distance"], "failed": row.get("failed"),
            "steps": recipe.nfe, "solver": recipe.solver, "weights": row["weights"],
            "removed_share": recipe.cache.removed_share if recipe.cache else 0.0, "w_bits": sum(w_bits) / len(w_bits),
            "a_bits": sum(a_bits) / len(a_bits), "int8_share": tokens.count("w8a8") / max(1, len(tokens)),
            "recipe": row["recipe"]}


def on_front(table: "pandas.DataFrame") -> "pandas.Series":
    """By rising cost, nearer than all that are cheaper."""
    import pandas
    order = table.sort_values(["cost", "distance"]).index
    least = table["distance"].astype(float).fillna(float("inf")).loc[order].cummin()
    return pandas.Series(least < least.shift(fill_value=float("inf")), index=table.index)
