"""The result table, defined once: README (markdown), terminal, HTML and results.csv are renderings of the same columns.

`python -m tasks.report.table` writes it between the markers of README.md, a table for each folder of reports that they name.
"""

import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from pathlib import Path

from tasks.core.artifacts import REPORTS, read_json
from tasks.core.load import Foreign
from tasks.report.picture import PICTURE, sentence
from tasks.report.results import Row, fid_key, read_rows, settings, speedup

README = Path("README.md")
BEGIN, END = "<!-- result table of {}: python -m tasks.report.table -->", "<!-- end of result table -->"
BLOCK = re.compile(f"({BEGIN.format('(?P<reports>[^ ]+)')}\n)(?:.*?)({END})", re.DOTALL)
FIRST, LAST = "<!-- picture of {}: python -m tasks.report.table -->", "<!-- end of picture -->"
FIRST_BLOCK = re.compile(f"({FIRST.format('(?P<reports>[^ ]+)')}\n)(?:.*?)({LAST})", re.DOTALL)
MOST_DECIMALS = 30  # more than tell apart any two measured numbers
DASH = "–"  # what was not measured


@dataclass(frozen=True, kw_only=True)
class Column:
    group: str                           # what neighbouring columns share: quality, a backend and batch, cost
    head: str
    metric: str                          # its name in results.csv, unique
    value: Callable[[Row], float | None]
    unit: float = 1.0                    # shown divided by this
    form: str = "{}"                     # around the shown number
    sign: str = ""                       # "+": shown for positive numbers too
    decimals: int | None = None          # None: as many as show three digits of a typical value


# ---- numbers as people read them ----

def decimals(values: Iterable[float], digits: int = 3) -> int:
    """So many that the median of the values shows `digits` digits; a column of them then aligns at the point."""
    typical = statistics.median([abs(v) for v in values if v] or [1.0])
    return max(0, digits - 1 - math.floor(math.log10(typical)))


def significant(value: float, digits: int = 3) -> str:
    """Plain notation, never an exponent: 0.00123, 12.3, 1234."""
    return f"{value:.{decimals([value], digits)}f}"


def apart(values: Sequence[float], unit: str = "1", places: int | None = None, sign: str = "") -> list[str]:
    """The values in a unit (a decimal number), all with the same number of decimals: `places`, or three digits of the first,
    and more until each of them is seen to lie on its own side of the first. 4.996 is not shown as 5.00 beside a bound of 5."""
    with localcontext(prec=2 * MOST_DECIMALS):
        bound, *others = exact = [Decimal(value) / Decimal(unit) for value in values]
        found = decimals([float(bound)]) if places is None else places
        while found < MOST_DECIMALS and any(other != bound and round(other, found) == round(bound, found) for other in others):
            found += 1
        return [f"{value:{sign}.{found}f}" for value in exact]


def percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def times(value: float) -> str:
    return f"{significant(value)}×"


# ---- columns ----

def quality_columns(rows: dict[str, Row]) -> list[Column]:
    """What decides."""
    fid, relative = fid_key(rows), {"unit": 0.01, "form": "{} %", "sign": "+", "decimals": 1}
    return [quality("nfe", "NFE", decimals=0), quality(fid, fid), quality("loss", "vs dense", **relative),
            quality("loss_upper95", "95 % bound", **relative),
            quality("loss_above_real", "above real", **relative | {"decimals": 0}), quality("fidelity", "fidelity")]


def other_quality_columns() -> list[Column]:
    """What explains."""
    rate = {"unit": 0.01, "form": "{} %", "decimals": 1, "group": "more on quality"}
    return [quality("precision", "precision", **rate), quality("recall", "recall", **rate),
            quality("class_accuracy", "class acc.", **rate), quality("memorised", "memorised", **rate),
            quality("kid", "KID", group="more on quality"), quality("fid_sd", "± FID", group="more on quality"),
            quality("fidelity_same_solver", "fidelity, same solver", group="more on quality")]


def quality(key: str, head: str, group: str = "quality", **form) -> Column:
    return Column(group=group, head=head, metric=key, value=lambda row: row.quality.get(key), **form)


def speed_columns(rows: dict[str, Row], setting: tuple[str, int]) -> list[Column]:
    """Images/s at one setting, against dense in eager fp32 and, on another backend, against dense at fp32 there."""
    backend, batch = setting

    def column(key: str, head: str, value: Callable[[Row], float | None], **form) -> Column:
        return Column(group=f"{backend}, batch {batch}", head=head, metric=f"{backend}.b{batch}.{key}", value=value, **form)

    def against(base: str, head: str) -> Column:
        return column(f"speedup_over_{base}", head, lambda row: speedup(row, rows["dense"], setting, base), form="{}×")

    own = column("images_per_s", "img/s", lambda row: row.images_per_s(*setting))
    return [own, against("eager", "× eager fp32"), *([] if backend == "eager" else [against(backend, "× same fp32")])]


def cost_columns(rows: dict[str, Row]) -> list[Column]:
    """On paper, per image over all steps; on disk; in memory, beyond the libraries'."""
    def column(key: str, head: str, unit: float) -> Column:
        return Column(group="cost", head=head, metric=key, value=lambda row: row.cost.get(key), unit=unit)

    backends = sorted({backend for row in rows.values() for backend in row.memory})
    memory = [Column(group="peak memory, MB", head=backend, metric=f"{backend}.peak_memory_bytes", unit=1e6,
                     value=lambda row, backend=backend: row.memory.get(backend)) for backend in backends]
    return [column("macs", "GMACs", 1e9), column("bitops", "TBitOPs", 1e12), column("size_bytes", "MB", 1e6), *memory]


def all_columns(rows: dict[str, Row], setting: tuple[str, int]) -> list[Column]:
    """Every column in which at least one variant has a number; among the speeds, the goal's own setting comes first."""
    ordered = sorted(settings(rows), key=lambda other: other != setting)
    speed = [column for each in ordered for column in speed_columns(rows, each)]
    found = (*quality_columns(rows), *speed, *cost_columns(rows), *other_quality_columns())
    return measured(found, rows)


def measured(columns: Iterable[Column], rows: dict[str, Row]) -> list[Column]:
    return [column for column in columns if any(column.value(row) is not None for row in rows.values())]


def compact_columns(rows: dict[str, Row], setting: tuple[str, int], more: Sequence[str] = ()) -> list[Column]:
    """What fits into 100 characters: the goal's own setting, one measure of each kind. more: further metrics."""
    wanted = {"nfe", fid_key(rows), "loss", "loss_upper95", "fidelity", "macs", "size_bytes", *more}
    found = (*quality_columns(rows), *speed_columns(rows, setting), *cost_columns(rows))
    return [column for column in measured(found, rows)
            if column.metric in wanted or column.group == f"{setting[0]}, batch {setting[1]}"]


# ---- renderings ----

def texts(column: Column, rows: Iterable[Row]) -> list[str]:
    values = [None if (v := column.value(row)) is None else v / column.unit for row in rows]
    places = decimals([v for v in values if v is not None]) if column.decimals is None else column.decimals
    return [DASH if v is None else column.form.format(f"{v:{column.sign}.{places}f}") for v in values]


def cells(rows: dict[str, Row], columns: Sequence[Column]) -> list[list[str]]:
    """The header and a line for every row."""
    lines = zip(rows, *(texts(column, rows.values()) for column in columns), strict=True)
    return [["variant", *(column.head for column in columns)], *map(list, lines)]


def terminal(rows: dict[str, Row], columns: Sequence[Column]) -> str:
    """Aligned with spaces: names to the left, numbers to the right; headers of several words take several lines."""
    head, *body = cells(rows, columns)
    words = [re.split(r"(?<![×\d]) ", title) for title in head]
    depth = max(map(len, words))
    heads = list(zip(*([""] * (depth - len(w)) + w for w in words), strict=True))
    widths = [max(map(len, column)) for column in zip(*heads, *body, strict=True)]
    lines = [*heads, ["─" * width for width in widths], *body]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines)


def markdown(rows: dict[str, Row], columns: Sequence[Column]) -> str:
    head, *body = cells(rows, columns)
    lines = [head, ["---", *("---:" for _ in columns)], *([f"`{name}`", *values] for name, *values in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def long_form(rows: dict[str, Row], columns: Iterable[Column]) -> list[tuple[str, Column, float]]:
    """(variant, column, value) of everything that was measured."""
    found = [(name, column, column.value(row)) for name, row in rows.items() for column in columns]
    return [entry for entry in found if entry[2] is not None]


# ---- README ----

def caption(rows: dict[str, Row], setting: tuple[str, int], timings: dict, teacher: dict) -> str:
    """Which machine and which protocol the numbers are of: one sentence for each. teacher: what pretrain_load reports."""
    machine, protocol, fid = timings["machine"], timings["protocol"], fid_key(rows)
    sd, real = rows["dense"].quality.get("fid_sd"), rows["dense"].quality.get("fid_real")
    above = f", {fid} of dense having a standard error of {significant(sd)}, samples and holdout resampled" if sd else ""
    if real is not None:
        above += (f"; “above real” is the same increase over what dense has beyond {significant(real)}, the {fid} of as many "
                  f"real images")
    return (f"Speed and size of the packages that ship: {setting[0]}, batch {setting[1]}, {protocol['threads']} threads of "
            f"{machine['cpu']} ({machine['cores']} cores), median of {rounds(rows, setting)} "
            f"interleaved rounds{meanwhile(timings.get('load', {}))}. "
            f"“× eager fp32” and “× same fp32” compare with dense in eager PyTorch and on the same "
            f"backend. “95 % bound” is the upper bound of the relative {fid_key(rows)} increase over dense (paired "
            f"bootstrap){above}; fidelity is the feature distance to dense's images of the same seeds, 1 being what "
            f"twice dense's steps change.{f' dense is {dense}.' if (dense := teacher.get('sampling')) else ''}")


def meanwhile(load: dict) -> str:
    """What else the machine did while it was timed, where that is worth saying."""
    if not load or not Foreign(load["foreign_cpus"], load["cpus"], None).worth_saying:
        return ""
    return f", while other work kept {load['foreign_cpus']:.1f} of {load['cpus']} CPUs busy"


def rounds(rows: dict[str, Row], setting: tuple[str, int]) -> str:
    """How often each variant was timed there: "10", or "8 to 20"."""
    found = sorted({row.speed[setting]["repeats"] for row in rows.values() if setting in row.speed})
    return " to ".join(dict.fromkeys(str(n) for n in (found[0], found[-1]))) if found else "no"


def readme_block(reports: Path) -> str:
    """The table and its caption, from committed reports alone."""
    rows, setting, timings, _ = published(reports)
    columns = compact_columns(rows, setting, more=["loss_above_real"])
    return f"{markdown(rows, columns)}\n{caption(rows, setting, timings, read_json(reports / 'pretrain_load.json'))}\n"


def picture_block(reports: str, root: Path) -> str:
    """The picture, where one was published, and what its numbers come to."""
    if not (root / reports / PICTURE).exists():
        return ""
    rows, setting, _, met = published(root / reports)
    return f"![dense, dull_best and compressed from the same noises]({reports}/{PICTURE})\n\n{sentence(rows, setting, met)}\n"


def published(reports: Path) -> tuple[dict[str, Row], tuple[str, int], dict, bool]:
    """Rows, what they are judged at, the timings, whether the goal was met."""
    timings, verdict = read_json(reports / "benchmark.timings.json"), read_json(reports / "report.json")
    rows = read_rows(read_json(reports / "fid.json"), read_json(reports / "benchmark.json"), timings)
    return rows, (verdict["backend"], verdict["batch"]), timings, verdict["met"]


def with_tables(readme: str, root: Path = Path()) -> str:
    """The text with each table made anew from the reports, below `root`, that its marker names. ValueError: it has none."""
    if not BLOCK.search(readme):
        raise ValueError(f"{README}: no line {BEGIN.format(REPORTS / 'quick')!r} with a line {END!r} after it")
    readme = FIRST_BLOCK.sub(lambda found: f"{found[1]}{picture_block(found['reports'], root)}{found[3]}", readme)
    return BLOCK.sub(lambda found: f"{found[1]}{readme_block(root / found['reports'])}{found[3]}", readme)


def main() -> None:
    try:
        README.write_text(with_tables(README.read_text()))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
