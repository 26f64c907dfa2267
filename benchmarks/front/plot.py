"""Quality against images/s, one picture a teacher: the dull front, peers and ours, all timed in one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from benchmarks.front.selection import frontier

BATCHES = (8, 1)
# Okabe and Ito's palette, told apart by people with any colour vision.
LOOKS = {"dull": {"color": "0.6", "marker": "o", "s": 18, "label": "dull"},
         "peer": {"color": "#0072B2", "marker": "D", "s": 30, "label": "peers' packages"},
         "ours": {"color": "#D55E00", "marker": "*", "s": 110, "label": "ours"},
         "dense": {"color": "black", "marker": "s", "s": 40, "label": "dense, DDIM, 50 steps"}}


def judged_on_most(rows: Sequence[Mapping], teacher: str) -> set[str]:
    """Variants that were judged on as many samples as dense is: those of fewer have another bias, and are drawn hollow."""
    counts: dict[str, int] = {}
    for row in rows:
        if row["teacher"] == teacher and row["metric"].startswith("fid_"):
            number = row["metric"].removeprefix("fid_")
            n = int(number.removesuffix("k")) * (1000 if number.endswith("k") else 1)
            counts[row["variant"]] = max(n, counts.get(row["variant"], 0))
    return {name for name, n in counts.items() if n >= counts.get("dense", 0)}


def read_points(rows: Sequence[Mapping], teacher: str, batch: int) -> dict[str, tuple[float, float]]:
    """Variant -> images/s, relative FID over dense (of as many samples), of those that have both. Dense: 0."""
    speed, loss = ({row["variant"]: float(row["value"]) for row in rows if (row["teacher"], row["metric"]) == (teacher, metric)}
                   for metric in (f"images_per_s_b{batch}", "loss"))
    loss["dense"] = 0.0
    return {name: (speed[name], 100 * loss[name]) for name in speed if name in loss and not name.startswith("factorial/")}


def draw(rows: Sequence[Mapping], teacher: str, path: Path) -> None:
    """Nothing where the teacher was not timed yet, which is said."""
    found = {batch: read_points(rows, teacher, batch) for batch in BATCHES}
    if not any(len(points) > 1 for points in found.values()):
        print(f"results.csv: holds no point of {teacher} that was timed yet; run python -m benchmarks.front first")
        return
    figure = Figure(figsize=(15, 7), dpi=90, layout="constrained")
    for batch, axis in zip(BATCHES, figure.subplots(1, len(BATCHES)), strict=True):
        panel(axis, found[batch], judged_on_most(rows, teacher), f"{teacher}, batch {batch}")
    FigureCanvasAgg(figure).print_png(path)


def panel(axis: Axes, points: Mapping[str, tuple[float, float]], full: set[str], title: str) -> None:
    groups = {name: name.partition("/")[0] for name in points}
    for group, look in LOOKS.items():
        members = {name: point for name, point in points.items() if groups[name] == group}
        if not members:
            continue
        solid = {name: point for name, point in members.items() if name in full}
        hollow = [point for name, point in members.items() if name not in full]
        if hollow:
            axis.scatter(*zip(*hollow, strict=True), **{**look, "label": f"{look['label']}, few samples"}, facecolors="none",
                         linewidths=0.7, zorder=2)
        if solid:
            axis.scatter(*zip(*solid.values(), strict=True), **look, zorder=3)
        edge = frontier(solid)
        if group in ("dull", "ours") and edge:
            axis.plot(*zip(*(solid[name] for name in edge), strict=True), color=look["color"], linewidth=1)
        for name, (x, y) in members.items():
            if group != "dull" or name in edge:
                axis.annotate(name.partition("/")[2] or name, (x, y), fontsize=6.5, xytext=(4, 3), textcoords="offset points",
                              color="0.3" if group == "dull" else look["color"])
    axis.axhline(5, color="0.7", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=20)
    axis.xaxis.set_major_locator(FixedLocator([n * 10**k for k in range(6) for n in (1, 2, 5)]))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(FixedLocator([-20, -10, -5, 0, 5, 10, 20, 50, 100, 200, 500]))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.set_xlabel("images/s")
    axis.set_ylabel("FID over dense [%]; dotted: the goal's 5 %")
    axis.set_title(title, loc="left", fontsize=10)
    if points:
        axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
