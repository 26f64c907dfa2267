"""Every plot as inline SVG whose colours are CSS variables of the page, so that one file serves light and dark."""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Stand-ins that matplotlib draws with; `svg` turns them into the variables that page.html defines (Okabe & Ito's palette,
# told apart by people with any colour vision).
COLOURS = {"ink": "#010101", "muted": "#020202", "line": "#030303", "surface": "#040404", "blue": "#050505",
           "orange": "#060606", "green": "#070707", "pink": "#080808", "faint": "#090909"}
SERIES = tuple(COLOURS[name] for name in ("blue", "orange", "green", "pink"))
WIDTH = 10.0  # inches of every figure, so that type has one size on the page
PLACES = ((8, 0), (-8, 0), *((x, y) for away in (9, 18, 27, 36, 45, 54) for x, y in (
    (6, away), (6, -away), (-6, away), (-6, -away))))  # of a name around its point, in points
BESIDE = 9.0  # points up or down: a name that is farther has a line to its point
LINEAR = 1e-3  # KID on either side of 0 between which its axis is linear
MARKERS = {"fp32": "o", "bf16": "s", "int8": "D"}
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.0, "svg.fonttype": "none", "svg.hashsalt": "diffpress", "path.simplify": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["ink"], "axes.titlesize": 9.0, "axes.titlelocation": "left", "axes.titlecolor": COLOURS["ink"],
    "axes.axisbelow": True, "axes.grid": True, "grid.color": COLOURS["faint"], "grid.linewidth": 0.8,
    "text.color": COLOURS["ink"], "xtick.color": COLOURS["line"], "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"], "ytick.labelcolor": COLOURS["muted"], "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"], "figure.facecolor": "none", "axes.facecolor": "none", "lines.linewidth": 1.6,
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to sample: images/s, distance to real images as the panel measures it, and what it is called."""

    name: str
    images_per_s: float
    distance: float
    kind: str = ""   # of a dull point: its precision


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One axis of parallel coordinates."""

    name: str
    values: np.ndarray              # (n,)
    show: Callable[[float], str]
    log: bool = False

    @property
    def spread(self) -> bool:
        return bool(self.values.max() > self.values.min())

    @property
    def places(self) -> np.ndarray:
        """Of the values between the least, 0, and the greatest, 1; all in the middle where they are equal."""
        if not self.spread:
            return np.full(len(self.values), 0.5)
        along = np.log(self.values) if self.log else self.values
        return (along - along.min()) / (along.max() - along.min())


def drawn(draw: Callable[..., None], title: str, size: tuple[float, float], **subplots) -> str:
    """`draw(axes)` on a new figure -> SVG. size: inches; title: what a screen reader says."""
    from matplotlib import rc_context
    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=72, layout="constrained")  # a pixel is a point
        draw(figure.subplots(**subplots))
        return svg(figure, title)


def svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids are unique in a page, and several figures share it
    text = re.sub(r' width="[\d.]+pt"', f' role="img" aria-label="{title}"', text, count=1)
    text = re.sub(r' height="[\d.]+pt"', "", text, count=1)
    for name, stand_in in COLOURS.items():
        text = text.replace(stand_in, f"var(--{name})")
    return text.replace("'DejaVu Sans'", "inherit").replace("DejaVu Sans", "inherit")


# ---- quality against speed ----

def front(points: Sequence[Point], fid_name: str, dull: Sequence[Point], compressed: float, speed: str) -> str:
    """Two panels with the same speeds: the FID of every variant on the report net; the KID of every dull point less that of
    compressed, on the search net. compressed: its images/s. speed: what the horizontal axis counts."""
    bar = Point(name="compressed", images_per_s=compressed, distance=0.0)

    def draw(axes: np.ndarray) -> None:
        draw_variants(axes[0], points)
        draw_dull(axes[1], dull)
        axes[1].axhline(0, color=COLOURS["muted"], linewidth=0.5)
        draw_variants(axes[1], [bar])
        titles = ("the variants", "compressed and the dull front")
        names = (f"{fid_name}, report net", "KID above compressed's, search net")
        for panel, name, title in zip(axes, names, titles, strict=True):
            panel.set(xscale="log", xlabel=f"{speed}; further right is better", ylabel=f"{name}; lower is better")
            panel.set_title(title, pad=22)
            panel.margins(x=0.12)
        axes[0].set_yscale("log")
        axes[1].set_yscale("symlog", linthresh=LINEAR)
        axes[1].yaxis.set_major_formatter("{x:g}")
        plain_ticks(axes[0].xaxis, axes[0].yaxis, axes[1].xaxis)
        axes[1].legend(loc="lower left", bbox_to_anchor=(-0.03, 0.99), ncols=4, handletextpad=0.2, columnspacing=1,
                       borderpad=0.2)
        axes[0].figure.draw_without_rendering()  # the layout is settled from here on
        label_points(axes[0], points)
        label_points(axes[1], [bar, *(point for point in dull if point.name == "dull_best")])

    return drawn(draw, f"{fid_name} against images per second", size=(WIDTH, 4.7), ncols=2, sharex=True)


def draw_variants(axes: Axes, points: Sequence[Point]) -> None:
    for point in points:
        ours = point.name == "compressed"
        axes.plot(point.images_per_s, point.distance, "o", color=COLOURS["orange" if ours else "blue"],
                  markersize=8 if ours else 5)


def draw_dull(axes: Axes, dull: Sequence[Point]) -> None:
    """Every dull point, and the staircase of those that no other one beats in both."""
    for kind in sorted({point.kind for point in dull}):
        members = [point for point in dull if point.kind == kind]
        axes.plot([p.images_per_s for p in members], [p.distance for p in members], MARKERS.get(kind, "v"),
                  color=COLOURS["muted"], markerfacecolor="none", markersize=4, label=kind)
    if best := pareto(dull):
        axes.step([p.images_per_s for p in best], [p.distance for p in best], where="pre", color=COLOURS["muted"], linewidth=1,
                  label="front")


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats in speed and distance, from slow to fast."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.images_per_s, p.distance)):
        if not kept or point.distance < kept[-1].distance:
            kept.append(point)
    return kept[::-1]


def label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Each name at the first place around its point where it covers neither another name nor another point, within the axes;
    compressed is the first to choose."""
    points = sorted(points, key=lambda point: point.name != "compressed")
    at = [axes.transData.transform((point.images_per_s, point.distance)) for point in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    for point, (x, y) in zip(points, at, strict=True):
        places = [box(x + dx, y + dy, point.name, dx < 0) for dx, dy in PLACES]
        free = [i for i, b in enumerate(places) if not any(overlap(b, other) for other in taken)]
        place = next((i for i in free if within(places[i], axes.bbox.extents)), free[0] if free else 0)
        taken.append(places[place])
        dx, dy = PLACES[place]
        line = {"arrowstyle": "-", "color": COLOURS["muted"], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        said = axes.annotate(point.name, (point.images_per_s, point.distance), (dx, dy), textcoords="offset points",
                             fontsize=8, va="center", ha="right" if dx < 0 else "left",
                             fontweight="bold" if point.name == "compressed" else "normal",
                             arrowprops=line if abs(dy) > BESIDE else None)
        said.set_in_layout(False)


def within(inner: Sequence[float], outer: Sequence[float]) -> bool:
    return inner[0] >= outer[0] and inner[1] >= outer[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def box(x: float, y: float, name: str, to_the_left: bool) -> tuple[float, float, float, float]:
    """Left, bottom, right, top in points of a name in 8 point type that begins or ends at (x, y)."""
    width = 4.9 * len(name)
    left = x - width if to_the_left else x
    return left, y - 5, left + width, y + 5


def overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def plain_ticks(*axes: Axis) -> None:
    """5, 7, 10, 20 instead of powers of ten: what is shown spans one or two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    for axis in axes:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 15 * low else (1, 1.5, 2, 3, 4, 5, 7), numticks=20))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


# ---- cache ----

def cache(sublayers: Sequence[str], compute: np.ndarray, timesteps: Sequence[int]) -> str:
    """compute: (steps, sublayers) bool."""
    def draw(axes: Axes) -> None:
        from matplotlib.colors import ListedColormap
        axes.pcolormesh(compute.T, cmap=ListedColormap([COLOURS["faint"], COLOURS["blue"]]), vmin=0, vmax=1,
                        edgecolors=COLOURS["surface"], linewidth=1.5)
        axes.set_yticks(np.arange(len(sublayers)) + 0.5, sublayers)
        shown = np.arange(0, len(timesteps), -(-len(timesteps) // 12))  # evenly, 12 at most
        axes.set_xticks(shown + 0.5, [f"{step}\nt = {timesteps[step]}" if i == 0 else f"{step}\n{timesteps[step]}"
                                      for i, step in enumerate(shown)])
        axes.set(xlabel="step, and its timestep", ylabel="sublayer")
        bare(axes)

    return drawn(draw, "which sublayer is computed at which step", size=(WIDTH, 0.9 + 0.2 * len(sublayers)))


def bare(axes: Axes) -> None:
    axes.grid(False)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


# ---- density and bits ----

def layers(names: Sequence[str], density: Sequence[float], bits: Sequence[tuple[int, int]]) -> str:
    """One column per layer. bits: (weight, activation)."""
    def draw(panels: np.ndarray) -> None:
        at = np.arange(len(names))
        panels[0].bar(at, 100 * np.asarray(density), color=COLOURS["blue"], width=0.75)
        panels[0].set(ylabel="kept weights, %", ylim=(0, 105))
        for i, (label, colour) in enumerate((("weights", COLOURS["blue"]), ("activations", COLOURS["orange"]))):
            panels[1].bar(at + (i - 0.5) * 0.38, [b[i] for b in bits], color=colour, width=0.36, label=label)
        panels[1].set(ylabel="bits", ylim=(0, 36), yticks=(0, 8, 16, 32))
        panels[1].legend(loc="upper left", bbox_to_anchor=(0, 1.18), ncols=2, borderpad=0)
        panels[1].set_xticks(at, names, rotation=90, fontsize=6.5)
        for panel in panels:
            panel.grid(axis="x", visible=False)
            panel.margins(x=0.01)

    return drawn(draw, "kept share of the weights and bits of every layer", size=(max(WIDTH, 0.17 * len(names)), 4.8),
                 nrows=2, sharex=True)


# ---- the search ----

def search(cost: np.ndarray, distance: np.ndarray, front: np.ndarray, growth: Sequence[tuple[float, float]],
           cost_name: str) -> str:
    """All that was evaluated, its front, and how that grew. cost, distance: (n,); front: (n,) bool; growth: pairs (evaluations,
    hypervolume); cost_name: what the horizontal axis counts."""
    def draw(panels: np.ndarray) -> None:
        order = np.flatnonzero(front)[np.argsort(cost[front])]
        panels[0].plot(cost[~front], distance[~front], "o", color=COLOURS["muted"], markerfacecolor="none", markersize=4,
                       label="evaluated")
        panels[0].step(cost[order], distance[order], where="post", color=COLOURS["blue"], marker="o", markersize=5,
                       label="front")
        panels[0].set(yscale="log", xlabel=f"{cost_name}; further left is cheaper", ylabel="distance to dense; lower is nearer")
        panels[0].legend(loc="lower left", bbox_to_anchor=(-0.03, 0.99), ncols=2, handletextpad=0.2, columnspacing=1,
                         borderpad=0.2)
        panels[1].plot(*zip(*growth, strict=True), color=COLOURS["blue"], marker="o", markersize=4)
        panels[1].set(xlabel="evaluations", ylabel="hypervolume", ylim=(0, None))
        plain_ticks(panels[0].yaxis)

    return drawn(draw, "distance against cost of every candidate, and hypervolume over evaluations", size=(WIDTH, 3.6), ncols=2)


def parallel(scales: Sequence[Scale], front: np.ndarray, chosen: int | None) -> str:
    """Parallel coordinates, one line per candidate. front: (n,) bool, drawn above the others; chosen: index of the one that
    ships, if it is among them."""
    def draw(axes: Axes) -> None:
        places = np.stack([scale.places for scale in scales])  # (axes, n) in 0..1
        for members, colour, width in ((~front, "line", 0.8), (front, "blue", 1.6)):
            axes.plot(places[:, members], color=COLOURS[colour], linewidth=width)
        if chosen is not None:
            axes.plot(places[:, chosen], color=COLOURS["orange"], linewidth=2.4)
        for i, scale in enumerate(scales):
            axes.axvline(i, color=COLOURS["line"], linewidth=0.8, zorder=0)
            low, high = scale.values.min(), scale.values.max()
            for at, value, up in ((0.0, low, -1), (1.0, high, 1)) if scale.spread else ((0.5, low, -1),):
                axes.annotate(scale.show(value), (i, at), (0, 5 * up), textcoords="offset points", ha="center",
                              va="bottom" if up > 0 else "top", fontsize=8, color=COLOURS["muted"])
        axes.set_xticks(range(len(scales)), [scale.name for scale in scales])
        axes.set(yticks=(), ylim=(-0.12, 1.12), xlim=(-0.4, len(scales) - 0.6))
        axes.grid(False)
        axes.tick_params(length=0, labelcolor=COLOURS["ink"])
        for spine in axes.spines.values():
            spine.set_visible(False)

    return drawn(draw, "the candidates on parallel axes", size=(WIDTH, 3.4))


# ---- training ----

def curves(runs: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> str:
    """{panel: {series: (step, loss)}}, small multiples."""
    def draw(panels: np.ndarray) -> None:
        for panel, (title, series) in zip(panels.flat, runs.items(), strict=True):
            for (name, (step, loss)), colour in zip(series.items(), SERIES, strict=False):
                panel.plot(step, loss, color=colour, label=name)
            panel.set(title=title, xlabel="optimiser step", yscale="log")
            plain_ticks(panel.yaxis)
            if len(series) > 1:
                panel.legend(loc="upper right")
        panels.flat[0].set_ylabel("loss")

    return drawn(draw, "training loss against step", size=(WIDTH, 2.9), ncols=len(runs), squeeze=False)


# ---- images ----

def contact_sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """(N, C, H, W) uint8 -> (rows H, columns W, C), row by row; whole rows only."""
    rows = len(images) // columns
    n, c, h, w = images[: rows * columns].shape
    return images[:n].reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)


def png(image: np.ndarray) -> str:
    """(H, W, 1 | 3) uint8 -> data URI."""
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
