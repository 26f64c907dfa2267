"""The grid, the profile's times, and the choice, on numbers made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from tasks.core import quality
from tasks.core.artifacts import write_json
from tasks.core.cost import LayerCost
from tasks.core.quality import Difference
from tasks.core.recipe import Recipe
from tasks.fid import dull
from tasks.fid.dull import Front, Point, Standing


def point(precision: str, steps: int, solver: str = "ddim") -> Point:
    return Point(precision=precision, solver=solver, spacing="uniform", steps=steps)


FP32, INT8, SLOW = point("fp32", 4), point("int8", 4), point("int8", 8)
SPEED = {FP32.name: 100.0, INT8.name: 300.0, SLOW.name: 150.0}
SECONDS = {name: 1 / images_per_s for name, images_per_s in SPEED.items()}


def front_of(points, cost, fids, bar, speed=SPEED) -> Front:
    """fids: of each point; None: it dropped out after 250 samples."""
    ran = {p.name: fid for p, fid in zip(points, fids, strict=True) if fid is not None}
    standings = {p.name: Standing(samples=1000 if p.name in ran else 250, above=Difference(0.01, 0.002), fid_ratio=1.2)
                 for p in points}
    return Front.of(points, speed, cost, standings, ran, bar)


class Linear:
    """A schedule, as far as spaced_timesteps reads it for uniform lists."""

    steps = 1000


def test_the_grid_is_full_and_changes_package_as_rarely_as_possible():
    points = dull.grid(("fp32", "int8"), ("ddim", "dpm2m"), ("uniform",), (4, 8))
    assert len(set(points)) == 8 and [p.precision for p in points] == ["fp32"] * 4 + ["int8"] * 4
    assert points[0].name == "ddim_uniform_4_fp32"


@pytest.mark.parametrize(("fids", "bar", "best", "qualifies"), [
    ((3.0, 5.0, 4.0), 4.0, SLOW, True),    # equal counts; the fastest of those that reach the bar
    ((3.0, 3.5, 4.0), 4.0, INT8, True),
    ((3.0, 4.19, 4.0), 4.0, INT8, True),   # worse by less than the 5 % that compressed may be worse, too
    ((3.0, 4.21, 4.0), 4.0, SLOW, True),
    ((3.0, 5.0, 4.0), 2.0, FP32, False),   # none reaches it: the best quality
    ((3.0, None, 4.0), 4.0, SLOW, True),   # the fastest dropped out
])
def test_the_fastest_of_equal_quality_or_else_the_best(fids, bar, best, qualifies):
    front = front_of([FP32, INT8, SLOW], SECONDS, fids, bar)
    assert (front.best, front.qualifies) == (best, qualifies)


@pytest.mark.parametrize(("target", "costs", "best"), [
    ("latency", (0.01, 1 / 300, 1 / 150), INT8),
    ("bitops", (4 * 900 * 32 * 32, 4 * 900 * 8 * 8, 8 * 900 * 8 * 8), INT8),
    ("size", (4000, 1000, 1000), SLOW),    # as small as the faster point, and better
])
def test_the_best_is_the_best_on_the_goals_target(target, costs, best, tmp_path, monkeypatch):
    for package, size in (("dull_fp32", 4000), ("dull_int8", 1000)):
        (tmp_path / package).mkdir()
        write_json(tmp_path / package / "package.json", {"files": {"denoiser/weights.safetensors": {"bytes": size}}})
    monkeypatch.setattr(dull, "layer_costs", lambda teacher: [LayerCost("layer", "linear", 900, 1000, None)])
    packages = {"dull_fp32": Recipe(timesteps=(9,)), "dull_int8": Recipe(timesteps=(9,), precision={"layer": "w8a8"})}
    points = [FP32, INT8, SLOW]
    found = dull.target_costs(points, target, SPEED, tmp_path, packages, SimpleNamespace(schedule=Linear()))
    assert tuple(found.values()) == pytest.approx(costs)
    assert front_of(points, found, (2.0, 3.9, 3.0), 4.0).best == best


def test_fewer_operations_win_where_they_are_slower():
    """Two steps in fp32 against eight in int8 on a machine where int8 is ten times as fast."""
    few = point("fp32", 2)
    speed, operations = {few.name: 100.0, SLOW.name: 250.0}, {few.name: 50.0, SLOW.name: 60.0}
    assert front_of([few, SLOW], operations, (1.0, 1.0), 1.0, speed).best == few


def test_equal_speed_is_decided_by_quality():
    other = point("int8", 4, "dpm2m")
    same = {INT8.name: 1.0, other.name: 1.0}
    assert front_of([INT8, other], same, (3.0, 2.0), 4.0, same).best == other


def test_the_table_holds_every_point_and_marks_one():
    table = front_of([FP32, INT8], SECONDS, (3.0, None), 4.0).table()
    assert [row["best"] for row in table] == [True, False] and table[0]["fid_1k"] == 3.0
    assert table[1] == {"name": "ddim_uniform_4_int8", "precision": "int8", "solver": "ddim", "spacing": "uniform", "nfe": 4,
                        "images_per_s": 300.0, "cost": 1 / 300, "samples": 250, "kid_above": 0.01, "kid_above_error": 0.002,
                        "fid_ratio": 1.2, "best": False}


# ---- the race ----

HOLDOUT = np.random.default_rng(99).standard_normal((500, 8))
REFERENCE = quality.Gaussian.of(HOLDOUT)


def gaussians(shift: dict[str, float], asked: list):
    """draw() of a race: the same noise for all, moved by shift; what is asked for is noted."""
    noise = np.random.default_rng(0).standard_normal((1000, 8))

    def draw(names, first, last):
        asked.append((sorted(names), first, last))
        return {name: noise[first:last] + shift[name] for name in names}

    return draw


def test_the_clearly_worse_drop_out_and_the_others_run_to_the_end():
    asked, shift = [], {"bar": 0.0, "same": 0.01, "better": -0.02, "worse": 0.3, "far": 1.0}
    standings, seen = dull.race(dict.fromkeys(("same", "better", "worse", "far"), 1.0), "bar", [50, 200, 1000],
                                gaussians(shift, asked), HOLDOUT, REFERENCE, lambda n: None)
    assert asked == [(["bar", "better", "far", "same", "worse"], 0, 50), (["bar", "better", "same", "worse"], 50, 200),
                     (["bar", "better", "same"], 200, 1000)]
    assert {name: s.samples for name, s in standings.items()} == {"same": 1000, "better": 1000, "worse": 200, "far": 50}
    assert set(seen) == {"bar", "same", "better"} and all(len(x) == 1000 for x in seen.values())
    assert standings["far"].above.estimate > standings["worse"].above.estimate > 0


def test_the_dearer_go_on_only_while_no_cheaper_one_is_as_good():
    asked, shift = [], {"bar": 0.0, "cheap": 0.3, "good": 0.01, "sibling": 0.02, "dear": 0.0}
    standings, seen = dull.race({"dear": 3.0, "good": 2.0, "sibling": 2.0, "cheap": 1.0}, "bar", [50, 200, 1000],
                                gaussians(shift, asked), HOLDOUT, REFERENCE, lambda n: None)
    assert asked == [(["bar", "cheap"], 0, 50), (["bar", "cheap"], 50, 200), (["good", "sibling"], 0, 50),
                     (["good", "sibling"], 50, 200), (["bar", "good", "sibling"], 200, 1000)]
    assert set(seen) == {"bar", "good", "sibling"} and "dear" not in standings


def test_only_those_that_enter_run_and_each_cost_is_asked_once():
    entered = []

    def enter(names):
        entered.append(sorted(names))
        return [name for name in names if name != "kept_out"]

    standings, _ = dull.race({"kept_out": 1.0, "cheap": 1.0, "good": 2.0, "dear": 3.0}, "bar", [50, 1000],
                             gaussians({"bar": 0.0, "cheap": 0.3, "good": 0.01}, []), HOLDOUT, REFERENCE, lambda n: None, enter)
    assert entered == [["cheap", "kept_out"], ["good"]] and set(standings) == {"cheap", "good"}


def test_a_heat_is_won_by_those_nearest_image_by_image():
    """`swapped` has the same images as the converged one, in another order."""
    x = np.random.default_rng(0).standard_normal((20, 4))
    found = {"far": x + 1, "converged": x, "swapped": x[::-1], "near": x + 0.1, "nearer": x - 0.01}
    assert dull.nearest(found, 3) == ["nearer", "near", "far"] and dull.nearest(found, 9)[-1] == "swapped"


def test_the_nearest_reach_the_end_where_all_are_clearly_worse():
    shift = {"bar": 0.0} | {f"far_{i}": 1.0 + i for i in range(dull.LAST_ONES + 1)}
    names = list(shift)[1:]
    standings, seen = dull.race(dict.fromkeys(names, 1.0), "bar", [50, 100], gaussians(shift, []), HOLDOUT, REFERENCE,
                                lambda n: None)
    assert set(seen) == {"bar", *names[:-1]} and standings[names[-1]].samples == 50


@pytest.mark.parametrize(("z", "fid_ratio", "worse"),
                         [(2.4, 1.5, False), (2.6, 1.04, False), (2.6, 1.06, True), (-9, 1.5, False)])
def test_worse_is_what_both_distances_say(z, fid_ratio, worse):
    assert dull.is_worse(Standing(samples=250, above=Difference(z * 0.01, 0.01), fid_ratio=fid_ratio)) == worse


def test_few_samples_of_less_variance_are_not_taken_for_good_ones():
    """Three quarters of the variance: FID of 20 samples in 8 dimensions calls it the better set, KID does not."""
    noise = np.random.default_rng(1).standard_normal((2000, 8))
    reference = quality.Gaussian.of(noise[1000:])
    fids = [np.mean([quality.fid(s * noise[i:i + 20], reference) for i in range(0, 1000, 20)]) for s in (1.0, 0.85)]
    above = [quality.kid_difference(0.85 * noise[i:i + 20], noise[i:i + 20], noise[1000:]).estimate for i in range(0, 1000, 20)]
    assert fids[1] < fids[0] and np.mean(above) > 0


def test_times_are_the_shipping_backends_at_one_batch(tmp_path):
    path = tmp_path / "model.csv"
    path.write_text("backend,precision,batch,time_us\neager,int8,8,9\nopenvino,int8,8,2000\nopenvino,fp32,8,8000\nopenvino,int8,1,5\n")
    times = dull.read_times(path, 8, ["int8", "fp32"])
    assert times == {"int8": 2000.0, "fp32": 8000.0}
    assert dull.images_per_s(INT8, times, 8) == 1000.0  # 8 images in 4 x 2 ms
    with pytest.raises(ValueError, match=r"no openvino row for bf16 at batch 8; it has fp32 at 8, int8 at 1, int8 at 8"):
        dull.read_times(path, 8, ["bf16"])


def test_a_point_keeps_the_packages_precision():
    package = Recipe(timesteps=(999, 0), precision={"layer": "w8a8"})
    recipe = point("int8", 4, "dpm2m").recipe({"dull_int8": package}, Linear())
    assert recipe == Recipe(timesteps=(999, 749, 499, 249), solver="dpm2m", precision={"layer": "w8a8"})
