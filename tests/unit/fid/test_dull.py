"""The grid, the profile's times, and the choice, on numbers made by hand."""

from types import SimpleNamespace

import pytest

from tasks.core.artifacts import write_json
from tasks.core.cost import LayerCost
from tasks.core.recipe import Recipe
from tasks.fid import dull
from tasks.fid.dull import Front, Point


def point(precision: str, steps: int, solver: str = "ddim") -> Point:
    return Point(precision=precision, solver=solver, spacing="uniform", steps=steps)


FP32, INT8, SLOW = point("fp32", 4), point("int8", 4), point("int8", 8)
SPEED = {FP32.name: 100.0, INT8.name: 300.0, SLOW.name: 150.0}
SECONDS = {name: 1 / images_per_s for name, images_per_s in SPEED.items()}


def always(point: Point) -> bool:
    return True


class Linear:
    """A schedule, as far as spaced_timesteps reads it for uniform lists."""

    steps = 1000


def test_the_grid_is_full_and_changes_package_as_rarely_as_possible():
    points = dull.grid(("fp32", "int8"), ("ddim", "dpm2m"), ("uniform",), (4, 8))
    assert len(set(points)) == 8 and [p.precision for p in points] == ["fp32"] * 4 + ["int8"] * 4
    assert points[0].name == "ddim_uniform_4_fp32"


@pytest.mark.parametrize(("quality", "bar", "best", "qualifies"), [
    ((3.0, 5.0, 4.0), 4.0, SLOW, True),    # equal counts; the fastest of those that reach the bar
    ((3.0, 3.5, 4.0), 4.0, INT8, True),
    ((3.0, 4.19, 4.0), 4.0, INT8, True),   # worse by less than the 5 % that compressed may be worse, too
    ((3.0, 4.21, 4.0), 4.0, SLOW, True),
    ((3.0, 5.0, 4.0), 2.0, FP32, False),   # none reaches it: the best quality
])
def test_the_fastest_of_equal_quality_or_else_the_best(quality, bar, best, qualifies):
    front = Front.of([FP32, INT8, SLOW], SPEED, SECONDS, found := dict(zip(SPEED, quality, strict=True)), bar,
                     lambda p: dull.equal_quality(found[p.name], bar))
    assert (front.best, front.qualifies) == (best, qualifies)


def test_contenders_are_asked_in_the_order_of_cost_until_one_is_confirmed():
    """Eight percent above on few samples is no reason to turn the fastest point down; sixteen is."""
    asked = []
    points, quality = [FP32, INT8, SLOW], {FP32.name: 4.0, INT8.name: 4.3, SLOW.name: 3.9}
    front = Front.of(points, SPEED, SECONDS, quality, 4.0, lambda p: asked.append(p) or p == SLOW)
    assert asked == [INT8, SLOW] and front.best == SLOW and front.qualifies
    assert dull.contenders(points, SECONDS, quality | {INT8.name: 4.64}, 4.0) == [SLOW, FP32]


def test_a_point_that_more_samples_do_not_confirm_does_not_qualify():
    front = Front.of([FP32, INT8], SPEED, SECONDS, {FP32.name: 3.0, INT8.name: 3.0}, 4.0, lambda p: False)
    assert front.best == INT8 and not front.qualifies


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
    assert Front.of(points, SPEED, found, {FP32.name: 2.0, INT8.name: 3.9, SLOW.name: 3.0}, 4.0, always).best == best


def test_fewer_operations_win_where_they_are_slower():
    """Two steps in fp32 against eight in int8 on a machine where int8 is ten times as fast."""
    few = point("fp32", 2)
    speed, operations = {few.name: 100.0, SLOW.name: 250.0}, {few.name: 50.0, SLOW.name: 60.0}
    assert Front.of([few, SLOW], speed, operations, dict.fromkeys(speed, 1.0), 1.0, always).best == few


def test_equal_speed_is_decided_by_quality():
    other = point("int8", 4, "dpm2m")
    same = {INT8.name: 1.0, other.name: 1.0}
    front = Front.of([INT8, other], same, same, {INT8.name: 3.0, other.name: 2.0}, 4.0, always)
    assert front.best == other


def test_the_table_holds_every_point_and_marks_one():
    table = Front.of([FP32, INT8], SPEED, SECONDS, {FP32.name: 3.0, INT8.name: 5.0}, 4.0, always).table("fid_250")
    assert [row["best"] for row in table] == [True, False]
    assert table[1] == {"name": "ddim_uniform_4_int8", "precision": "int8", "solver": "ddim", "spacing": "uniform", "nfe": 4,
                        "images_per_s": 300.0, "cost": 1 / 300, "fid_250": 5.0, "contender": False, "best": False}


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
