"""A study's results.csv: long form, a row a number, replaced whole or not at all, so that a kill leaves the rows of before."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

COLUMNS = ("teacher", "variant", "seed", "metric", "value", "protocol")


def read(results: Path) -> list[dict]:
    """Values as they stand in the file, strings; no rows where there is no file."""
    if not results.exists():
        return []
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def write(results: Path, rows: Iterable[Mapping], columns: Sequence[str] = COLUMNS) -> None:
    partial = results.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(results)


def append(results: Path, rows: Iterable[Mapping], columns: Sequence[str] = COLUMNS) -> None:
    write(results, [*read(results), *rows], columns)
