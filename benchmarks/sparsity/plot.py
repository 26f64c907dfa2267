"""What results.csv says of grains, at equal storage, references and time, and of the ways to a 2:4 model."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.sparsity.arms import BASELINES, FRONTIER, LAYERS, MAO, ONE_SHOTS, PARTS_OF_OURS, Arm
from benchmarks.sparsity.queue import TEACHERS
from tasks.core.sparsity import GRAINS

# Okabe and Ito's palette, told apart by people with any colour vision.
COLOURS = {"N:M": "#0072B2", "fine": "black", "vector": "#009E73", "kernel": "#E69F00", "filter": "#D55E00", "unit": "#CC79A7"}
PANELS = (("storage_share", "stored bits, index included, over dense"),
          ("reference_share", "references to partial sums in masked layers"),
          ("speedup_openvino", "speed over dense, OpenVINO, batch 8"))
FIDELITIES = (2, 4, 8, 16, 32)
Values = dict[str, dict[str, float]]


def values_of(rows: Iterable[Mapping], teacher: str, part: str) -> Values:
    """Arm -> metric -> value, of training seed 0."""
    found: Values = {}
    for row in rows:
        where, _, arm = row["variant"].partition(".")
        if (row["teacher"], where, row["seed"]) == (teacher, part, "0"):
            found.setdefault(arm, {})[row["metric"]] = float(row["value"])
    return found


def grain_of(arm: Arm) -> str:
    return "N:M" if ":" in arm.grain else arm.grain


def frontier(axis: Axes, values: Values, across: str, label: str) -> None:
    """A line for each grain through its densities: filled fp32, hollow int8."""
    pruned = sorted(({arm.name: arm for arm in (*MAO[1:], *FRONTIER)}).values(), key=lambda arm: arm.density)
    for grain in ("N:M", *GRAINS, "unit"):
        arms = [values[arm.name] for arm in pruned if grain_of(arm) == grain and across in values.get(arm.name, {})]
        for metric, look in (("fidelity", {"marker": "o", "label": grain}),
                             ("fidelity_int8", {"marker": "o", "markerfacecolor": "white", "linestyle": ":"})):
            axis.plot([one[across] for one in arms], [one[metric] for one in arms], color=COLOURS[grain], markersize=5, **look)
    axis.axhline(values["dense"]["fidelity"], color="0.6", linewidth=1)
    axis.set(xlabel=label, yscale="log", xscale="log" if across == "reference_share" else "linear")
    plain(axis)


def methods(axis: Axes, values: Mapping[str, Values]) -> None:
    """A row for each way of making a 2:4 model, a mark for each teacher."""
    names = [arm.name for arm in (*BASELINES, *ONE_SHOTS, *PARTS_OF_OURS, LAYERS)
             if any(arm.name in found for found in values.values()) and arm.name != "teacher"]
    for (teacher, found), marker in zip(values.items(), "os", strict=True):
        points = [(found[name]["fidelity"], place) for place, name in enumerate(names) if name in found]
        axis.plot(*zip(*points, strict=True), marker, color="black" if marker == "o" else "#D55E00", label=teacher)
    axis.set_yticks(range(len(names)), names)
    axis.set(xscale="log", xlabel="fidelity: distance to the teacher's images", ylim=(len(names) - 0.5, -0.5))
    axis.set_xticks(FIDELITIES)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False)
    plain(axis)


def plain(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw(rows: Sequence[Mapping], path: Path) -> None:
    """Raises ValueError where the study of grains or the baselines have no rows yet."""
    mao, baselines = values_of(rows, TEACHERS[0], "mao"), {name: values_of(rows, name, "baselines") for name in TEACHERS}
    if "fidelity" not in mao.get("dense", {}) or not all(baselines.values()):
        raise ValueError("results.csv: lacks the grains or the baselines; run python -m benchmarks.sparsity first")
    figure = Figure(figsize=(19, 5.5), dpi=80, layout="constrained")
    panels = [panel for panel in PANELS if any(panel[0] in found for found in mao.values())]
    *frontiers, right = figure.subplots(1, len(panels) + 1, width_ratios=[1] * len(panels) + [1.1])
    for axis, (across, label) in zip(frontiers, panels, strict=True):
        frontier(axis, mao, across, label)
    frontiers[0].set(ylabel=f"fidelity of {TEACHERS[0]}; hollow: int8; grey: dense, trained as long")
    frontiers[0].legend(title="grain", frameon=False)
    methods(right, baselines)
    FigureCanvasAgg(figure).print_png(path)
