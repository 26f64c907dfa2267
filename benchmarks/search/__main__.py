"""Studies of the search. `python -m benchmarks.search efficiency [--few] [--strategy NAME] [--seed K] [--workers W]`,
`python -m benchmarks.search bitops [--few] [--only PART]`.

Numbers go to results.csv as they are had, evaluations to a log below runs/evolve: a stopped study goes on where it was. It runs
in an environment of its own below runs/search, which it builds once. `python -m benchmarks.search plot` draws what there is.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import results
from benchmarks.environment import Environment
from benchmarks.search.curves import BITOPS, SEEDS, STRATEGIES
from benchmarks.search.plot import draw

HOME, WORK = Path(__file__).parent, Path("runs/search")


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("efficiency", "bitops", "plot"))
    parser.add_argument("--few", action="store_true", help="a trial in a minute, below runs/search/few")
    parser.add_argument("--strategy", choices=STRATEGIES, help="one strategy")
    parser.add_argument("--only", choices=BITOPS, help="one part of bitops")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="one seed")
    parser.add_argument("--workers", type=int, default=1, help="processes that evaluate; results do not depend on it")
    return parser.parse_args(arguments)


def carry_out(asked: argparse.Namespace) -> None:
    work = WORK / ("few" if asked.few else "full")
    found = work / "results.csv" if asked.few else HOME / "results.csv"
    if asked.command == "efficiency":
        Environment("search").enter(sys.argv[1:])
        from benchmarks.search import efficiency  # torch and all; a plot needs none of it
        sizes = efficiency.FEW if asked.few else efficiency.FULL
        study = efficiency.Study(sizes, work, found, asked.workers)
        study.run(STRATEGIES if asked.strategy is None else (asked.strategy,),
                  sizes.seeds if asked.seed is None else (asked.seed,))
    if asked.command == "bitops":
        from benchmarks.search import bitops
        study = bitops.Study(bitops.FEW if asked.few else bitops.FULL, work, found, asked.workers)
        study.run(BITOPS if asked.only is None else [asked.only])
        return
    draw(results.read(found), found.with_name("curves.png"))


def main(arguments: list[str] | None = None) -> None:
    try:
        carry_out(parsed(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
