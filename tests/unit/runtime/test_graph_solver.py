"""A trajectory inside OpenVINO is the one that the solver's own arithmetic in torch takes with the same network."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import spaced_timesteps
from tasks.runtime.conditioning import RowTable
from tasks.runtime.graph import LOOPED, PLAIN, STEPPED, live_graph
from tasks.runtime.graph_solver import Solving, coefficients, solved
from tasks.runtime.precision import apply_precision, calibrate_ranges, remove_precision
from tasks.runtime.solver import Opening, SolverStep, Thresholding, integrate, solver_steps

BATCH = 3
LEARNED = (SolverStep(t=991.25, p=0.2, q=-0.9, a=0.7, b=(0.4,)),
           SolverStep(t=640.5, p=0.6, q=-0.7, a=0.5, b=(0.9, -0.3)),
           SolverStep(t=333.125, p=0.9, q=-0.4, a=0.3, b=(1.1, -0.5, 0.2), d=0.1),
           SolverStep(t=80.75, p=0.95, q=-0.2, a=0.1, b=(1.3, -0.6, 0.3, -0.1)))


def with_opening(tiny_denoiser):
    """LEARNED with a mean image for each label; every row reads one x0 more, the opening's."""
    rng = torch.Generator().manual_seed(3)
    images = torch.rand(max(1, tiny_denoiser.num_classes), *tiny_denoiser.sample_shape, generator=rng) - 0.5
    rows = [replace(row, b=(*row.b, 0.3)) for row in LEARNED]
    return (replace(rows[0], opening=Opening.of(0.9, 0.4, images)), *rows[1:])


@pytest.fixture(params=["ddim", "dpm2m", "ddim_diffusers", "learned", "opened"])
def steps(request, tiny_denoiser):
    if request.param in ("learned", "opened"):
        return LEARNED if request.param == "learned" else with_opening(tiny_denoiser)
    return tuple(solver_steps(tiny_denoiser.schedule.config, spaced_timesteps(tiny_denoiser.schedule, 5), request.param))


def given(tiny_denoiser, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.tensor([1, 0, 1]) if tiny_denoiser.num_classes else None
    return torch.randn(BATCH, *tiny_denoiser.sample_shape, generator=rng), labels


def reference(predict, steps, noise, labels, clip):
    *_, (_, _, images) = integrate(predict, steps, noise, labels, clip)
    return images


def eager(tiny_denoiser):
    return lambda x, t, labels, step: tiny_denoiser(x, t, labels)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("clip", [1.0, 0.5, None])
def test_every_way_is_the_eager_trajectory(tiny_denoiser, steps, clip):
    predict = live_graph(tiny_denoiser, Recipe(timesteps=(900,)), BATCH)
    looped = hasattr(tiny_denoiser.model, "transformer_blocks")
    assert predict.way(clip)[0] == (LOOPED if looped else STEPPED)
    for seed in (0, 1):  # a second trajectory starts afresh
        noise, labels = given(tiny_denoiser, seed)
        expected = reference(eager(tiny_denoiser), steps, noise, labels, clip)
        for way in (PLAIN, STEPPED, LOOPED)[: 3 if looped else 2]:
            assert distance(predict.sample(steps, noise, labels, clip, way), expected) < 1e-5, way


@pytest.mark.parametrize("forecast", ["none", "taylor"])
def test_a_cache_plan_is_stepped_and_the_reason_is_said(tiny_denoiser, steps, forecast):
    names = tuple(s.name for s in tiny_denoiser.sublayers())
    compute = tuple(tuple(step == 0 or (step + i) % 2 == 0 for i in range(len(names))) for step in range(len(steps)))
    plan = CachePlan(sublayers=names, compute=compute, forecast=forecast)
    recipe = Recipe(timesteps=tuple(round(s.t) for s in steps), cache=plan)
    predict = live_graph(tiny_denoiser, recipe, BATCH)
    noise, labels = given(tiny_denoiser)
    assert predict.way(1.0) == (STEPPED, "the steps of a cache plan run different graphs")
    expected = reference(predict, steps, noise, labels, 1.0)
    for _ in range(2):
        assert distance(predict.sample(steps, noise, labels, 1.0), expected) < 1e-5
    with pytest.raises(ValueError, match="1 steps, but the cache plan has"):
        predict.sample(steps[:1], noise, labels, 1.0)


def test_dynamic_thresholding_stays_outside(tiny_denoiser):
    predict = live_graph(tiny_denoiser, Recipe(timesteps=(900,)), BATCH)
    noise, labels = given(tiny_denoiser)
    clip = Thresholding(0.9, 2.0)
    assert predict.way(clip)[0] == PLAIN
    expected = reference(eager(tiny_denoiser), LEARNED, noise, labels, clip)
    assert distance(predict.sample(LEARNED, noise, labels, clip), expected) < 1e-5


@pytest.mark.parametrize("token", ["bf16", "w8a8"])
def test_inside_the_graph_the_solver_stays_in_fp32(tiny_denoiser, token):
    """Against the same graph with the solver in torch: were x rounded to bf16 between steps, they would differ by 1e-3."""
    noise, labels = given(tiny_denoiser)
    ranges = calibrate_ranges(tiny_denoiser.model, [(noise, torch.full((BATCH,), 500), labels)], tiny_denoiser.joins())
    plan = dict.fromkeys(ranges, token)
    apply_precision(tiny_denoiser.model, plan, ranges)
    predict = live_graph(tiny_denoiser, Recipe(timesteps=(900,), precision=plan), BATCH)
    expected = reference(eager(tiny_denoiser), LEARNED, noise, labels, 1.0)
    remove_precision(tiny_denoiser.model)
    plain = predict.sample(LEARNED, noise, labels, 1.0, PLAIN)
    found = predict.sample(LEARNED, noise, labels, 1.0)
    assert distance(plain, expected) < 0.03 and distance(found, expected) < 0.03
    assert distance(found, plain) < {"bf16": 1e-3, "w8a8": 0.03}[token]


def test_a_long_list_makes_no_larger_graph(tiny_denoiser):
    import openvino as ov
    ops = ov.opset13
    x, rows = ops.parameter([2, 3], np.float32), ops.parameter([2, 3], np.float32)
    sizes = [len(solved(ov.Model([ops.multiply(x, rows)], [x, rows]), Solving(2, 1.0, steps)).get_ops()) for steps in (2, 50)]
    assert sizes[0] == sizes[1] < 15


def test_an_update_by_hand():
    """x is 2 and the prediction 2 * 3: x0 is 0.5 * 2 + 0.25 * 6 = 2.5, cut at 2; x becomes 3 * 2 + 7 * 6 + 4 * 2 + 5 * 10 +
    6 * 100."""
    import openvino as ov
    ops = ov.opset13
    x, rows = ops.parameter([1, 1], np.float32), ops.parameter([1, 1], np.float32)
    graph = solved(ov.Model([ops.multiply(x, rows)], [x, rows]), Solving(2, 2.0))
    step = SolverStep(t=1.0, p=0.5, q=0.25, a=3.0, b=(4.0, 5.0, 6.0), d=7.0)
    found = ov.Core().compile_model(graph, "CPU")(
        [np.array(one, np.float32) for one in ([[2.0]], [[3.0]], coefficients(step, 2), [[[10.0]], [[100.0]]])])
    assert found[0].item() == 6 + 42 + 8 + 50 + 600 and found[1].flatten().tolist() == [2, 10]
    short = SolverStep(t=1.0, p=0.5, q=0.25, a=3.0, b=(4.0,))
    assert coefficients(short, 2) == [0.5, 0.25, 3.0, 0.0, 4.0, 0.0, 0.0]


def test_neighbouring_times_give_predictions_of_their_own(tiny_denoiser):
    """A bf16 graph that is given the timestep rounds it: 992 to 995 are one number."""
    assert len({torch.tensor(float(t)).bfloat16().item() for t in range(992, 996)}) < 4
    layers = dict.fromkeys(tiny_denoiser.prunable_layers(), "bf16")
    noise, labels = given(tiny_denoiser)
    times = [992.0, 993.0, 994.0, 994.5, 995.0]
    exact = [tiny_denoiser(noise, torch.full((BATCH,), t), labels) for t in times]
    apply_precision(tiny_denoiser.model, layers, {})
    predict = live_graph(tiny_denoiser, Recipe(timesteps=(900,), precision=layers), BATCH)
    remove_precision(tiny_denoiser.model)
    assert predict.index["inference_precision"] == "bf16"
    rows = [predict.rows(torch.tensor(t), None if labels is None else labels[:1]) for t in times]
    wanted = [tiny_row(tiny_denoiser, t, labels) for t in times]
    for i in range(len(times) - 1):
        change, expected = rows[i + 1] - rows[i], wanted[i + 1] - wanted[i]
        assert change.abs().max() > 0 and torch.nn.functional.cosine_similarity(change, expected, 1).item() > 0.3
    found = [predict(noise, torch.full((BATCH,), t), labels, 0) for t in times]
    for i in range(len(times) - 1):
        assert not torch.equal(found[i], found[i + 1]) and not torch.equal(exact[i], exact[i + 1])


def tiny_row(tiny_denoiser, t, labels):
    from tasks.runtime.conditioning import MODULATION, rows_of
    table = RowTable(lambda time: rows_of(tiny_denoiser.model, MODULATION, [time])[0])
    return table(torch.tensor(t), None if labels is None else labels[:1])
