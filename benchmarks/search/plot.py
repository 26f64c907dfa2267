"""The curves of results.csv: hypervolume, and least loss within the bound, over evaluations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.search.curves import STRATEGIES, Curve, curves

COLOURS = {"ours": "black", "random": "0.55", "tmpq_dm": "#D55E00", "optuna": "#0072B2"}  # Okabe and Ito's
PANELS = {"hypervolume": "dominated share of the box, fresh noise", "least_loss": "least distance within the bound [units]"}


def draw(rows: Sequence[Mapping], path: Path) -> None:
    """A line for the mean of the seeds, a band from the worst to the best. Raises ValueError where there is nothing to draw."""
    found = {metric: curves(rows, metric) for metric in PANELS}
    if not found["hypervolume"]:
        raise ValueError("results.csv: holds no curve to draw yet; run python -m benchmarks.search efficiency first")
    figure = Figure(figsize=(5.2 * len(PANELS), 4), dpi=80, layout="constrained")
    for axis, (metric, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        panel(axis, found[metric], label)
    FigureCanvasAgg(figure).print_png(path)


def panel(axis: Axes, found: Mapping[tuple[str, int], Curve], label: str) -> None:
    for strategy in STRATEGIES:
        own = [dict(curve) for (name, _), curve in found.items() if name == strategy]
        counts = sorted(set.intersection(*map(set, own))) if own else []
        if counts:
            values = np.array([[curve[n] for n in counts] for curve in own])
            axis.plot(counts, values.mean(0), color=COLOURS[strategy], label=strategy)
            axis.fill_between(counts, values.min(0), values.max(0), color=COLOURS[strategy], alpha=0.15, linewidth=0)
    axis.set_xlabel("evaluations")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(frameon=False)
