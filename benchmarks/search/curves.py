"""Hypervolume over evaluations: how few of them one strategy needs for what another has at its end."""

from collections.abc import Iterable, Mapping, Sequence

STRATEGIES = ("ours", "random", "tmpq_dm", "optuna")
SEEDS = (0, 1, 2)
EVALUATIONS = 1000  # of every search: N
MARGIN = 0.05       # relative FID increase that still counts as equal
FEW_STEPS = (5, 6)                     # at which searched lists are held against
SOLVERS = ("ddim", "dpm2m")            # that the studies of the search choose from
SPACINGS = ("uniform", "logsnr", "quadratic")  # of uniform bits
DULL_SPACINGS = SPACINGS[:2]           # of timesteps alone
EQUAL = "equal"
BITOPS = (EQUAL, *(f"steps{steps}" for steps in FEW_STEPS))  # parts of the study of BitOPs
Curve = Sequence[tuple[int, float]]  # (evaluations, hypervolume), by rising evaluations


def curves(rows: Iterable[Mapping], metric: str = "hypervolume") -> dict[tuple[str, int], Curve]:
    """(strategy, seed) -> curve, from the rows of results.csv; the count is the last part of the metric's name."""
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        study, _, strategy = row["variant"].partition(".")
        name, _, count = row["metric"].rpartition("@")
        if study == "efficiency" and name == metric:
            found.setdefault((strategy, int(row["seed"])), []).append((int(count), float(row["value"])))
    return {key: sorted(points) for key, points in found.items()}


def reached(curve: Curve, target: float) -> float:
    """Evaluations from which on the curve stays at the target or above; infinity if it ends below.

    On fresh noise a curve may fall: a candidate that was lucky in the search takes the place of a better one.
    """
    count = float("inf")
    for evaluations, value in reversed(curve):
        if value < target:
            break
        count = evaluations
    return count


def shares(found: Mapping[tuple[str, int], Curve], opponent: str) -> list[float]:
    """Of the opponent's evaluations, for every seed: what ours needs to reach what the opponent has at its end."""
    seeds = sorted(seed for strategy, seed in found if strategy == opponent and ("ours", seed) in found)
    ends = [found[opponent, seed][-1] for seed in seeds]
    return [reached(found["ours", seed], value) / count for seed, (count, value) in zip(seeds, ends, strict=True)]
