"""The grid, the profile's times, and the choice, on numbers made by hand."""

import pytest

from tasks.core.recipe import Recipe
from tasks.fid import dull
from tasks.fid.dull import Front, Point


def point(precision: str, steps: int, solver: str = "ddim") -> Point:
    return Point(precision=precision, solver=solver, spacing="uniform", steps=steps)


FP32, INT8, SLOW = point("fp32", 4), point("int8", 4), point("int8", 8)
SPEED = {FP32.name: 100.0, INT8.name: 300.0, SLOW.name: 150.0}


def test_the_grid_is_full_and_changes_package_as_rarely_as_possible():
    points = dull.grid(("fp32", "int8"), ("ddim", "dpm2m"), ("uniform",), (4, 8))
    assert len(set(points)) == 8 and [p.precision for p in points] == ["fp32"] * 4 + ["int8"] * 4
    assert points[0].name == "ddim_uniform_4_fp32"


@pytest.mark.parametrize(("quality", "bar", "best", "qualifies"), [
    ((3.0, 5.0, 4.0), 4.0, SLOW, True),    # equal counts; the fastest of those that reach the bar
    ((3.0, 3.5, 4.0), 4.0, INT8, True),
    ((3.0, 5.0, 4.0), 2.0, FP32, False),   # none reaches it: the best quality
])
def test_the_fastest_of_equal_quality_or_else_the_best(quality, bar, best, qualifies):
    front = Front.of([FP32, INT8, SLOW], SPEED, dict(zip(SPEED, quality, strict=True)), bar)
    assert (front.best, front.qualifies) == (best, qualifies)


def test_equal_speed_is_decided_by_quality():
    other = point("int8", 4, "dpm2m")
    front = Front.of([INT8, other], {INT8.name: 1.0, other.name: 1.0}, {INT8.name: 3.0, other.name: 2.0}, 4.0)
    assert front.best == other


def test_the_table_holds_every_point_and_marks_one():
    table = Front.of([FP32, INT8], SPEED, {FP32.name: 3.0, INT8.name: 5.0}, 4.0).table("fid_250")
    assert [row["best"] for row in table] == [True, False]
    assert table[1] == {"name": "ddim_uniform_4_int8", "precision": "int8", "solver": "ddim", "spacing": "uniform", "nfe": 4,
                        "images_per_s": 300.0, "fid_250": 5.0, "as_good_as_compressed": False, "best": False}


def test_times_are_the_shipping_backends_at_one_batch(tmp_path):
    path = tmp_path / "model.csv"
    path.write_text("backend,precision,batch,time_us\neager,int8,8,9\nopenvino,int8,8,2000\nopenvino,fp32,8,8000\nopenvino,int8,1,5\n")
    times = dull.read_times(path, 8, ["int8", "fp32"])
    assert times == {"int8": 2000.0, "fp32": 8000.0}
    assert dull.images_per_s(INT8, times, 8) == 1000.0  # 8 images in 4 x 2 ms
    with pytest.raises(ValueError, match=r"no openvino row for bf16 at batch 8; it has fp32 at 8, int8 at 1, int8 at 8"):
        dull.read_times(path, 8, ["bf16"])


def test_a_point_keeps_the_packages_precision():
    class Linear:  # spaced_timesteps reads no more of a schedule for uniform lists
        steps = 1000

    package = Recipe(timesteps=(999, 0), precision={"layer": "w8a8"})
    recipe = point("int8", 4, "dpm2m").recipe({"dull_int8": package}, Linear())
    assert recipe == Recipe(timesteps=(999, 749, 499, 249), solver="dpm2m", precision={"layer": "w8a8"})
