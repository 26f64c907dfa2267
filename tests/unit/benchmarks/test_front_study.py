"""What the study of the front selects and computes; the peers' packages themselves are the study's environment's."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.cache.arms import DIT, TEACHERS, UNET
from benchmarks.front import compare, plot, selection, study
from benchmarks.front.factorial import FACTORS, design, effects, intervals, resampled_medians, terms
from benchmarks.front.lab import best_samplers
from benchmarks.front.points import DENSE, at, factorial, factors, heat, ours, package, peers, steps_of
from benchmarks.results import COLUMNS
from tasks.benchmark.measure import Case
from tasks.core.quality import Difference
from tasks.core.sampler import dense_recipe, spaced_timesteps
from tasks.core.schedule import Schedule
from tasks.pretrain_load.architectures import SCHEDULE


def row(variant, metric, value, teacher=DIT):
    return dict(zip(COLUMNS, (teacher, variant, 0, metric, f"{value:.6g}", "p"), strict=True))


# ---- effects ----

def test_effects_are_twice_the_coefficients_of_a_linear_model():
    """Against numpy's least squares of y on +-1 columns and their products, an intercept and all higher products besides."""
    y = np.random.default_rng(0).normal(size=32)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=5)))
    subsets = [s for n in range(6) for s in itertools.combinations(range(5), n)]
    columns = np.stack([signs[:, list(s)].prod(1) for s in subsets], 1)
    coefficients = dict(zip(subsets, np.linalg.lstsq(columns, y, rcond=None)[0], strict=True))
    found = effects(y, FACTORS)
    assert len(found) == 5 + 10
    for term in terms(FACTORS):
        assert found[" x ".join(term)] == pytest.approx(2 * coefficients[tuple(FACTORS.index(name) for name in term)])


def test_a_factor_that_doubles_has_the_effect_of_log_two_and_no_interaction():
    y = np.log([1, 2, 3, 6])  # rows: none, b, a, both
    found = effects(y, ("a", "b"))
    assert found["b"] == pytest.approx(np.log(2)) and found["a"] == pytest.approx(np.log(3))
    assert found["a x b"] == pytest.approx(0, abs=1e-12)


def test_an_interaction_is_half_of_what_one_factor_adds_to_the_other():
    assert effects(np.array([0.0, 0.0, 0.0, 1.0]), ("a", "b"))["a x b"] == pytest.approx(0.5)


def test_effects_of_another_number_of_values_are_refused():
    with pytest.raises(ValueError, match="3 values are not the 4 of 2 factors"):
        effects(np.zeros(3), ("a", "b"))


def test_intervals_are_centred_on_the_whole_and_as_wide_as_the_resamples():
    drawn = {"a": np.random.default_rng(0).normal(5, 0.1, 4000)}  # resamples are biased: their mean does not count
    estimate, low, high = intervals({"a": np.float64(1.0)}, drawn)["a"]
    assert estimate == 1.0 and low == pytest.approx(1 - 0.196, abs=0.01) and high == pytest.approx(1 + 0.196, abs=0.01)


def test_medians_of_rounds_are_drawn_for_all_points_alike():
    times = np.arange(1.0, 10.0)[:, None] * [[1.0, 3.0]]
    found = resampled_medians(times, 50, np.random.default_rng(0))
    assert found.shape == (50, 2) and np.allclose(found[:, 1], 3 * found[:, 0]) and found[:, 0].std() > 0


def test_speed_effects_are_those_of_medians():
    points = [SimpleNamespace(name=name, backend="openvino") for name in ("none", "b", "a", "both")]
    times = {Case.key_of(p.name, "openvino", 8): [s * noise for noise in (1, 1.1, 0.9, 1, 1)]
             for p, s in zip(points, (8.0, 4.0, 2.0, 1.0), strict=True)}
    found = compare.speed_effects(times, points, ("a", "b"), 8)
    assert found["a"][0] == pytest.approx(np.log(4)) and found["b"][0] == pytest.approx(np.log(2))
    assert found["a"][1] == pytest.approx(np.log(4))  # what slows a round slows all of it


def test_quality_effects_take_only_the_spread_from_resamples():
    found = compare.quality_effects([1.0, 2.0], [np.full(10, 3.0), np.full(10, 3.0)], ("a",))
    assert found["a"] == pytest.approx((np.log(2), np.log(2), np.log(2)))


# ---- the packages of the factorial ----

@pytest.mark.parametrize("teacher", TEACHERS)
def test_packages_stand_in_the_order_of_the_design(teacher):
    names = factors(teacher)
    points = factorial(teacher)
    assert len({point.name for point in points}) == len(points) == 2 ** len(names)
    for point, on in zip(points, design(len(names)), strict=True):
        assert point.name == "factorial/" + ("+".join(n for n, one in zip(names, on, strict=True) if one) or "none")


def test_each_factor_changes_its_own_part_of_a_package():
    off = dict.fromkeys(FACTORS, False)
    base = package(off)
    assert (base.weights, base.sampler, base.cached, base.precision) == ("teacher", "best_4", False, "fp32")
    assert package({**off, "sparsity": True}).weights == "teacher_units"
    assert package({**off, "weights": True}).weights == "few_4"
    assert package({**off, "solver": True}).sampler == "learned_4"
    assert package({**off, "cache": True}).cached and package({**off, "precision": True}).precision == "w8a8"
    whole = package(dict.fromkeys(FACTORS, True))
    assert (whole.weights, whole.sampler, whole.cached, whole.precision) == ("few_4_units", "few_4", True, "w8a8")


# ---- points ----

def test_a_heat_holds_every_solver_and_spacing_once():
    assert len({point.name for point in heat(8)}) == 7 * 4 and {steps_of(point) for point in heat(8)} == {8}


def test_a_dull_point_at_another_precision_keeps_its_sampler():
    point = heat(12)[5]
    other = at(point, "int8")
    assert other.sampler == point.sampler and other.precision == "w8a8" and other.name.endswith("_12_int8")


def test_names_are_unique_and_the_unet_has_no_student():
    for teacher in TEACHERS:
        names = [point.name for point in (DENSE, *peers(teacher), *ours(teacher), *factorial(teacher))]
        assert len(set(names)) == len(names)
    assert not any("few" in point.weights for point in (*ours(UNET), *factorial(UNET)))


def test_samplers_are_read_from_their_names():
    lab = SimpleNamespace(teacher=SimpleNamespace(schedule=Schedule.from_config(SCHEDULE)))
    schedule = lab.teacher.schedule
    assert study.sampling(DENSE, lab, {}) == dense_recipe(schedule, 50).sampling
    karras = next(point for point in heat(8) if point.sampler == "unipc3_karras_8")
    assert study.sampling(karras, lab, {}) == {"timesteps": spaced_timesteps(schedule, 8, "karras"), "solver": "unipc3"}
    best = study.sampling(peers(DIT)[0], lab, {8: "deis3_logsnr_8"})
    assert best == {"timesteps": spaced_timesteps(schedule, 8, "logsnr"), "solver": "deis3"}


def test_the_best_sampler_of_each_number_of_steps_is_that_of_the_least_fid_in_the_trials():
    rows = [row("dull/ddim_uniform_8_bf16", "fid_1k", 0.4), row("dull/unipc_karras_8_bf16", "fid_1k", 0.3),
            row("dull/unipc_karras_8_bf16", "fid_1k", 0.1, UNET), row("dull/ddim_uniform_4_bf16", "fid_1k", 0.9),
            row("dull/deis3_karras_8_bf16", "heat_distance", 0.01), row("dense", "fid_1k", 0.2),
            row("dull/deis3_karras_8_fp32", "fid_1k", 0.01)]
    assert best_samplers(rows, DIT, "fid_1k") == {8: "unipc_karras_8", 4: "ddim_uniform_4"}


# ---- selection ----

def test_clearly_worse_points_are_no_finalists():
    fids = {"a": 0.25, "b": 0.31, "c": 0.29, "d": 0.2}
    assert selection.finalist(fids, 0.2) == "d"
    assert selection.finalist(fids, 0.13) is None and selection.finalist({}, 0.2) is None


def test_ours_is_the_fastest_that_holds_the_bound_or_else_the_nearest():
    speeds = {"a": 700.0, "b": 400.0, "c": 300.0}
    assert selection.our_fastest(speeds, {"a": 0.2, "b": 0.04, "c": -0.1}, 0.05) == "b"
    assert selection.our_fastest(speeds, {"a": 0.2, "b": 0.14, "c": 0.1}, 0.05) == "c"
    assert selection.our_fastest(speeds, {}, 0.05) is None


def test_the_frontier_holds_what_no_other_point_beats():
    points = {"slow_good": (100.0, 0.1), "fast_bad": (400.0, 0.5), "beaten": (90.0, 0.2), "middle": (200.0, 0.3),
              "tied": (200.0, 0.4)}
    assert selection.frontier(points) == ["slow_good", "middle", "fast_bad"]


def times_of(**seconds):
    return {Case.key_of(name, "openvino", 8): [value] * 9 for name, value in seconds.items()}


def test_the_gain_is_over_the_fastest_dull_point_that_is_not_shown_to_be_worse():
    times = times_of(ours=1.0, fast_worse=1.5, equal=2.0, slow_better=4.0)
    over = {"fast_worse": Difference(0.2, 0.05), "equal": Difference(0.05, 0.05), "slow_better": Difference(-0.1, 0.01)}
    our, best, numbers, found = compare.gain({"ours": -0.01}, dict.fromkeys(over), 0.05, lambda x, base: over[x], times, 8)
    assert (our, best) == ("ours", "equal") and found == over
    assert numbers["gain_over_dull_b8"] == pytest.approx(2.0)
    assert numbers["gain_over_dull_b8_low95"] == pytest.approx(2.0)


def test_where_all_dull_points_are_worse_the_least_bad_one_stands_for_them():
    times = times_of(ours=1.0, a=1.5, b=3.0)
    over = {"a": Difference(0.3, 0.01), "b": Difference(0.1, 0.01)}
    assert compare.gain({"ours": 0.0}, dict.fromkeys(over), 0.05, lambda x, base: over[x], times, 8)[1] == "b"
    assert compare.gain({"ours": 0.0}, {}, 0.05, lambda x, base: over[x], times, 8) is None


# ---- the picture ----

def test_the_picture_holds_points_that_were_judged_and_timed():
    rows = [row("dense", "images_per_s_b8", 40), row("ours/a", "images_per_s_b8", 700), row("ours/a", "loss", -0.04),
            row("dull/b", "images_per_s_b8", 300), row("factorial/none", "images_per_s_b8", 300),
            row("factorial/none", "loss", 0.1), row("ours/a", "images_per_s_b1", 90)]
    assert plot.read_points(rows, DIT, 8) == {"dense": (40.0, 0.0), "ours/a": (700.0, -4.0)}


def test_points_of_fewer_samples_than_dense_are_told_apart():
    rows = [row("dense", "fid_500", 0.3), row("dense", "fid_5k", 0.2), row("ours/a", "fid_5k", 0.1),
            row("dull/b", "fid_500", 0.3), row("ours/c", "fid_5k", 0.1, UNET)]
    assert plot.judged_on_most(rows, DIT) == {"dense", "ours/a"}


def test_a_picture_is_drawn_and_nothing_without_points(tmp_path, capsys):
    rows = [row("dense", "images_per_s_b8", 40), row("ours/a", "images_per_s_b8", 700), row("ours/a", "loss", -0.04)]
    plot.draw(rows, DIT, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    plot.draw([], UNET, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists() and "no point of mnist_unet" in capsys.readouterr().out
