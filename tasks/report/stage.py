"""The verdict in words, the result table and the plots: one HTML file to read and send, one text for the terminal.

Reads: every stage's artifacts, reports/*.json and *.timings.json, runs/<stage>.json where stages ran on this machine.
Writes: report.html (self-contained), results.csv (variant, metric, value, protocol), summary.txt (what `make run` prints last);
report: the verdict as numbers. Exempt from hash equality: it shows what was timed.
Left out: a comparison of several runs (`dvc metrics diff` and `dvc plots` do that).
"""

import csv
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.core.artifacts import ARTIFACTS, REPORTS, RUNS, Inputs, Report, read_json
from tasks.core.params import Goal, check_choice, check_range
from tasks.core.teacher import doubt
from tasks.report.page import Page, facts, render
from tasks.report.picture import PICTURE, picture, read_samples
from tasks.report.results import Row, read_rows, settings
from tasks.report.sections import all_plots, sheets
from tasks.report.table import Column, all_columns, caption, compact_columns, long_form, terminal
from tasks.report.verdict import Verdict, judge

INPUTS = ("data", "pretrain_load", "profile", "mask_search", "solver_learn", "distill", "cache_learn", "evolve", "finish",
          "package", "fid", "benchmark")
WIDTH = 100  # characters of summary.txt


@dataclass(frozen=True, kw_only=True)
class Params:
    goal: Goal
    backend: str   # on which latency is judged, and the compact table shows speed
    batch: int     # the same; one of benchmark's
    images: int    # shown of each variant
    columns: int   # of them side by side

    def __post_init__(self):
        check_choice("report.backend", self.backend, ("openvino", "eager"))
        for name, low, high in (("batch", 1, 4096), ("columns", 1, 40), ("images", self.columns, 40)):
            check_range(f"report.{name}", getattr(self, name), low, high)


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    fid, timings = read_json(REPORTS / "fid.json"), read_json(REPORTS / "benchmark.timings.json")
    rows, setting = read_rows(fid, read_json(REPORTS / "benchmark.json"), timings), (params.backend, params.batch)
    teacher = read_json(REPORTS / "pretrain_load.json")
    check_setting(rows, setting)
    verdict = judge(rows, params.goal, setting, doubt(teacher))
    columns, runs = all_columns(rows, setting), read_runs()

    page = Page(subject=subject(), verdict=verdict, facts=facts(rows, verdict, params.goal, setting),
                rows=rows, columns=columns, caption=caption(rows, setting, timings, teacher),
                sheets=sheets(inputs["fid"], rows, params.images, params.columns),
                plots=all_plots(rows, setting, inputs, params.goal.target),
                walls={stage: record["wall_s"] for stage, record in runs.items()},
                protocol=protocol(fid, timings, runs), commit=newest_commit(runs))
    (out / "report.html").write_text(render(page))
    picture(read_samples(inputs["fid"]), rows, setting, params.columns).save(out / PICTURE, optimize=True)
    (out / "summary.txt").write_text(summary(rows, setting, verdict))
    write_results(out / "results.csv", rows, columns, fid, timings)
    return Report(numbers(verdict, setting))


def check_setting(rows: dict[str, Row], setting: tuple[str, int]) -> None:
    timed = settings(rows)
    if setting not in timed:
        known = ", ".join(f"{backend} {batch}" for backend, batch in timed)
        raise ValueError(f"report.backend, report.batch: {setting[0]} {setting[1]} was not timed; benchmark timed {known}")


def read_runs() -> dict[str, dict]:
    """Of each upstream stage the record of its last run here, in the order of the DAG; none where it never ran here."""
    return {stage: read_json(RUNS / f"{stage}.json") for stage in INPUTS if (RUNS / f"{stage}.json").exists()}


def newest_commit(runs: dict[str, dict]) -> str:
    """Of the stage that ran last: upstream stages may be fresh for many commits. Empty where none ran here."""
    return max(runs.values(), key=lambda record: record["started"])["commit"] if runs else ""


def subject() -> str:
    """What was compressed, in a line."""
    data, teacher = read_json(REPORTS / "data.json"), read_json(REPORTS / "pretrain_load.json")
    parts = [f"teacher of {teacher['parameters'] / 1e6:.2f} M parameters", f"{data['train']} training images"]
    parts += [f"class accuracy {100 * teacher['class_accuracy']:.1f} %"] if "class_accuracy" in teacher else []
    return ", ".join(parts)


def protocol(fid: dict, timings: dict, runs: dict[str, dict]) -> list[tuple[str, str]]:
    """(name, value) lines: everything that a number of this report depends on."""
    versions = {name: runs["benchmark"][name] for name in ("torch", "python") if "benchmark" in runs}
    blocks = {"machine": timings["machine"] | versions, "speed": timings["protocol"], "load": timings.get("load", {}),
              "quality": fid["protocol"]}
    return [(f"{block}: {name}", said(value)) for block, values in blocks.items() for name, value in values.items()]


def said(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


def summary(rows: dict[str, Row], setting: tuple[str, int], verdict: Verdict) -> str:
    """What `make run` prints last: verdict, table, where to read on; at most WIDTH characters wide."""
    paragraphs = [textwrap.fill(line.text, WIDTH) for line in verdict.lines]
    where = f"Speed: {setting[0]}, batch {setting[1]}. Report: {ARTIFACTS / 'report' / 'report.html'}"
    return "\n\n".join([*paragraphs, terminal(rows, compact_columns(rows, setting)), where]) + "\n"


def write_results(path: Path, rows: dict[str, Row], columns: list[Column], fid: dict, timings: dict) -> None:
    """Long form; protocol: what a metric's name does not say."""
    machine = f"{timings['machine']['cpu']}, {timings['protocol']['threads']} threads"
    judged = "; ".join(f"{name}: {said(value)}" for name, value in fid["protocol"].items())
    protocols = {"quality": judged, "more on quality": judged, "cost": "per image, all steps; bytes on disk"}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("variant", "metric", "value", "protocol"))
        for variant, column, value in long_form(rows, columns):
            writer.writerow((variant, column.metric, value, protocols.get(column.group, machine)))


def numbers(verdict: Verdict, setting: tuple[str, int]) -> dict:
    """Without what does not exist: DVC compares numbers."""
    found = {name: value for name, value in asdict(verdict).items() if name != "lines" and value is not None}
    return found | {"backend": setting[0], "batch": setting[1]}
