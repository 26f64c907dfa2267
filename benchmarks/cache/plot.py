"""Every arm's curve from results.csv: fidelity against what is computed, and against measured latency."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.cache.arms import ARMS, NFES, OPPONENTS, OURS, PLANS, RULES, SOLVERS, TEACHERS

# Okabe and Ito's palette, told apart by people with any colour vision; marker and line tell arms of one colour apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^v<>PX*"
PANELS = (("computed share of sublayer evaluations", "removed_share"), ("latency of 8 images, eager [ms]", "latency_ms_eager"))
Curve = list[tuple[float, float]]


def curves(rows: Sequence[Mapping], teacher: str, setting: str, horizontal: str) -> dict[str, Curve]:
    """Arm -> points (horizontal, fidelity) by rising strength, of the arms that have both; removed_share becomes computed."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        where, _, cell = row["variant"].partition("/")
        if (row["teacher"], where) == (teacher, setting):
            values.setdefault(cell, {})[row["metric"]] = float(row["value"])
    found: dict[str, Curve] = {}
    for arm in ARMS:
        cells = [values.get(f"{arm.name}/{value:g}", {}) for value in arm.values]
        points = [(1 - cell[horizontal] if horizontal == "removed_share" else cell[horizontal], cell["fidelity"])
                  for cell in cells if {horizontal, "fidelity"} <= cell.keys()]
        if points:
            found[arm.name] = points
    return found


def look(name: str) -> dict:
    """Ours in thick lines, rules dashed, packages solid."""
    if name in {arm.name for arm in PLANS}:
        line = ("-", "--", ":")[[arm.name for arm in PLANS].index(name)]
        return {"color": "#000000", "linewidth": 3.0 if name == OURS else 1.6, "linestyle": line, "zorder": 5}
    place = [arm.name for arm in OPPONENTS].index(name)
    rule = name in {arm.name for arm in RULES}
    return {"color": COLOURS[:-1][place % 6], "marker": MARKERS[place % len(MARKERS)], "markersize": 4, "linewidth": 1.0,
            "linestyle": "--" if rule else "-"}


def draw(rows: Sequence[Mapping], path: Path) -> None:
    """Raises ValueError where there is nothing to draw."""
    settings = [f"{solver}{nfe}" for nfe in NFES for solver in SOLVERS]
    figure = Figure(figsize=(17, 4 * len(settings)), dpi=80, layout="constrained")
    axes = figure.subplots(len(settings), len(TEACHERS) * len(PANELS), squeeze=False)
    names: dict[str, object] = {}
    for row, setting in zip(axes, settings, strict=True):
        columns = [(teacher, *panel) for teacher in TEACHERS for panel in PANELS]
        for axis, (teacher, label, horizontal) in zip(row, columns, strict=True):
            panel(axis, curves(rows, teacher, setting, horizontal), f"{teacher}, {setting}", label, names)
    if not names:
        raise ValueError("results.csv: holds no curve to draw yet; run python -m benchmarks.cache first")
    order = [arm.name for arm in ARMS if arm.name in names]
    figure.legend([names[name] for name in order], order, loc="outside lower center", ncols=7, frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def panel(axis: Axes, found: Mapping[str, Curve], title: str, label: str, names: dict[str, object]) -> None:
    for name, points in found.items():
        names[name], = axis.plot(*zip(*points, strict=True), **look(name))
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(label)
    axis.set_ylabel("distance to the uncached run [units]")
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
