"""The report as one HTML file that asks nobody for anything: template, styles, images and plots are all in it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.core.params import Goal
from tasks.core.teacher import NOT_WORTH
from tasks.report.results import Row, speedup
from tasks.report.table import DASH, Column, cells, percent, share, significant, times
from tasks.report.verdict import Verdict

TEMPLATE = Path(__file__).parent / "page.html"


@dataclass(frozen=True, kw_only=True)
class Plot:
    title: str
    text: str
    svg: str
    keys: tuple[dict, ...] = ()  # {colour, name} of a legend below the plot


@dataclass(frozen=True, kw_only=True)
class Page:
    """What page.html is filled with."""

    subject: str
    verdict: Verdict
    facts: Sequence[dict]                 # {name, value, note}
    rows: dict[str, Row]
    columns: Sequence[Column]
    caption: str
    sheets: Sequence[dict]                # {name, src, note}
    plots: Sequence[Plot]
    walls: Mapping[str, float]            # stage -> seconds, in the order of the DAG
    protocol: Sequence[tuple[str, str]]
    commit: str                           # '' where unknown


def render(page: Page) -> str:
    """-> HTML. Everything that comes from a file is escaped; plots are this room's own SVG."""
    from jinja2 import Environment, StrictUndefined
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return jinja.from_string(TEMPLATE.read_text()).render(
        subject=page.subject, headline=headline(page.verdict), verdict=page.verdict.lines, facts=page.facts,
        caption=page.caption, dash=DASH, **html_table(page.rows, page.columns), sheets=page.sheets, plots=page.plots,
        times=time_bars(page.walls), total=duration(sum(page.walls.values())), protocol=page.protocol, commit=page.commit)


def headline(verdict: Verdict) -> str:
    """The two answers in one line; the one that hurts comes first, a teacher that makes both meaningless before them."""
    if not verdict.worth_compressing:
        return f"{NOT_WORTH}; {answers(verdict)[0].lower()}{answers(verdict)[1:]}"
    return answers(verdict)


def answers(verdict: Verdict) -> str:
    goal = "goal met" if verdict.met else "goal not met"
    if verdict.beats_dull_best:
        return f"{goal.capitalize()}; beats what few steps and a lower precision give"
    return f"Not shown to beat few steps and a lower precision; {goal}"


def html_table(rows: dict[str, Row], columns: Sequence[Column]) -> dict:
    """groups: neighbouring columns that share a heading; columns: {head, first of its group}; rows: {name, cells}."""
    spans = [(name, len(list(members))) for name, members in itertools.groupby(column.group for column in columns)]
    firsts = {0, *itertools.accumulate(span for _, span in spans)}
    return {"groups": [{"name": name, "span": span} for name, span in spans],
            "columns": [{"head": column.head, "first": i in firsts} for i, column in enumerate(columns)],
            "rows": [{"name": name, "cells": values} for name, *values in cells(rows, columns)[1:]]}


def facts(rows: dict[str, Row], verdict: Verdict, goal: Goal, setting: tuple[str, int]) -> list[dict]:
    """The numbers of `compressed` that a reader came for."""
    dense, ours = rows["dense"], rows["compressed"]
    backend, batch = setting

    def fact(name: str, value: float | None, show: Callable[[float], str], note: str) -> dict:
        return {"name": name, "value": DASH if value is None else show(value), "note": note}

    return [
        fact("Speed-up", speedup(ours, dense, setting, backend), times,
             f"over dense, {backend} fp32, batch {batch}{interval(verdict)}"),
        fact("Over dull_best", verdict.gain_over_dull_best, times, f"on the target, {goal.target}"),
        fact("Quality loss", verdict.loss_upper95, percent, f"95 % bound; goal: {share(goal.max_quality_loss)}"),
        fact("BitOPs", ours.cost["bitops"] / dense.cost["bitops"], share, "of dense's"),
        fact("Size", ours.cost["size_bytes"], megabytes, f"dense: {megabytes(dense.cost['size_bytes'])}"),
    ]


def interval(verdict: Verdict) -> str:
    return "" if verdict.gain_low is None else f"; 95 %: {times(verdict.gain_low)} to {times(verdict.gain_high)}"


def megabytes(size: float) -> str:
    return f"{significant(size / 1e6)} MB"


def time_bars(walls: Mapping[str, float]) -> list[dict]:
    longest = max(walls.values(), default=1.0)
    return [{"stage": stage, "percent": f"{100 * seconds / longest:.1f}", "said": duration(seconds)}
            for stage, seconds in walls.items()]


def duration(seconds: float) -> str:
    """4.2 s, 3:05 min, 2:10 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
