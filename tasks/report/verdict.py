"""The verdict in words and numbers: the goal met or the nearest that was feasible, and whether it beats what everyone has.

The goal has two bounds, and it is met where both are shown to hold: that of quality by the 95 % upper bound of fid's paired
bootstrap, that of speed by the 95 % interval of benchmark's paired rounds (BitOPs and bytes are counted, so they are certain).
What is not shown to hold, does not hold; the sentence says of each bound what was wanted, what was measured and how certain
that is, so it names what was missing. `met` is made of the same parts as the sentence.
"""

from dataclasses import dataclass

from tasks.core.params import Goal
from tasks.core.quality import EQUAL
from tasks.report.results import Row, speedup
from tasks.report.table import apart, percent, share, significant, times


@dataclass(frozen=True)
class Line:
    text: str
    good: bool


@dataclass(frozen=True)
class Part:
    """One bound: whether it is shown to hold, and the clause that says so."""

    holds: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    met: bool                            # compressed holds the quality bound and reaches the goal, both for certain
    beats_dull_best: bool                # at equal quality, for certain
    gain: float | None                   # what compressed reaches on the target, in the unit of the goal's key
    gain_low: float | None               # 95 % interval of that, where it is timed and there is one
    gain_high: float | None
    gain_over_dull_best: float | None    # factor; above 1 is better
    loss_upper95: float | None
    nearest: str | None                  # variant that comes nearest, where the goal is not met
    worth_compressing: bool              # whether the teacher is
    lines: tuple[Line, ...]              # what speaks against the teacher first; then dull_best where it is not beaten


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The goal's target as arithmetic on rows. setting: (backend, batch) at which latency is judged."""

    goal: Goal
    dense: Row
    setting: tuple[str, int]

    @property
    def timed(self) -> bool:
        return self.goal.target == "latency"

    def amount(self, row: Row) -> float | None:
        """latency: speed-up over dense on the same backend; bitops: share of dense's; size: bytes."""
        if self.timed:
            return speedup(row, self.dense, self.setting, self.setting[0])
        key = {"bitops": "bitops", "size": "size_bytes"}[self.goal.target]
        ours, theirs = row.cost.get(key), self.dense.cost.get(key)
        return ours / theirs if self.goal.target == "bitops" and ours and theirs else ours

    def certain(self, row: Row, name: str = "speedup") -> tuple[float, float] | None:
        """Between what a timed ratio lies for certain; None without rounds enough. name: which of the row's intervals."""
        numbers = row.speed.get(self.setting, {})
        return (numbers[f"{name}_low"], numbers[f"{name}_high"]) if f"{name}_low" in numbers else None

    @property
    def wanted(self) -> float:
        goal = self.goal
        return {"latency": goal.min_speedup, "bitops": goal.max_bitops, "size": goal.max_size}[goal.target]

    def factor(self, amount: float, base: float) -> float:
        """How many times better `amount` is than `base`."""
        return amount / base if self.timed else base / amount

    def phrase(self, amount: float | None) -> str:
        if amount is None:
            return "nothing measured on the target"
        return {"latency": f"{times(amount)} dense's images/s",
                "bitops": f"{share(amount)} of dense's BitOPs",
                "size": f"{significant(amount / 1e6)} MB"}[self.goal.target]


def judge(rows: dict[str, Row], goal: Goal, setting: tuple[str, int], doubt: str | None = None) -> Verdict:
    """doubt: why the teacher is not worth compressing, if it is not; then that is said first."""
    scale, compressed = Scale(goal=goal, dense=rows["dense"], setting=setting), rows["compressed"]
    parts = (target_part(scale, compressed), quality_part(compressed, goal))
    met = all(part.holds for part in parts)
    nearest = None if met else nearest_feasible(rows, scale)
    duel = target_duel(scale, compressed, rows["dull_best"]), quality_duel(compressed, rows["dull_best"])
    beats = all(part.holds for part in duel)
    goal_line = Line(said_of_goal(scale, parts, met, nearest and rows[nearest]), met)
    dull_line = Line(said_of_dull_best(rows, duel, beats), beats)
    low, high = scale.timed and scale.certain(compressed) or (None, None)
    return Verdict(met=met, beats_dull_best=beats, gain=scale.amount(compressed), gain_low=low, gain_high=high,
                   gain_over_dull_best=over_dull_best(scale, compressed, rows["dull_best"]),
                   loss_upper95=compressed.quality.get("loss_upper95"), nearest=nearest, worth_compressing=doubt is None,
                   lines=(*([Line(doubt, False)] if doubt else []),
                          *((goal_line, dull_line) if beats else (dull_line, goal_line))))


def holds_quality(row: Row, goal: Goal) -> bool:
    bound = 0.0 if row.variant == "dense" else row.quality.get("loss_upper95")
    return bound is not None and bound <= goal.max_quality_loss


def nearest_feasible(rows: dict[str, Row], scale: Scale) -> str:
    """The best on the target among the rows that hold the quality, shown after Holm's correction: one is chosen of many, and
    the luckiest of ten bounds is no evidence. dense always holds it; compressed was named before any was measured."""
    feasible = [row for row in rows.values() if holds_quality(row, scale.goal) and scale.amount(row) is not None
                and (row.variant in ("dense", "compressed") or row.quality.get("loss_p_holm", 1.0) < 0.05)]
    return max(feasible, key=lambda row: scale.factor(scale.amount(row), scale.wanted), default=scale.dense).variant


def over_dull_best(scale: Scale, compressed: Row, dull: Row) -> float | None:
    """How many times as good compressed is on the target."""
    ours, theirs = scale.amount(compressed), scale.amount(dull)
    return scale.factor(ours, theirs) if ours and theirs else None


# ---- the parts of both verdicts ----

def target_part(scale: Scale, row: Row) -> Part:
    """The row against the goal's bound on the target."""
    amount, wanted = scale.amount(row), scale.wanted
    name = {"latency": "Images/s against dense's", "bitops": "BitOPs against dense's", "size": "Size"}[scale.goal.target]
    at = "at least" if scale.timed else "at most"
    if amount is None:
        return Part(False, f"{name}: wanted {at} {said_amount(scale, wanted)[0]}, not measured")
    if scale.timed:
        return timed_part(f"{name}: wanted {at}", wanted, amount, scale.certain(row), row.speed[scale.setting].get("repeats"))
    holds, (asked, found) = amount <= wanted, said_amount(scale, wanted, amount)
    return Part(holds, f"{name}: wanted {at} {asked}, counted {found}: {'reached' if holds else 'missed'}")


def said_amount(scale: Scale, *amounts: float) -> list[str]:
    unit, sign = {"latency": ("1", "×"), "bitops": ("0.01", " %"), "size": ("1e6", " MB")}[scale.goal.target]
    return [f"{text}{sign}" for text in apart(amounts, unit)]


def timed_part(head: str, wanted: float, ratio: float, certain: tuple[float, float] | None, rounds: int | None) -> Part:
    """A ratio of timings against the least that was wanted. certain: its 95 % interval, if there are rounds enough for one."""
    asked, found, *ends = (f"{text}×" for text in apart([wanted, ratio, *(certain or ())]))
    said = f"{head} {asked}, measured {found}"
    beyond = "reached" if ratio >= wanted else "missed"
    if certain is None:
        return Part(False, f"{said}: {beyond} as measured, but {rounds or 'no'} rounds are too few to be certain")
    low, high = certain
    said += f", {ends[0]} to {ends[1]} for certain (95 % interval of {rounds} rounds)"
    if low <= wanted <= high and low < wanted:
        return Part(False, f"{said}: {beyond} as measured, but not for certain")
    return Part(low >= wanted, f"{said}: {beyond}")


def quality_part(row: Row, goal: Goal) -> Part:
    if "loss_upper95" not in row.quality:
        return Part(False, f"Quality loss: wanted at most {share(goal.max_quality_loss)}, not measured")
    return loss_part("Quality loss: wanted at most", goal.max_quality_loss, row.quality["loss"], row.quality["loss_upper95"])


def loss_part(head: str, most: float, loss: float, upper: float) -> Part:
    """upper: 95 % bound; the lower one lies as far on the other side (fid's bounds are those of a normal distribution)."""
    lower = 2 * loss - upper
    asked, found, bound, floor = apart((most, loss, upper, lower), "0.01", places=1, sign="+")
    said = f"{head} {asked.removeprefix('+')} %, measured {found} %, at most {bound} % for certain (95 % bound)"
    if upper <= most:
        return Part(True, f"{said}: held")
    if loss <= most:
        return Part(False, f"{said}: held as measured, but not for certain")
    return Part(False, f"{said}, at least {floor} %: missed{'' if lower > most else ' as measured, but not for certain'}")


def target_duel(scale: Scale, compressed: Row, dull: Row) -> Part:
    """compressed against dull_best on the target."""
    factor, target = over_dull_best(scale, compressed, dull), scale.goal.target
    if factor is None:
        return Part(False, f"{target} was not measured for both")
    amounts = f"{scale.phrase(scale.amount(compressed))} against {scale.phrase(scale.amount(dull))}"
    if not scale.timed:
        return Part(factor > 1, f"{apart([1.0, factor])[1]}× as good on {target} ({amounts}): {rank(factor)}")
    rounds, certain = compressed.speed[scale.setting].get("repeats"), scale.certain(compressed, "over_dull_best")
    if certain is None:
        return Part(False, f"{apart([1.0, factor])[1]}× as good on {target} ({amounts}): {rank(factor)} as measured, but "
                           f"{rounds or 'no'} rounds are too few to be certain")
    _, found, low, high = apart([1.0, factor, *certain])
    said = (f"{found}× as good on {target}, {low}× to {high}× for certain (95 % interval of {rounds} rounds; {amounts}): "
            f"{rank(factor)}")
    sure = certain[0] > 1 or certain[1] < 1
    return Part(certain[0] > 1, said if sure else f"{said} as measured, but not for certain")


def rank(factor: float) -> str:
    return "better" if factor > 1 else "worse" if factor < 1 else "the same"


def quality_duel(compressed: Row, dull: Row) -> Part:
    """compressed is shown to be of dull_best's quality, or better."""
    bound = compressed.quality.get("loss_to_dull_best_upper95")
    if bound is None:
        return Part(False, "their quality was not compared")
    most, found = apart((EQUAL, bound), "0.01", places=1, sign="+")
    said = (f"quality loss to it at most {found} % for certain (95 % bound), where up to {most.removeprefix('+')} % is called "
            "equal")
    if bound > EQUAL:
        return Part(False, f"{said}: not shown to be equal")
    samples = f"{dull.quality.get('selection_samples', 'the')} selection samples"
    if not qualifies(dull):
        return Part(True, f"{said}: no worse. No point of the dull front reached compressed's quality on {samples}; dull_best "
                          "is the one of the lowest FID")
    if bound < 0:
        return Part(True, f"{said}: compressed is shown to be the better one, which {samples} did not tell")
    return Part(True, f"{said}: equal")


# ---- words ----

def said_of_goal(scale: Scale, parts: tuple[Part, ...], met: bool, nearest: Row | None) -> str:
    said = f"Goal {'met' if met else 'not met'} by compressed. {'. '.join(part.text for part in parts)}."
    if met:
        return said
    if nearest.variant == "dense":
        return f"{said} No variant but dense itself is shown to keep that quality."
    if nearest.variant == "compressed":
        return f"{said} No variant that is shown to keep that quality comes nearer."
    reached = scale.phrase(scale.amount(nearest))
    return f"{said} Nearest that was feasible: {nearest.variant}, {reached}, {said_of_loss(nearest)}."


def said_of_loss(row: Row) -> str:
    if "loss_upper95" not in row.quality:
        return "quality not measured"
    return f"quality loss {percent(row.quality['loss'])}, 95 % bound {percent(row.quality['loss_upper95'])}"


def said_of_dull_best(rows: dict[str, Row], duel: tuple[Part, Part], beats: bool) -> str:
    verb = "beats" if beats else "is not shown to beat"
    return f"compressed {verb} dull_best: {'; '.join(part.text for part in duel)}."


def qualifies(dull: Row) -> bool:
    """Whether dull_best was selected as one of compressed's quality, not as the best that there was."""
    return dull.quality.get("as_good_as_compressed", True)
