"""Met only by what is certain; each bound with what was wanted, measured and missing; not beating what everyone has first."""

import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.core.params import Goal
from tasks.report.results import Row, read_rows
from tasks.report.table import apart
from tasks.report.verdict import judge
from tests.unit.report.example import GOAL, NUMBERS, benchmark_reports, fid_report

SETTING = ("openvino", 32)


def rows_with(compressed=None, quality=None, speed=None):
    """The example's rows with another line of numbers for compressed, or with some of its quality or its speed changed."""
    numbers = NUMBERS | ({"compressed": compressed} if compressed else {})
    fid = fid_report(numbers)
    fid["compressed"] |= quality or {}
    rows = read_rows(fid, *benchmark_reports(numbers))
    rows["compressed"].speed[SETTING].update(speed or {})
    return rows


def goal_line(found):
    return next(line.text for line in found.lines if line.text.startswith("Goal"))


def dull_line(found):
    return next(line.text for line in found.lines if line.text.startswith("compressed"))


def test_met_and_beaten():
    found = judge(rows_with(), GOAL, SETTING)
    assert found.met and found.beats_dull_best and found.nearest is None
    assert found.gain == 14 and found.gain_over_dull_best == 840 / 610
    assert (found.gain_low, found.gain_high) == (0.96 * 14, 1.04 * 14)
    assert found.lines[0].text == (
        "Goal met by compressed. Images/s against dense's: wanted at least 8.00×, measured 14.00×, 13.44× to 14.56× for "
        "certain (95 % interval of 9 rounds): reached. Quality loss: wanted at most 5.0 %, measured +1.9 %, at most +4.5 % for "
        "certain (95 % bound): held.")
    assert found.lines[1].text == (
        "compressed beats dull_best: 1.38× as good on latency, 1.32× to 1.43× for certain (95 % interval of 9 rounds; 14.0× "
        "dense's images/s against 10.2× dense's images/s): better; quality loss to it at most +3.0 % for certain (95 % bound), "
        "where up to 5.0 % is called equal: equal.")


def test_the_verdict_that_contradicted_its_numbers_says_what_was_missing():
    """Wanted 5.00x at 5 %; 5.15x was measured with a spread of 11.5 %, and the bound of the loss was +2.3 %."""
    rows = rows_with((9, 5.45, 0.023, 1.3, 309.0, 2_600_000), speed={"speedup_low": 4.62, "speedup_high": 5.6, "repeats": 3})
    found = judge(rows, replace(GOAL, min_speedup=5.0), SETTING)
    assert not found.met
    said = goal_line(found)
    assert "wanted at least 5.00×, measured 5.15×, 4.62× to 5.60× for certain (95 % interval of 3 rounds): reached as " \
           "measured, but not for certain." in said
    assert "wanted at most 5.0 %, measured +0.9 %, at most +2.3 % for certain (95 % bound): held." in said


def test_too_few_rounds_for_an_interval_are_said():
    rows = rows_with()
    for key in ("speedup_low", "speedup_high"):
        del rows["compressed"].speed[SETTING][key]
    found = judge(rows, GOAL, SETTING)
    assert not found.met and found.gain_low is None
    assert "measured 14.00×: reached as measured, but 9 rounds are too few to be certain." in goal_line(found)


def test_a_good_estimate_with_a_bound_above_the_tolerance_does_not_meet_the_goal():
    found = judge(rows_with(quality={"loss": -0.01, "loss_upper95": 0.051}), GOAL, SETTING)
    assert not found.met
    assert found.nearest == "precision"  # the fastest of the two rows within 5 %
    assert "at most +5.1 % for certain (95 % bound): held as measured, but not for certain." in goal_line(found)
    assert "Nearest that was feasible: precision, 6.58×" in goal_line(found)


def test_a_loss_is_missed_for_certain_where_its_lower_bound_is_above():
    assert "at least +6.0 %: missed." in goal_line(judge(rows_with(quality={"loss": 0.08, "loss_upper95": 0.1}), GOAL, SETTING))
    assert "at least +2.0 %: missed as measured, but not for certain." in goal_line(
        judge(rows_with(quality={"loss": 0.06, "loss_upper95": 0.1}), GOAL, SETTING))


def test_a_dull_best_of_lower_quality_is_not_called_equal():
    said = judge(rows_with(quality={"loss_to_dull_best_upper95": -0.1}), GOAL, SETTING).lines
    assert any(line.text.endswith(": compressed is shown to be the better one, which the selection samples did not tell.")
               for line in said)


def test_the_nearest_of_many_has_to_stand_holms_correction():
    rows = rows_with(quality={"loss": -0.01, "loss_upper95": 0.051})
    rows["precision"].quality["loss_p_holm"] = 0.06
    assert judge(rows, GOAL, SETTING).nearest == "dense"


def test_holms_correction_is_of_those_that_are_chosen_from_and_compressed_is_not():
    """Its bound is said to hold: that nobody else keeps the quality is no contradiction then."""
    rows = rows_with(quality={"loss": 0.03, "loss_upper95": 0.0499, "loss_p_holm": 0.3},
                     speed={"images_per_s": 240.0, "speedup_low": 3.9, "speedup_high": 4.1})
    for name, row in rows.items():
        if name not in ("dense", "compressed"):
            row.quality["loss_upper95"] = 1.0
    said = goal_line(judge(rows, GOAL, SETTING))
    assert ": held." in said and "No variant but dense itself is shown to keep that quality" not in said


def test_quality_that_nobody_measured_is_not_met():
    rows = rows_with()
    del rows["compressed"].quality["loss_upper95"]
    found = judge(rows, GOAL, SETTING)
    assert not found.met and "Quality loss: wanted at most 5.0 %, not measured." in goal_line(found)


def test_speed_that_nobody_measured_is_not_met():
    rows = rows_with()
    rows["compressed"].speed.clear()
    found = judge(rows, GOAL, SETTING)
    assert not found.met and not found.beats_dull_best
    assert "wanted at least 8.00×, not measured" in goal_line(found) and "latency was not measured for both" in dull_line(found)


def test_dense_is_the_nearest_when_nothing_else_is_good_enough():
    found = judge(rows_with(), replace(GOAL, max_quality_loss=0.0), SETTING)
    assert found.nearest == "dense"
    assert found.lines[0].text.endswith("No variant but dense itself is shown to keep that quality.")


@pytest.mark.parametrize("speed, bound, why", [
    (580.0, 0.03, "0.95× as good on latency, 0.91× to 0.99× for certain (95 % interval of 9 rounds; 9.67× dense's images/s "
                  "against 10.2× dense's images/s): worse;"),
    (620.0, 0.03, "): better as measured, but not for certain;"), (600.0, 0.03, "): worse as measured, but not for certain;"),
    (840.0, 0.06, "at most +6.0 % for certain (95 % bound), where up to 5.0 % is called equal: not shown to be equal."),
    (840.0, None, "their quality was not compared.")])
def test_not_beating_dull_best_is_the_first_line(speed, bound, why):
    rows = rows_with((9, 5.5, 0.045, 1.3, speed, 2_600_000), {"loss_to_dull_best_upper95": bound})
    found = judge(rows, GOAL, SETTING)
    assert not found.beats_dull_best and not found.lines[0].good and found.lines[1].good
    assert found.lines[0].text.startswith("compressed is not shown to beat dull_best: ") and why in found.lines[0].text


def test_a_dull_best_that_is_worse_than_compressed_is_said_to_be():
    rows = rows_with()
    rows["dull_best"].quality.update(as_good_as_compressed=False, selection_samples=200)
    text = judge(rows, GOAL, SETTING).lines[1].text
    assert text.startswith("compressed beats dull_best: 1.38×") and "equal:" in text
    assert text.endswith("No point of the dull front reached compressed's quality on 200 selection samples; "
                         "dull_best is the one of the lowest FID.")


def test_bitops_count_as_a_share_of_dense():
    goal = replace(GOAL, target="bitops", max_bitops=0.2)
    found = judge(rows_with(), goal, SETTING)
    assert found.met and found.gain == 9 / 50 and found.gain_low is None
    assert "BitOPs against dense's: wanted at most 20.0 %, counted 18.0 %: reached." in goal_line(found)
    assert found.gain_over_dull_best == pytest.approx(13 / 9)
    assert not judge(rows_with(), replace(goal, max_bitops=0.1), SETTING).met


def test_size_counts_in_bytes():
    goal = replace(GOAL, target="size", max_size=2_600_000)
    found = judge(rows_with(), goal, SETTING)
    assert found.met and not found.beats_dull_best  # dull_best is smaller
    assert "0.96× as good on size (2.60 MB against 2.50 MB): worse" in found.lines[0].text
    missed = judge(rows_with(), replace(goal, max_size=2_599_999), SETTING)
    assert "Size: wanted at most 2.599999 MB, counted 2.600000 MB: missed." in goal_line(missed)


def test_numbers_are_told_apart_from_the_bound_they_are_compared_with():
    assert apart([5, 4.996, 6.1]) == ["5.000", "4.996", "6.100"]
    assert apart([5, 5.0, 4.2]) == ["5.00", "5.00", "4.20"]
    assert apart([0.05, 0.0504, -0.01], "0.01", places=1, sign="+") == ["+5.00", "+5.04", "-1.00"]


# ---- no sentence contradicts its numbers: the sentence is read again, and decided from what it says ----

NUMBER = r"([+-]?[\d.]+)"


def holds(clause):
    """Decide one clause from the numbers in it: whether what it says is certain lies within what it says was wanted."""
    kind, wanted = re.search(rf"wanted at (least|most) {NUMBER}", clause).groups()
    found = re.search(rf"(?:counted|at most) {NUMBER}(?: %| MB)(?: for certain|:)", clause.partition("wanted at ")[2])
    ends = re.search(rf"{NUMBER}× to {NUMBER}× for certain", clause)
    if kind == "least":
        return ends is not None and float(ends[1]) >= float(wanted)
    return found is not None and float(found[1]) <= float(wanted)


def as_measured(clause):
    """Decide it from what was measured alone; None where nothing was."""
    kind, wanted = re.search(rf"wanted at (least|most) {NUMBER}", clause).groups()
    found = re.search(rf"(?:measured|counted) {NUMBER}", clause)
    if found is None:
        return None
    return float(found[1]) >= float(wanted) if kind == "least" else float(found[1]) <= float(wanted)


def measured(low, high):
    """Multiples of 1e-12: what is measured is not closer to a bound than that."""
    return st.integers(round(low * 1e12), round(high * 1e12)).map(lambda k: k / 1e12)


ratios = st.one_of(measured(0.2, 40), st.sampled_from([1.0, 4.999999, 5.0, 5.0000001, 8.0]))
losses = st.one_of(measured(-0.9, 60), measured(-0.1, 0.1), st.sampled_from([0.0, 0.05, 0.050000000000000044, 0.0499999]))


@settings(deadline=None, max_examples=300)
@given(target=st.sampled_from(["latency", "bitops", "size"]), wanted=st.one_of(measured(1, 40), st.just(5.0)),
       most=st.one_of(measured(0, 1), st.just(0.05)), ratio=ratios, dull=ratios, apart=measured(0, 0.4), known=st.booleans(),
       loss=losses, error=measured(0, 0.05), bound=st.one_of(losses, st.none()), judged=st.booleans())
@example(target="latency", wanted=5.0, most=0.05, ratio=5.15, dull=5.0, apart=0.1, known=True, loss=0.01, error=0.008,
         bound=0.02, judged=True)
def test_every_sentence_agrees_with_the_verdict(target, wanted, most, ratio, dull, apart, known, loss, error, bound, judged):
    goal = Goal(target=target, max_quality_loss=most, min_speedup=wanted, max_bitops=1 / wanted, max_size=int(1e7 / wanted))
    speeds = {"dense": 1.0, "dull_best": dull, "compressed": ratio}
    numbers = {name: speed_of(value, apart, known) for name, value in speeds.items()}
    if known:
        numbers["compressed"] |= ends("over_dull_best", ratio / dull, apart)
    costs = {name: {"bitops": int(1e12 / value), "size_bytes": int(1e7 / value)} for name, value in speeds.items()}
    quality = {"dense": {"fid_1k": 1.0}, "dull_best": {"fid_1k": 1.0, "loss": 0.0, "loss_upper95": 0.01, "loss_p_holm": 0.01},
               "compressed": {"loss": loss, "loss_upper95": loss + 1.645 * error} if judged else {}}
    if bound is not None:
        quality["compressed"]["loss_to_dull_best_upper95"] = bound
    rows = {name: Row(variant=name, quality=quality[name], cost=costs[name], speed={SETTING: numbers[name]})
            for name in speeds}
    found = judge(rows, goal, SETTING)

    said = goal_line(found)
    clauses = re.findall(r"(?:Images/s|BitOPs|Size|Quality loss).*?: wanted.*?(?:reached|missed|held|certain|measured)\.", said)
    assert len(clauses) == 2
    assert found.met == all(map(holds, clauses)) == said.startswith("Goal met by")
    for clause in clauses:
        missing = "but not for certain" in clause or "too few to be certain" in clause
        assert holds(clause) == clause.endswith((": reached.", ": held."))
        if (plain := as_measured(clause)) is not None:
            assert plain == ("reached" in clause.rpartition(":")[2] or "held" in clause.rpartition(":")[2])
            assert not (missing and holds(clause))
    duel = dull_line(found)
    assert found.beats_dull_best == duel.startswith("compressed beats") == (next(
        line for line in found.lines if line.text == duel).good)
    speed, _, kept = duel.partition("; quality loss" if bound is not None else "; their quality")
    sure = re.search(rf"{NUMBER}× to {NUMBER}× for certain", speed)
    factor = float(re.search(rf"{NUMBER}× as good", speed)[1])
    faster = factor > 1 if target != "latency" else sure is not None and float(sure[1]) > 1
    equal = re.search(rf"at most {NUMBER} % for certain .* up to {NUMBER} % is called equal", kept)
    assert found.beats_dull_best == (faster and equal is not None and float(equal[1]) <= float(equal[2]))
    assert (": better" in speed) == (factor > 1) and (": worse" in speed) == (factor < 1)


def speed_of(ratio, apart, known):
    return {"images_per_s": 10.0 * ratio, "spread": 0.1, "repeats": 9} | (ends("speedup", ratio, apart) if known else {})


def ends(name, ratio, apart):
    return {f"{name}_low": ratio * (1 - apart), f"{name}_high": ratio * (1 + apart)}
