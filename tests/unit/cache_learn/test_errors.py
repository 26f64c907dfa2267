"""What is measured once per model, by hand on a toy, and what the table makes of it for other timestep lists."""

import numpy as np
import pytest
import torch

from tasks.cache_learn.errors import SKETCH, empty_errors, measure_errors, measure_growth, measure_products
from tasks.cache_learn.plan import plan_from_costs
from tasks.cache_learn.table import ReuseTable, grid_position, growth_at, interpolate_errors, step_weights, weights_of_column
from tasks.core.hooks import record, replaced, rewrite
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import initial_noise, network, trajectory
from tasks.runtime.solver import integrate, solver_steps
from tests.unit.cache_learn.toy import CONFIG, Constant, Scale, names, toy

GRID = (999, 749, 499, 249)


def measured(denoiser, max_gap=2, errors=None, **kwargs):
    errors = empty_errors(len(names(denoiser)), len(GRID)) if errors is None else errors
    noise = initial_noise(denoiser.sample_shape, range(3), seed=0)
    return measure_errors(denoiser, names(denoiser), GRID, noise, None, max_gap, errors, **kwargs)


def test_errors_by_hand():
    """h = x + c; out = h + w h. Reusing w h of another step errs by w (x_from - x_to); the constant errs by nothing."""
    denoiser = toy(Constant(), Scale(0.5))
    errors = measured(denoiser)
    noise = initial_noise(denoiser.sample_shape, range(3), seed=0)
    x = [x.double() for _, x, _ in trajectory(network(denoiser), denoiser.schedule, Recipe(timesteps=GRID), noise, None)]
    for start, to in [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3)]:
        assert errors[0, start, to] == 0
        assert errors[1, start, to] == pytest.approx(0.25 * (x[start] - x[to]).square().mean().item(), rel=1e-5)
    assert np.isnan(errors[:, 0, 3]).all() and np.isnan(errors[:, 2, 1]).all()
    assert (errors[:, range(4), range(4)] == 0).all()


def test_a_table_cut_short_is_completed_to_the_same_bytes():
    denoiser = toy(Scale(0.5), Scale(-0.2))
    columns = []
    whole = measured(denoiser, keep=lambda errors: columns.append(errors.copy()))
    assert len(columns) == 3
    left = []
    resumed = measured(denoiser, errors=columns[0], keep=lambda errors: left.append(1))
    assert len(left) == 2, "the finished column is not measured again"
    assert resumed.tobytes() == whole.tobytes()


def test_measuring_leaves_the_model_as_it_was():
    denoiser, x = toy(Scale(0.5), Constant()), torch.ones(1, 1, 4, 4)
    before = denoiser(x, None)
    measured(denoiser)
    assert torch.equal(denoiser(x, None), before)
    assert not any(m._forward_hooks for m in denoiser.model.modules())


def test_hooks_change_exactly_what_they_say():
    model, x = toy(Scale(1.0), Scale(2.0)).model, torch.ones(1)
    with record(model, ["parts.0", "parts.1"]) as outputs:
        assert model(x).item() == 6  # 1 + 1 = 2, 2 + 4 = 6
    assert [o.item() for o in outputs] == [1, 4]
    with replaced(model, "parts.0", torch.tensor([4.0])):
        assert model(x).item() == 15  # 1 + 4 = 5, 5 + 10 = 15
    with rewrite(model, ["parts.0", "parts.1"], lambda i, out: out * i):
        assert model(x).item() == 3  # 1 + 0 = 1, 1 + 2 = 3
    with pytest.raises(RuntimeError), rewrite(model, ["parts.0"], lambda i, out: out):
        raise RuntimeError
    assert model(x).item() == 6


def linear_table(slopes, grid=6, max_gap=3):
    """sqrt(E[s, from, to]) = slope_s (1 + to) gap."""
    start, to = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    gap = to - start
    roots = np.asarray(slopes)[:, None, None] * ((1 + to) * gap)
    return np.where((gap >= 0) & (gap <= max_gap), roots**2, np.nan)


GRID_6 = (1000, 800, 600, 400, 200, 0)


def test_interpolation_gives_back_the_grid():
    errors = linear_table([1.0, 2.0])
    costs = interpolate_errors(errors, GRID_6, GRID_6)
    known = ~np.isnan(errors)
    np.testing.assert_allclose(costs[known], errors[known])
    assert np.isinf(costs[~known]).all()


def test_interpolation_between_and_beyond_the_grid():
    """1000, 500, 300 and -100 lie at 0, 2.5, 3.5 and 5.5; the last is beyond the grid: gap continued, row of its end."""
    costs = interpolate_errors(linear_table([1.0]), GRID_6, (1000, 500, 300, -100))[0]
    assert costs[0, 1] == pytest.approx(((6 + 12 + 8 + 12) / 4) ** 2)  # of to = 2 no gap 3 is known: to = 3 stands in
    assert costs[1, 2] == pytest.approx((4.5 * 1.0) ** 2)
    assert costs[2, 3] == pytest.approx((6.0 * 2.0) ** 2)
    assert costs[1, 3] == pytest.approx((6.0 * 3.0) ** 2)
    assert np.isinf(costs[0, 2]), "a gap of 3.5 was never measured"
    assert np.isinf(costs[1, 0]), "nothing is reused from the future"
    assert (np.diag(costs) == 0).all()


def test_grid_position_continues_beyond_both_ends():
    np.testing.assert_allclose(grid_position((900, 600, 200), [1200, 900, 750, 600, 400, 200, 0]), [-1, 0, 0.5, 1, 1.5, 2, 2.5])


# ---- growth

FLAT = np.ones(5)  # no error grows


def grown(denoiser, growth=None, **kwargs):
    noise = initial_noise(denoiser.sample_shape, range(3), seed=0)
    return measure_growth(denoiser, GRID, noise, None, np.full(len(GRID), np.nan) if growth is None else growth, **kwargs)


def test_growth_by_hand():
    """The prediction is 0.5 x: an error of the state is multiplied, at every step, by what the step multiplies x with."""
    denoiser = toy(Scale(-0.5))
    denoiser.schedule.config["clip_sample"] = False
    steps = solver_steps(denoiser.schedule.config, GRID, "ddim")
    factors = [step.a + step.b[0] * (step.p + 0.5 * step.q) for step in steps]
    last = steps[-1].p + 0.5 * steps[-1].q  # the image is the last x0
    growth = grown(denoiser)
    assert growth[3] == pytest.approx(last**2, rel=1e-4)
    assert growth[2] == pytest.approx((last * factors[2]) ** 2, rel=1e-4)
    assert growth[0] == growth[1] == growth[2]


def test_growth_cut_short_is_completed():
    denoiser = toy(Scale(-0.5), Constant())
    kept = []
    whole = grown(denoiser, keep=lambda growth: kept.append(growth.copy()))
    assert len(kept) == 2 and np.isnan(kept[0][3])
    np.testing.assert_array_equal(grown(denoiser, kept[0]), whole)


def test_where_nothing_differs_growth_is_a_number():
    denoiser = toy(Constant())
    growth = measure_growth(denoiser, GRID, torch.zeros(1, *denoiser.sample_shape), None, np.full(len(GRID), np.nan))
    assert (growth > 0).all() and np.isfinite(growth_at(GRID, growth, GRID)).all()


def test_growth_of_other_lists():
    """Geometric between two timesteps; 1 at the image, which lies one timestep beyond 0."""
    found = growth_at((300, 100, 0), np.array([16.0, 4.0, 2.0]), (300, 200, 0))
    np.testing.assert_allclose(found, [16, 8, 2, 1])
    np.testing.assert_allclose(growth_at((199, 99), np.array([16.0, 4.0]), (49,))[0], 2.0)


def test_step_weights_are_the_solvers_derivative():
    """v prediction on the cosine schedule: x moves along a circle, so equal steps count the same."""
    weights = step_weights(solver_steps(CONFIG, (900, 800, 700, 600), "ddim"), FLAT)
    np.testing.assert_allclose(weights[:3], np.sin(0.1 * np.pi / 2) ** 2, rtol=0.02)


@pytest.mark.parametrize("solver", ["ddim", "dpm2m", "ddim_diffusers"])
def test_step_weights_by_finite_differences(solver):
    """A network that sees nothing of x: the image moves by what one prediction moves it. What a state's error grows to follows
    from the steps' factors; of steps whose x0 the next one uses too (dpm2m) it is known from the last but one on."""
    timesteps, config = (900, 700, 400, 100), {**CONFIG, "clip_sample": False}
    steps = solver_steps(config, timesteps, solver)

    def image(predictions):
        *_, (_, _, x0) = integrate(lambda x, t, labels, i: torch.full_like(x, predictions[i]), steps, torch.ones(1).double(),
                                   None, None)
        return x0.item()

    moved = [image(np.eye(4)[i]) - image(np.zeros(4)) for i in range(4)]
    last, before = steps[3].p ** 2, (steps[3].p * (steps[2].a + steps[2].b[0] * steps[2].p)) ** 2
    weights = step_weights(steps, np.array([0, 0, before, last, 1.0]))
    np.testing.assert_allclose(weights[1:], np.square(moved[1:]))


def test_a_step_whose_errors_grow_less_is_skipped():
    grid = (900, 600, 300, 0)
    errors = np.where((gap := np.subtract.outer(range(4), range(4)).T) >= 0, 1.0 * gap**2, np.nan)[None]
    table = ReuseTable(sublayers=["a"], grid=grid, errors=errors, growth=np.array([1.0, 1.0, 1e4, 1e-4]),
                       products=np.ones((1, 4, 4)))
    skipped = plan_from_costs(table.costs(solver_steps(CONFIG, grid, "ddim")), ["a"], 0.25, 4)
    assert skipped.compute == ((True,), (True,), (False,), (True,)), "the step that leads to timestep 0"


# ---- products and weights

def products_of(denoiser):
    noise = initial_noise(denoiser.sample_shape, range(3), seed=0)
    return measure_products(denoiser, names(denoiser), GRID, noise, None)


def test_products_by_hand():
    """The constant's outputs are 0.3; the other's are half of its input, the state and 0.3."""
    denoiser = toy(Constant(), Scale(0.5))
    noise = initial_noise(denoiser.sample_shape, range(3), seed=0)
    x = torch.stack([x.double().flatten() for _, x, _ in
                     trajectory(network(denoiser), denoiser.schedule, Recipe(timesteps=GRID), noise, None)])
    found = products_of(denoiser)
    np.testing.assert_allclose(found[0], 0.09, rtol=1e-5)
    half = 0.5 * (x + 0.3)
    np.testing.assert_allclose(found[1], half @ half.T / half.shape[1], rtol=1e-4)


def test_of_large_outputs_some_elements_tell(monkeypatch):
    denoiser = toy(Scale(0.5))
    exact = products_of(denoiser)
    monkeypatch.setattr("tasks.cache_learn.errors.SKETCH", 40)  # of 48
    assert SKETCH > 48 and not np.array_equal(products_of(denoiser), exact)
    np.testing.assert_allclose(products_of(denoiser), exact, rtol=0.5)


def test_weights_are_the_least_squares_of_the_outputs():
    """Three outputs in a space of six; the fourth is a sum of them, the fifth has a part that none of them has."""
    y = np.random.default_rng(0).normal(size=(3, 6))
    y = np.stack([*y, 0.5 * y[2] - 0.3 * y[1] + 0.1 * y[0], y[0] + np.linalg.svd(y)[2][-1]])
    *full, first, second = weights_of_column([True, True, True, False, False], y @ y.T)
    assert full == [(), (), ()]
    np.testing.assert_allclose(first, (0.5, -0.3, 0.1), atol=1e-4)
    np.testing.assert_allclose(second, (0, 0, 1), atol=1e-4)


def test_weights_for_another_list():
    """Outputs that are linear in t: between the grid's timesteps a line through the last two; beyond its end nothing moves."""
    grid = (1000, 800, 600, 400, 200)
    outputs = np.stack([np.array(grid) / 500, np.ones(5)], axis=1)
    table = ReuseTable(sublayers=["a"], grid=grid, errors=np.zeros((1, 5, 5)), growth=np.ones(5),
                       products=(outputs @ outputs.T)[None])
    plan = CachePlan(sublayers=("a",), compute=((True,), (True,), (False,), (True,), (False,)))
    found = table.forecasting(plan, "learned", (900, 700, 500, 150, 100))
    assert found.forecast == "learned" and found.compute == plan.compute
    w1, w0 = found.weights[2][0]
    assert (700 * w1 + 900 * w0, w1 + w0) == (pytest.approx(500, rel=1e-2), pytest.approx(1, abs=1e-2))
    np.testing.assert_allclose(np.dot(found.weights[4][0], [[200, 1], [700, 1], [900, 1]]), [200, 1], rtol=2e-2)
    assert table.forecasting(plan, "taylor", (900, 700, 500, 150, 100)).weights is None


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = ReuseTable(sublayers=["a"], grid=GRID, errors=measured(toy(Scale(0.5))), growth=np.array([4.0, 4.0, 2.0, 1.0]),
                       products=products_of(toy(Scale(0.5))))
    table.write(tmp_path, forecast="none")
    found = ReuseTable.read(tmp_path)
    steps = solver_steps(CONFIG, GRID, "dpm2m")
    np.testing.assert_array_equal(found.costs(steps), table.costs(steps))
    plan = CachePlan(sublayers=("a",), compute=((True,), (True,), (False,), (False,)))
    assert found.weigh(plan, GRID) == table.weigh(plan, GRID)
