"""What the study of caches counts, interpolates and compares; the packages themselves are the opponents' environment's."""

import copy
import re
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import results
from benchmarks.cache import plot, rules
from benchmarks.cache.arms import ARMS, DIT, OPPONENTS, PLANS, RULES, SAVED, break_even, cells, finalists, further, unseen
from benchmarks.cache.compare import at_share, distances, left_open, nearer, paired
from benchmarks.cache.lab import FULL, first_pairs, further_pairs, unseen_pairs
from benchmarks.cache.work import Meter, counted_calls
from benchmarks.environment import Environment
from tasks.cache_learn.baselines import time_threshold
from tasks.core.cost import layer_costs, macs
from tasks.core.denoiser import Denoiser, build
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import sample
from tasks.pretrain_load.architectures import SCHEDULE, dit, unet
from tasks.runtime.cache import apply_cache

ROOT = Path(__file__).parents[3]
TIMESTEPS = (900, 600, 300, 100)


@pytest.fixture(scope="module", params=["dit", "unet"])
def teacher(request):
    torch.manual_seed(0)
    which = {"dit": ("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=2, heads=2, patch=2)),
             "unet": ("UNet2DModel", unet(8, 1, width=8))}
    made = build(*which[request.param], SCHEDULE)
    made.model.eval().requires_grad_(False)
    return made


def trajectory(denoiser, recipe, handle=None):
    def predict(x, t, labels, step):
        if handle:
            handle.step = step
        return denoiser(x, t, labels)

    labels = torch.zeros(2, dtype=torch.int64) if denoiser.num_classes else None
    return sample(predict, denoiser.schedule, recipe, torch.zeros(2, *denoiser.sample_shape), labels)


# ---- counting ----

def test_an_uncached_run_computes_everything(teacher):
    meter = Meter(teacher)
    with counted_calls(teacher.prunable_layers()) as calls:
        trajectory(teacher, Recipe(timesteps=TIMESTEPS))
    assert meter.shares(calls, 4) == pytest.approx({"computed_share": 1, "macs_share": 1})


def test_what_a_plan_skips_is_what_is_counted(teacher):
    """Our plan says what it removes, and cost.py what that is in MACs: both are counted on the live model here."""
    names = tuple(s.name for s in teacher.sublayers())
    full = (True,) * len(names)
    rows = (full, tuple(i % 2 == 0 for i in range(len(names))), full, tuple(i == 1 for i in range(len(names))))
    plan = CachePlan(sublayers=names, compute=rows)
    denoiser = Denoiser(copy.deepcopy(teacher.model), teacher.schedule)
    meter, layers = Meter(teacher), denoiser.prunable_layers()
    handle = apply_cache(denoiser.model, plan.sublayers, plan.compute)
    recipe = Recipe(timesteps=TIMESTEPS, cache=plan)
    with counted_calls(layers) as calls:
        trajectory(denoiser, recipe, handle)
    found, costs = meter.shares(calls, 4), layer_costs(teacher)
    assert found["computed_share"] == pytest.approx(1 - plan.removed_share)
    assert found["macs_share"] == pytest.approx(macs(costs, recipe) / macs(costs, Recipe(timesteps=TIMESTEPS)))


@pytest.mark.parametrize("teacher", ["dit"], indirect=True)  # the blocks of a UNet change the shape
def test_a_block_that_is_skipped_whole_is_counted_too(teacher):
    """As packages do it: not the sublayer's forward is replaced, but that of what holds it."""
    denoiser = Denoiser(copy.deepcopy(teacher.model), teacher.schedule)
    layers = denoiser.prunable_layers()
    denoiser.model.transformer_blocks[1].forward = lambda hidden_states, **others: hidden_states
    with counted_calls(layers) as calls:
        trajectory(denoiser, Recipe(timesteps=TIMESTEPS))
    assert Meter(teacher).shares(calls, 4)["computed_share"] == pytest.approx(0.5)


def test_fewer_steps_compute_fewer_evaluations(teacher):
    with counted_calls(teacher.prunable_layers()) as calls:
        trajectory(teacher, Recipe(timesteps=TIMESTEPS[:3]))
    assert Meter(teacher).shares(calls, 4) == pytest.approx({"computed_share": 0.75, "macs_share": 0.75})


def test_counting_leaves_no_hook(teacher):
    with counted_calls(teacher.prunable_layers()):
        pass
    assert not any(layer._forward_hooks for layer in teacher.prunable_layers().values())


# ---- rules ----

@pytest.mark.parametrize("order, first", [("top", [3]), ("bottom", [0])])
def test_layers_go_from_one_end_at_every_second_step(order, first):
    plan = rules.layers(4, "abcd", 0.125, order)
    skipped = [[i for i, computed in enumerate(row) if not computed] for row in plan.compute]
    assert skipped == [[], first, [], first]


@pytest.mark.parametrize("order", ["top", "bottom", "random"])
@pytest.mark.parametrize("budget, removed", [(0.0, 0.0), (0.3, 0.3), (0.5, 0.5), (0.9, 0.5)])
def test_layers_remove_what_they_are_asked_to_up_to_half(order, budget, removed):
    assert rules.layers(20, tuple("abcdefghij"), budget, order).removed_share == pytest.approx(removed)


def test_a_threshold_from_the_clean_end_leaves_the_noisy_one_alone():
    skipped = [step for step, row in enumerate(time_threshold(6, "ab", 0.3, "clean").compute) if not any(row)]
    assert skipped == [3, 5]
    assert time_threshold(7, "ab", 0.9, "clean").removed_share == pytest.approx(3 / 7)


def test_an_unknown_order_is_named():
    with pytest.raises(ValueError, match="order: 'middle' is not one of top, bottom, random"):
        rules.layers(4, "ab", 0.5, "middle")


# ---- comparing ----

def test_a_curve_is_read_between_its_points_and_not_beyond():
    curve = [(0.4, np.array([3.0, 5.0])), (0.2, np.array([1.0, 1.0]))]
    assert at_share(curve, 0.2) == pytest.approx([1, 1])
    assert at_share(curve, 0.3) == pytest.approx([2, 3])
    assert at_share(curve, 0.1) == pytest.approx([0.5, 0.5])  # nothing removed, nothing changed
    assert at_share(curve, 0.0) == pytest.approx([0, 0])
    assert at_share(curve, 0.41) is None


def test_distances_are_of_pairs():
    assert distances(np.array([[3.0, 4.0], [1.0, 0.0]]), np.zeros((2, 2))) == pytest.approx([5, 1])


def test_opponents_are_compared_at_their_own_share_and_adjusted_together():
    """Ours strays by 10 x share: 2 at a share of 0.2, 4 at 0.4."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=400)
    ours = [(share, 10 * share + 0.1 * noise) for share in (0.25, 0.5)]
    found = nearer(ours, {"far": (0.2, 4 + 0.3 * rng.normal(size=400)), "near": (0.4, 3 + 0.3 * rng.normal(size=400)),
                          "same": (0.5, ours[1][1]), "idle": (0.0, np.zeros(400)), "beyond": (0.6, noise)}, 8)
    assert found.keys() == {"far", "near", "same"}
    assert found["far"] == (pytest.approx(2, abs=0.1), pytest.approx(0, abs=1e-6))
    assert found["near"] == (pytest.approx(-1, abs=0.1), 1)
    assert found["same"] == (0, 1)


def test_more_opponents_make_the_same_lead_worth_less():
    rng = np.random.default_rng(1)
    ours = [(0.5, np.zeros(100))]
    close = (0.5, 0.2 + rng.normal(size=100))
    alone, many = nearer(ours, {"a": close}, 4), nearer(ours, dict.fromkeys("abcde", close), 4)
    assert many["a"][1] == pytest.approx(min(1, 5 * alone["a"][1]))


def test_what_the_first_pairs_leave_open_is_judged_again_beside_ours():
    found = (("0.5", "behind_p_holm", "0.03"), ("0.24", "behind_p_holm", "0.02"), ("0.12", "behind", "1"))
    rows = [{"teacher": DIT, "variant": f"ddim20/mag/{value}", "metric": metric, "value": p} for value, metric, p in found]
    assert left_open(rows) == {(DIT, "ddim20/mag/0.5")}
    found = further(left_open(rows))
    assert [cell.variant for cell in found if cell.nfe == 20] == [*(f"ddim20/refined/{value:g}" for value in PLANS[0].values),
                                                                  "ddim20/mag/0.5"]
    assert {cell.nfe for cell in found} == {20} and len(set(found)) == len(found)


def test_other_pairs_begin_with_a_batch_of_their_own():
    assert first_pairs(FULL) == range(100) and further_pairs(FULL) == range(104, 504) and unseen_pairs(FULL) == range(504, 1504)


def test_a_list_that_the_table_never_saw_is_judged_beside_ours():
    found = {(cell.solver, cell.arm.name) for cell in unseen()}
    assert {arm for _, arm in found} == {"errors", "refined"} and len(found) == 2 * 2
    assert {(cell.teacher, cell.nfe) for cell in unseen()} == {(DIT, 50)}


def test_pairs_of_one_batch_count_as_one():
    """Repeated 8 times in a row, 25 differences tell no more than they did alone."""
    alone = np.random.default_rng(2).normal(size=25)
    assert astuple(paired(alone.repeat(8), 8)) == pytest.approx(astuple(paired(alone, 1)))
    assert paired(alone, 1).error == pytest.approx(alone.std(ddof=1) / 5)
    assert paired(alone[:10], 4).error > 0, "the last batch may be smaller"


# ---- the tables ----

def test_arms_and_cells_are_unique():
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    every = [(cell.teacher, cell.variant) for cell in cells()]
    assert len(set(every)) == len(every)
    assert {arm.name for arm in ARMS} == {arm.name for arm in (*PLANS, *OPPONENTS)} and set(RULES) <= set(OPPONENTS)


def test_every_arm_knows_how_it_is_made():
    from benchmarks.cache import packages, study
    assert {arm.make for arm in ARMS} <= {*study.PLANS, *packages.PACKAGES, "fewer_steps"}


def test_a_quarter_of_the_steps_is_whole():
    assert all((cell.nfe * SAVED).is_integer() for cell in break_even())


def test_every_setting_of_the_dit_has_its_finalist():
    assert [(cell.value, cell.nfe) for cell in finalists()] == [(0.25, 20), (0.25, 20), (0.4, 50), (0.4, 50)]
    assert {cell.teacher for cell in finalists()} == {DIT}


def test_opponents_are_pinned_exactly():
    lines = [line for line in Environment("cache").requirements.read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)


# ---- the plot ----

def test_curves_hold_the_points_that_have_both_numbers():
    rows = [{"teacher": "mnist_dit", "variant": f"ddim20/fewer_steps/{value:g}", "metric": metric, "value": str(number)}
            for value, removed, fidelity in ((0.1, 0.1, 1.0), (0.25, 0.25, 2.0))
            for metric, number in (("removed_share", removed), ("fidelity", fidelity))]
    assert plot.curves(rows, "mnist_dit", "ddim20", "removed_share") == {"fewer_steps": [(0.9, 1.0), (0.75, 2.0)]}
    assert plot.curves(rows, "mnist_dit", "ddim20", "speedup_eager") == {}
    assert plot.curves(rows, "mnist_unet", "ddim20", "removed_share") == {}


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no curve"):
        plot.draw([], tmp_path / "curves.png")


def test_every_arm_looks_different():
    looks = [tuple(sorted((key, str(value)) for key, value in plot.look(arm.name).items())) for arm in ARMS]
    assert len(set(looks)) == len(looks)


# ---- rows ----

def test_parts_that_run_side_by_side_lose_no_row(tmp_path):
    """Four processes, each appending its own rows one by one."""
    path = tmp_path / "results.csv"
    program = ("import sys; from pathlib import Path; from benchmarks import results\n"
               "for i in range(25): results.append(Path(sys.argv[1]), [{'variant': sys.argv[2], 'seed': i}])")
    running = [subprocess.Popen([sys.executable, "-c", program, path, name], cwd=ROOT) for name in "abcd"]
    assert [process.wait() for process in running] == [0] * 4
    assert sorted((row["variant"], int(row["seed"])) for row in results.read(path)) == [
        (name, i) for name in "abcd" for i in range(25)]


def test_rows_are_replaced(tmp_path):
    path = tmp_path / "results.csv"
    results.append(path, [{"variant": "a", "metric": "old"}, {"variant": "a", "metric": "kept"}])
    results.replace(path, lambda row: row["metric"] == "old", [{"variant": "a", "metric": "new"}])
    assert [row["metric"] for row in results.read(path)] == ["kept", "new"]
