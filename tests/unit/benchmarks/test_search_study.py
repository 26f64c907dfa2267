"""What the study of searches counts and scores; Optuna itself is in the study's own environment."""

import re

import numpy as np
import pytest
import torch

from benchmarks.environment import Environment
from benchmarks.search import efficiency, plot
from benchmarks.search.curves import STRATEGIES, curves, reached, shares
from benchmarks.search.strategies import SEARCHES, from_values, to_values
from tasks.core.cost import layer_costs
from tasks.core.denoiser import build
from tasks.evolve.search import Evaluation
from tasks.pretrain_load.architectures import SCHEDULE, dit


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    teacher = build("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=2, heads=2, patch=2), SCHEDULE)
    return efficiency.problem_of(teacher, steps=efficiency.STEPS, cache=(0.0,))


def test_every_strategy_can_be_run():
    assert set(SEARCHES) == set(STRATEGIES) == set(plot.COLOURS)


def test_the_opponent_is_pinned_exactly():
    lines = [line for line in Environment("search").requirements.read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)


def test_the_bound_is_a_tenth_of_eight_bits_at_a_hundred_steps(problem):
    costs = layer_costs(problem.teacher)
    products = sum(c.macs for c in costs if c.kind == "attention_product")  # at fp32
    whole = sum(c.macs for c in costs)
    share = 100 / 50 * ((whole - products) * 8 * 8 / 32**2 + products) / whole
    assert problem.space().bound == pytest.approx(share / 10)


def test_seeds_are_within_the_bound(problem):
    space = problem.space()
    seeds = problem.seeds(space)
    assert len(seeds) == 12 and all(space.cost(seed) <= space.bound for seed in seeds)


def test_values_come_back_as_the_candidate(problem):
    """Exactly where a list has a step in each quadratic group, nearly elsewhere."""
    space, rng = problem.space(), np.random.default_rng(0)
    for _ in range(20):
        there = from_values(space, {"steps": 16, "solver": "dpm2m", **{f"place{i}": rng.random() for i in range(16)},
                                    **{f"gene{i}": int(rng.integers(6)) for i in range(len(space.menus))}})
        back = from_values(space, to_values(space, there))
        assert back.genes == there.genes and back.solver == there.solver
        assert max(abs(a - b) for a, b in zip(back.timesteps, there.timesteps, strict=True)) <= 1
    for seed in problem.seeds(space):
        assert len(from_values(space, to_values(space, seed)).timesteps) == len(seed.timesteps)


# ---- scores ----

def test_fronts_are_scored_on_fresh_noise():
    """Searched losses say which are the front's members, fresh ones what they are worth."""
    told = [Evaluation("a", 0.005, 10.0), Evaluation("b", 0.010, 12.0), Evaluation("c", 0.010, 2.0)]
    asked, fresh = [], {"a": 15.0, "c": 5.0}

    def evaluate(candidates):
        asked.extend(candidates)
        return [fresh[c] for c in candidates]

    found = efficiency.fresh_scores(told, [2, 3], (0.0125, 20.0), evaluate)
    assert asked == ["a", "c"]
    assert found[2] == {"hypervolume": pytest.approx(0.6 * 0.25), "least_loss": 15.0}
    assert found[3] == {"hypervolume": pytest.approx(0.6 * 0.25 + 0.2 * 0.5), "least_loss": 5.0}


def test_what_is_beyond_the_corner_scores_nothing():
    found = efficiency.fresh_scores([Evaluation("a", 0.005, 10.0)], [1], (0.0125, 20.0), lambda asked: [25.0])
    assert found[1] == {"hypervolume": 0.0, "least_loss": 25.0}


def test_reached_is_where_a_curve_stays():
    curve = [(10, 0.2), (20, 0.5), (30, 0.3), (40, 0.5), (50, 0.6)]
    assert reached(curve, 0.5) == 40 and reached(curve, 0.1) == 10 and reached(curve, 0.7) == float("inf")


def rows(values):
    return [{"variant": f"efficiency.{strategy}", "seed": str(seed), "metric": f"hypervolume@{n}", "value": str(value)}
            for strategy, seed, n, value in values]


def test_shares_pair_the_seeds():
    found = curves([*rows([("ours", 0, 100, 0.4), ("ours", 0, 50, 0.3), ("ours", 1, 50, 0.1), ("ours", 1, 100, 0.2),
                           ("random", 1, 100, 0.2), ("random", 0, 100, 0.3), ("random", 2, 100, 0.3)]),
                    {"variant": "scale.busy", "seed": "0", "metric": "busy", "value": "1"}])
    assert found["ours", 0] == [(50, 0.3), (100, 0.4)]
    assert shares(found, "random") == [0.5, 1.0] and shares(found, "optuna") == []


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no curve"):
        plot.draw([], tmp_path / "curves.png")


def test_curves_are_drawn(tmp_path):
    plot.draw(rows([("ours", 0, 100, 0.4), ("ours", 0, 50, 0.3), ("random", 0, 50, 0.1)]), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
