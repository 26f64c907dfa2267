"""What fid and benchmark report, as rows: everything that is known of one variant."""

import re
from dataclasses import dataclass, field
from typing import Any

from tasks.core.recipe import VARIANTS

FID = re.compile(r"fid_\d+k?")
BATCH = re.compile(r"b(\d+)")


@dataclass(frozen=True, kw_only=True)
class Row:
    """quality, cost: the variant's blocks of reports/fid.json and reports/benchmark.json; speed: (backend, batch) -> numbers of
    reports/benchmark.timings.json; memory: backend -> bytes. A number that nobody took is missing, never a placeholder."""

    variant: str
    quality: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    speed: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def images_per_s(self, backend: str, batch: int) -> float | None:
        return self.speed.get((backend, batch), {}).get("images_per_s")


def read_rows(fid: dict, benchmark: dict, timings: dict) -> dict[str, Row]:
    """The three reports -> rows by variant, in the order of the table. Raises ValueError if dense is in none of them."""
    known = [name for name in VARIANTS if any(name in report for report in (fid, benchmark, timings))]
    if "dense" not in known:
        raise ValueError("reports/fid.json, reports/benchmark.json: no variant 'dense'; every row is compared with it")
    return {name: Row(variant=name, quality=fid.get(name, {}), cost=benchmark.get(name, {}),
                      speed=speeds(timings.get(name, {})), memory=memories(timings.get(name, {}))) for name in known}


def speeds(timings: dict) -> dict[tuple[str, int], dict[str, float]]:
    """{backend: {"b8": numbers, ...}} -> {(backend, 8): numbers}."""
    return {(backend, int(BATCH.fullmatch(key)[1])): numbers for backend, block in timings.items()
            for key, numbers in block.items() if BATCH.fullmatch(key)}


def memories(timings: dict) -> dict[str, int]:
    return {backend: block["peak_memory_bytes"] for backend, block in timings.items() if "peak_memory_bytes" in block}


def fid_key(rows: dict[str, Row]) -> str:
    """The name under which these rows hold their FID: it carries the number of samples."""
    found = next((key for key in rows["dense"].quality if FID.fullmatch(key)), None)
    if found is None:
        raise ValueError("reports/fid.json: dense has no fid_<samples>")
    return found


def settings(rows: dict[str, Row]) -> list[tuple[str, int]]:
    """Every (backend, batch) that was timed, the shipping backend first."""
    found = {setting for row in rows.values() for setting in row.speed}
    return sorted(found, key=lambda setting: (setting[0] == "eager", setting))


def speedup(row: Row, base: Row, setting: tuple[str, int], base_backend: str) -> float | None:
    """Images/s over those of `base` on `base_backend`, at the same batch."""
    ours, theirs = row.images_per_s(*setting), base.images_per_s(base_backend, setting[1])
    return ours / theirs if ours and theirs else None
