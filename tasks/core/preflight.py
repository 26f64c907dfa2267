"""`python -m tasks.core.preflight`: refuse what can be refused before a stage runs. `make run` does so, `dvc repro` not."""

import argparse
import sys
from collections.abc import Sequence

from tasks.core.params import SCALES, validate_all


def main(arguments: Sequence[str] = ()) -> int:
    """-> exit status: 2 where something is refused, in one line. arguments: of a flow; of these `--scale` counts here."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--scale")
    if {"-h", "--help"}.intersection(arguments):
        return 0
    scale = parser.parse_known_args(arguments)[0].scale
    try:
        validate_all(scale=scale if scale in SCALES else None)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
