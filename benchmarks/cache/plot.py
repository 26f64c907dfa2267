"""Every arm's curve from results.csv: fidelity against what is computed, and against measured latency."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.cache.arms import ARMS, NFES, OURS, PACKAGES, PLANS, RULES, SOLVERS, TEACHERS

# Okabe and Ito's palette, told apart by people with any colour vision: a colour for each package.
COLOURS = {"first_block": "#0072B2", "mag": "#D55E00", "pab": "#E69F00", "taylorseer": "#009E73", "dbcache": "#CC79A7",
           "deepcache": "#56B4E9"}
MARKERS = "osD^v<>PX*"
DASHES = ("-", "--", "-.", ":", (0, (1, 3)), (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))  # of our plans
PANELS = (("computed share of sublayer evaluations", "removed_share"),
          ("latency of 8 images over the uncached run's, eager", "speedup_eager"))  # so the machine's own pace is not in it
SHARE = {"removed_share": lambda removed: 1 - removed, "speedup_eager": lambda speedup: 1 / speedup}
Curve = list[tuple[float, float]]


def curves(rows: Sequence[Mapping], teacher: str, setting: str, horizontal: str) -> dict[str, Curve]:
    """Arm -> points (share of the uncached run, fidelity) by rising strength, of those that have both. horizontal: of SHARE."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        where, _, cell = row["variant"].partition("/")
        if (row["teacher"], where) == (teacher, setting):
            values.setdefault(cell, {})[row["metric"]] = float(row["value"])
    found: dict[str, Curve] = {}
    for arm in ARMS:
        cells = [values.get(f"{arm.name}/{value:g}", {}) for value in arm.values]
        points = [(SHARE[horizontal](cell[horizontal]), cell["fidelity"])
                  for cell in cells if {horizontal, "fidelity"} <= cell.keys()]
        if any(strays for _, strays in points):
            found[arm.name] = points
    return found


def look(name: str) -> dict:
    """Ours black, rules grey and dashed, packages in colour; markers tell those of one colour apart."""
    arm = next(arm for arm in ARMS if arm.name == name)
    if arm in PLANS:
        return {"color": "black", "linewidth": 3.0 if name == OURS else 1.6, "zorder": 5,
                "linestyle": DASHES[PLANS.index(arm)]}
    rule = arm in RULES
    place = (RULES if rule else [other for other in PACKAGES if other.make == arm.make]).index(arm)
    return {"color": "0.55" if rule else COLOURS[arm.make], "linestyle": "--" if rule else "-", "linewidth": 1.0,
            "marker": MARKERS[place], "markersize": 4}


def draw(rows: Sequence[Mapping], path: Path) -> None:
    """A row for every setting, a column for every teacher and panel that has a curve. Raises ValueError where none has."""
    settings, columns = [f"{solver}{nfe}" for nfe in NFES for solver in SOLVERS], list(itertools.product(TEACHERS, PANELS))
    found = {(setting, column): curves(rows, column[0], setting, column[1][1]) for setting in settings for column in columns}
    settings = [setting for setting in settings if any(found[setting, column] for column in columns)]
    columns = [column for column in columns if any(found[setting, column] for setting in settings)]
    if not settings:
        raise ValueError("results.csv: holds no curve to draw yet; run python -m benchmarks.cache first")
    figure = Figure(figsize=(4.3 * len(columns) + 2, 4 * len(settings)), dpi=80, layout="constrained")
    axes = figure.subplots(len(settings), len(columns), squeeze=False)
    lines: dict[str, Line2D] = {}
    for setting, row in zip(settings, axes, strict=True):
        for (teacher, (label, horizontal)), axis in zip(columns, row, strict=True):
            lines |= panel(axis, found[setting, (teacher, (label, horizontal))], f"{teacher}, {setting}", label)
    order = [arm.name for arm in ARMS if arm.name in lines]
    figure.legend([lines[name] for name in order], order, loc="outside right upper", frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def panel(axis: Axes, found: Mapping[str, Curve], title: str, label: str) -> dict[str, Line2D]:
    """What strays by nothing, because it skips nothing, has no place on a logarithmic axis."""
    lines = {}
    for name, points in found.items():
        lines[name], = axis.plot(*zip(*[point for point in points if point[1] > 0], strict=True), **look(name))
    if not lines:
        axis.set_visible(False)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(label)
    axis.set_ylabel("distance to the uncached run [units]")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return lines
