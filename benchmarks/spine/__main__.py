"""The spine's promises of time and sameness, measured in two fresh clones of the commit that is checked out.

`python -m benchmarks.spine` takes half an hour, writes results.csv as it goes, and goes on where it was stopped.
"""

import sys
from pathlib import Path

from benchmarks.spine.measure import STEPS, head, measure_all
from tasks.core.machine import describe

if __name__ == "__main__":
    try:
        commit = head(Path("."))
        measure_all(STEPS, commit, describe(), Path("runs/spine") / commit, Path(__file__).parent / "results.csv")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
