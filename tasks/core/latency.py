"""The profile's table as an additive model of time: layers at their precision and density, and the remainder.

time(plan) = sum over layers of time(layer, precision, density) + remainder. A precision's remainder is its whole dense model
minus its layers (norms, softmax, sums, calls), so the model is exact wherever one precision is used throughout; a mixed plan
takes the mean of the remainders, weighted by its layers' time in fp32.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from tasks.core.recipe import bits

WHOLE = "model"  # layer and kind of a whole-model row


def load_layers(folder: str | Path) -> pd.DataFrame:
    """The profile's folder -> columns layer, kind, backend, precision, grain, density, batch, time_us, whole-model rows too."""
    layers = pd.read_csv(Path(folder) / "layers.csv")
    whole = pd.read_csv(Path(folder) / "model.csv").assign(layer=WHOLE, kind=WHOLE, grain="dense", density=1.0)
    return pd.concat([layers, whole[layers.columns]], ignore_index=True)


def column(token: str) -> str:
    """A recipe's precision token -> the profile's: every integer width costs what int8 does on hardware that has no other."""
    return "int8" if bits(token)[0] <= 8 else token


def additive_latency(table: pd.DataFrame, layer_tokens: Mapping[str, str], density: Mapping[str, float], backend: str,
                     batch: int, grain: str = "unit") -> float:
    """Microseconds of one network evaluation of `batch` images.

    layer_tokens: layer -> precision token, a missing layer is fp32. density: layer -> kept share of its weights, missing is 1.
    grain: how the rest went, "unit" or "2:4"; times between measured densities are interpolated, below the lowest they stay.
    Raises ValueError if the table has nothing for this backend and batch.
    """
    rows = rows_of(table, backend, batch)
    dense = rows[rows.grain == "dense"].set_index(["layer", "precision"]).time_us
    pruned = rows[rows.grain == grain]
    layers = [name for name in dense.index.unique("layer") if name != WHOLE]
    precision = {name: column(layer_tokens.get(name, "fp32")) for name in layers}
    times = [_layer_time(dense[name, at], pruned, name, at, density.get(name, 1.0)) for name, at in precision.items()]
    weights = [dense[name, "fp32"] for name in layers]
    rest = [_remainder(dense, precision[name]) for name in layers]
    return float(sum(times) + np.average(rest, weights=weights))


def rows_of(table: pd.DataFrame, backend: str, batch: int) -> pd.DataFrame:
    rows = table[(table.backend == backend) & (table.batch == batch)]
    if rows.empty:
        offered = sorted(set(zip(table.backend, table.batch, strict=True)))
        raise ValueError(f"profile: nothing for backend {backend} at batch {batch}; it holds {offered}")
    return rows


def layer_times(table: pd.DataFrame, grain: str, backend: str, batch: int) -> dict[str, list[tuple[float, float]]]:
    """Layer -> (density, microseconds in fp32) by rising density, the last one dense and the only one where no other was timed.
    Raises ValueError if the table has nothing for this backend and batch."""
    rows = rows_of(table, backend, batch)
    rows = rows[(rows.precision == "fp32") & rows.grain.isin(["dense", grain]) & (rows.layer != WHOLE)]
    return {layer: sorted(zip(timed.density, timed.time_us, strict=True)) for layer, timed in rows.groupby("layer")}


def _layer_time(dense_us: float, pruned: pd.DataFrame, layer: str, precision: str, density: float) -> float:
    if density == 1.0:
        return dense_us
    measured = pruned[(pruned.layer == layer) & (pruned.precision == precision)].sort_values("density")
    return float(np.interp(density, [*measured.density, 1.0], [*measured.time_us, dense_us]))


def _remainder(dense: pd.Series, precision: str) -> float:
    """Microseconds of the whole dense model at one precision that no layer accounts for."""
    times = dense.xs(precision, level="precision")
    return times[WHOLE] - times.drop(WHOLE).sum()
