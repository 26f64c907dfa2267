"""The verdict in words and numbers: the goal met or the nearest that was feasible, and whether it beats what everyone has.

Quality is decided by the 95 % upper bound of fid's paired bootstrap alone: a loss that is not shown to be small is not small.
"""

from dataclasses import dataclass

from tasks.core.params import Goal
from tasks.core.quality import EQUAL
from tasks.report.results import Row, speedup
from tasks.report.table import percent, share, significant, times


@dataclass(frozen=True)
class Line:
    text: str
    good: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    met: bool                            # compressed holds the quality bound and reaches the goal
    beats_dull_best: bool                # at equal quality
    gain: float | None                   # what compressed reaches on the target, in the unit of the goal's key
    gain_over_dull_best: float | None    # factor; above 1 is better
    loss_upper95: float | None
    nearest: str | None                  # variant that comes nearest, where the goal is not met
    lines: tuple[Line, ...]              # dull_best first where it is not beaten


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The goal's target as arithmetic on rows. setting: (backend, batch) at which latency is judged."""

    goal: Goal
    dense: Row
    setting: tuple[str, int]

    def amount(self, row: Row) -> float | None:
        """latency: speed-up over dense on the same backend; bitops: share of dense's; size: bytes."""
        if self.goal.target == "latency":
            return speedup(row, self.dense, self.setting, self.setting[0])
        key = {"bitops": "bitops", "size": "size_bytes"}[self.goal.target]
        ours, theirs = row.cost.get(key), self.dense.cost.get(key)
        return ours / theirs if self.goal.target == "bitops" and ours and theirs else ours

    @property
    def wanted(self) -> float:
        goal = self.goal
        return {"latency": goal.min_speedup, "bitops": goal.max_bitops, "size": goal.max_size}[goal.target]

    def factor(self, amount: float, base: float) -> float:
        """How many times better `amount` is than `base`."""
        return amount / base if self.goal.target == "latency" else base / amount

    def spread(self, *rows: Row) -> float:
        """By how much timings of the same rows differ from round to round, relative; 0 for what is counted, not timed."""
        if self.goal.target != "latency":
            return 0.0
        return max(row.speed.get(self.setting, {}).get("spread", 0.0) for row in rows)

    def reached(self, row: Row) -> bool:
        """Beyond what timings differ by from round to round: a goal that is met by luck is not met."""
        amount = self.amount(row)
        return amount is not None and self.factor(amount, self.wanted) >= 1 + self.spread(row, self.dense)

    def phrase(self, amount: float | None) -> str:
        if amount is None:
            return "nothing measured on the target"
        return {"latency": f"{times(amount)} dense's images/s",
                "bitops": f"{share(amount)} of dense's BitOPs",
                "size": f"{significant(amount / 1e6)} MB"}[self.goal.target]


def judge(rows: dict[str, Row], goal: Goal, setting: tuple[str, int]) -> Verdict:
    scale, compressed = Scale(goal=goal, dense=rows["dense"], setting=setting), rows["compressed"]
    met = holds_quality(compressed, goal) and scale.reached(compressed)
    nearest = None if met else nearest_feasible(rows, scale)
    beats, factor = against_dull_best(rows, scale)
    goal_line = Line(said_of_goal(scale, compressed, met, nearest and rows[nearest]), met)
    dull_line = Line(said_of_dull_best(rows, scale, beats, factor), beats)
    return Verdict(met=met, beats_dull_best=beats, gain=scale.amount(compressed), gain_over_dull_best=factor,
                   loss_upper95=compressed.quality.get("loss_upper95"), nearest=nearest,
                   lines=(goal_line, dull_line) if beats else (dull_line, goal_line))


def holds_quality(row: Row, goal: Goal) -> bool:
    bound = 0.0 if row.variant == "dense" else row.quality.get("loss_upper95")
    return bound is not None and bound <= goal.max_quality_loss


def nearest_feasible(rows: dict[str, Row], scale: Scale) -> str:
    """The best on the target among the rows that hold the quality, shown after Holm's correction: one is chosen of many, and
    the luckiest of ten bounds is no evidence. dense always holds it."""
    feasible = [row for row in rows.values() if holds_quality(row, scale.goal) and scale.amount(row) is not None
                and (row.variant == "dense" or row.quality.get("loss_p_holm", 1.0) < 0.05)]
    return max(feasible, key=lambda row: scale.factor(scale.amount(row), scale.wanted), default=scale.dense).variant


def against_dull_best(rows: dict[str, Row], scale: Scale) -> tuple[bool, float | None]:
    """-> (beats it at equal quality, factor on the target)."""
    compressed, dull = rows["compressed"], rows["dull_best"]
    ours, theirs = scale.amount(compressed), scale.amount(dull)
    bound = compressed.quality.get("loss_to_dull_best_upper95")
    if not ours or not theirs:
        return False, None
    factor = scale.factor(ours, theirs)
    return factor > 1 + scale.spread(compressed, dull) and bound is not None and bound <= EQUAL, factor


# ---- words ----

def said_of_goal(scale: Scale, compressed: Row, met: bool, nearest: Row | None) -> str:
    wanted = f"{scale.phrase(scale.wanted)} at a quality loss of at most {share(scale.goal.max_quality_loss)}"
    got = f"compressed: {scale.phrase(scale.amount(compressed))}, {said_of_loss(compressed)}"
    if met:
        return f"Goal met. Wanted: {wanted}. {got}."
    if nearest.variant == "dense":
        return f"Goal not met. Wanted: {wanted}. {got}. No variant but dense itself is shown to keep that quality."
    return (f"Goal not met. Wanted: {wanted}. {got}. Nearest that was feasible: {nearest.variant}, "
            f"{scale.phrase(scale.amount(nearest))}, {said_of_loss(nearest)}.")


def said_of_loss(row: Row) -> str:
    if "loss_upper95" not in row.quality:
        return "quality not measured"
    return f"quality loss {percent(row.quality['loss'])}, 95 % bound {percent(row.quality['loss_upper95'])}"


def said_of_dull_best(rows: dict[str, Row], scale: Scale, beats: bool, factor: float | None) -> str:
    compressed, dull = rows["compressed"], rows["dull_best"]
    head = f"compressed {'beats' if beats else 'does not beat'} dull_best"
    if qualifies(dull) and equal(compressed):
        head += " at equal quality"
    if factor is None:
        return f"{head}: {scale.goal.target} was not measured for both."
    amounts = f"{scale.phrase(scale.amount(compressed))} against {scale.phrase(scale.amount(dull))}"
    if spread := scale.spread(compressed, dull):
        amounts += f", timings spread by {share(spread)}"
    return (f"{head}: {times(factor)} as good on the target, {scale.goal.target} ({amounts}); "
            f"{said_of_equality(compressed, dull)}")


def said_of_equality(compressed: Row, dull: Row) -> str:
    bound = compressed.quality.get("loss_to_dull_best_upper95")
    if bound is None:
        return "their quality was not compared."
    samples = f"{dull.quality.get('selection_samples', 'the')} selection samples"
    weak = f" No point of the dull front reached compressed's quality on {samples}; dull_best is the one of the lowest FID."
    better = f" They are not of equal quality: compressed is shown to be the better one, which {samples} did not tell."
    return (f"95 % bound of the quality loss to it {percent(bound)}, where up to {share(EQUAL)} is called equal."
            f"{('' if equal(compressed) else better) if qualifies(dull) else weak}")


def equal(compressed: Row) -> bool:
    """Not shown to be the better one; whether it is shown to be no worse is for the verdict to say."""
    bound = compressed.quality.get("loss_to_dull_best_upper95")
    return bound is None or bound >= 0


def qualifies(dull: Row) -> bool:
    """Whether dull_best was selected as one of compressed's quality, not as the best that there was."""
    return dull.quality.get("as_good_as_compressed", True)
