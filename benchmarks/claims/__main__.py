"""Every claim that the README or a "how good" makes, computed from committed files and printed: id, bar, measured, verdict.

`python -m benchmarks.claims [--only GROUP]`; exit status 0 if all hold. A claim whose rows are not there, or leave something
out, is "not measured": nothing is measured here.
"""

import argparse
from pathlib import Path

from benchmarks.claims import cache, few_steps, search, sparsity, spine  # noqa: F401 (each registers its claims)
from benchmarks.claims.claim import CLAIMS, GROUPS, Claim


def table(claims: list[Claim], root: Path) -> tuple[str, bool]:
    """-> the lines to print, and whether all hold."""
    outcomes = [(c.id, o.bar, o.measured, o.word) for c in claims for o in [c.check(root)]]
    rows = [("claim", "bar", "measured", ""), *outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
    return "\n".join(lines), all(word == "holds" for *_, word in outcomes)


def main(arguments: list[str] | None = None, root: Path = Path(".")) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=GROUPS, help="one group of claims")
    only = parser.parse_args(arguments).only
    text, good = table([c for c in CLAIMS if only in (None, c.group)], root)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
