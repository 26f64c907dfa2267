"""What a claim is: a name, and a function of committed files that says its bar, what was measured and whether it holds."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.core.artifacts import read_json

GROUPS = ("spine", "sparsity", "cache", "search", "few_steps")


@dataclass(frozen=True)
class Outcome:
    bar: str
    measured: str
    holds: bool | None  # None: not measured

    @property
    def word(self) -> str:
        return {True: "holds", False: "falls short", None: "not measured"}[self.holds]


@dataclass(frozen=True)
class Claim:
    group: str
    name: str
    check: Callable[[Path], Outcome]  # given the top of the repository

    @property
    def id(self) -> str:
        return f"{self.group}.{self.name}"


CLAIMS: list[Claim] = []


def claim(group: str) -> Callable:
    """Register a function of the repository's top as the claim `<group>.<function's name>`."""
    assert group in GROUPS

    def register(check: Callable[[Path], Outcome]) -> Callable[[Path], Outcome]:
        CLAIMS.append(Claim(group, check.__name__, check))
        return check

    return register


def at_least(bar: float, found: list[float], unit: str = "") -> Outcome:
    """The smallest one decides."""
    return compared(f">= {bar:g}{unit}", min(found, default=None), unit, lambda value: value >= bar)


def at_most(bar: float, found: list[float], unit: str = "") -> Outcome:
    """The largest one decides."""
    return compared(f"<= {bar:g}{unit}", max(found, default=None), unit, lambda value: value <= bar)


def below(bar: float, found: list[float], unit: str = "") -> Outcome:
    """The largest one decides; the bar itself does not do."""
    return compared(f"< {bar:g}{unit}", max(found, default=None), unit, lambda value: value < bar)


def compared(bar: str, value: float | None, unit: str, holds: Callable[[float], bool]) -> Outcome:
    return Outcome(bar, "-", None) if value is None else Outcome(bar, f"{value:.4g}{unit}", holds(value))


def report(root: Path, name: str, scale: str = "quick") -> dict:
    """A published report; {} where there is none yet."""
    path = root / "reports" / scale / f"{name}.json"
    return read_json(path) if path.exists() else {}


def study(root: Path, name: str) -> list[dict]:
    """The rows of a study's results.csv; none where it has not run."""
    path = root / "benchmarks" / name / "results.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def values(rows: list[dict], metric: str) -> list[float]:
    """Of every machine and variant on which it was measured."""
    return [float(row["value"]) for row in rows if row["metric"] == metric]
