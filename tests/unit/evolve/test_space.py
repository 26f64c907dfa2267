"""Candidates: lists stay lists, repair ends within the bound, operators keep what both parents share."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.recipe import Recipe
from tasks.evolve.space import Candidate, Space, cross_timesteps, mutate_timesteps, resize, sample_timesteps

BITS = {"w4": 4, "w6": 6, "w8": 8}


def recipe_of(c: Candidate) -> Recipe:
    return Recipe(timesteps=c.timesteps, solver=c.solver, precision={f"l{i}": f"{g}a8" for i, g in enumerate(c.genes)})


def cost_of(recipe: Recipe) -> float:
    return recipe.nfe * sum(int(token[1]) for token in recipe.precision.values())


SPACE = Space(horizon=1000, steps=(4, 12), menus=(tuple(BITS),) * 6, cache=(0.0, 0.5), solvers=("ddim", "dpm2m"),
              recipe=recipe_of, recipe_cost=cost_of, bound=200.0)


def is_list(timesteps: tuple[int, ...], horizon: int = 1000) -> bool:
    return all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False)) and timesteps[-1] >= 0 and timesteps[0] < horizon


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from(["quadratic", "uniform", "free"]))
def test_timestep_lists_stay_strictly_decreasing(seed, steps, grouping):
    rng = np.random.default_rng(seed)
    a, b = sample_timesteps(1000, steps, grouping, rng), sample_timesteps(1000, 7, grouping, rng)
    mutant = mutate_timesteps(a, 1000, (1, 40), 0.5, rng)
    child = cross_timesteps(a, b, rng)
    assert len(a) == steps and is_list(a) and is_list(mutant) and is_list(child)
    assert abs(len(mutant) - steps) <= 1 and len(child) in (steps, 7)


def test_quadratic_groups_hold_one_timestep_each():
    drawn = sample_timesteps(1000, 10, "quadratic", np.random.default_rng(0))
    assert [int(np.sqrt(t / 1000) * 10) for t in drawn] == list(range(9, -1, -1))


def test_resize_keeps_the_course():
    assert resize((999, 749, 499, 249), 4) == (999, 749, 499, 249)
    assert resize((999, 749, 499, 249), 2) == (999, 499)
    assert resize((900, 600, 300), 6) == (900, 750, 600, 450, 300, 150)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_is_made_is_within_the_bound(seed):
    rng = np.random.default_rng(seed)
    a, b = SPACE.sample(rng), SPACE.sample(rng)
    for made in (a, b, SPACE.mutate(a, 0.3, rng), SPACE.crossover(a, b, rng)):
        assert SPACE.cost(made) <= 200 and 4 <= len(made.timesteps) <= 12 and is_list(made.timesteps)


def test_repair_leaves_what_is_within_the_bound_alone():
    fine = Candidate((900, 500, 200, 10), ("w8",) * 6, 0.0, "ddim")
    assert SPACE.repair(fine, np.random.default_rng(0)) is fine


def test_repair_drops_to_the_cheapest_at_the_tightest_bound():
    tight = replace(SPACE, bound=4 * 6 * 4)
    repaired = tight.repair(Candidate(tuple(range(110, -10, -10)), ("w8",) * 6, 0.0, "ddim"), np.random.default_rng(0))
    assert len(repaired.timesteps) == 4 and set(repaired.genes) == {"w4"} and repaired.timesteps[0] == 110


def test_a_fixed_list_is_never_changed():
    base = (900, 600, 300)
    fixed = replace(SPACE, timesteps=base, bound=float("inf"))
    rng = np.random.default_rng(0)
    a, b = fixed.sample(rng), fixed.sample(rng)
    assert all(c.timesteps == base for c in (a, fixed.mutate(a, 1.0, rng), fixed.crossover(a, b, rng)))


def test_crossover_takes_every_gene_from_a_parent():
    rng = np.random.default_rng(3)
    free = replace(SPACE, bound=float("inf"))
    a, b = (Candidate((900, 500, 100, 5), (g,) * 6, 0.0, "ddim") for g in ("w4", "w8"))
    child = free.crossover(a, b, rng)
    assert set(child.genes) == {"w4", "w8"} and child.timesteps == a.timesteps


def test_unknown_grouping_is_named():
    with pytest.raises(ValueError, match="grouping: 'quadratc'.*did you mean quadratic"):
        replace(SPACE, grouping="quadratc")


def test_unbounded_repairs_nothing():
    rng, seen = np.random.default_rng(0), SPACE.unbounded()
    assert max(seen.cost(seen.sample(rng)) for _ in range(50)) > SPACE.bound


def test_features_halve_from_choice_to_choice():
    """Two candidates that differ in one gene differ in that gene's feature and in the sum over genes of its menu."""
    a = Candidate((900, 500, 200, 10), ("w4", "w4", "w6", "w8", "w8", "w8"), 0.0, "ddim")
    b = replace(a, genes=("w4", "w6", "w6", "w8", "w8", "w8"))
    found, other = SPACE.features([a, b])
    assert found[:6].tolist() == [1, 1, 0.5, 0.25, 0.25, 0.25] and found[6] == 3.25
    assert np.flatnonzero(found - other).tolist() == [1, 6]


def test_features_tell_lists_solvers_and_budgets_apart():
    a = Candidate((900, 500, 200, 10), ("w4",) * 6, 0.0, "ddim")
    others = [replace(a, timesteps=(900, 500, 200, 11)), replace(a, timesteps=(900, 500, 300, 200, 10)),
              replace(a, solver="dpm2m"), replace(a, cache=0.5)]
    assert len(np.unique(SPACE.features([a, *others]), axis=0)) == 5


def test_kinds_of_cache_plans_are_searched_and_told_apart():
    kinds = ((2, "taylor"), (4, "none"))
    space, rng = replace(SPACE, reuse=kinds), np.random.default_rng(0)
    assert {space.sample(rng).reuse for _ in range(20)} == set(kinds)
    a = replace(space.sample(rng), cache=0.5, reuse=kinds[0])
    b = replace(a, reuse=kinds[1])
    assert {space.mutate(a, 1.0, rng).reuse for _ in range(20)} == set(kinds)
    assert {space.crossover(a, b, rng).reuse for _ in range(20)} == set(kinds)
    first, second = space.features([a, b])
    assert not np.array_equal(first, second)
    first, second = space.features([replace(a, cache=0.0), replace(b, cache=0.0)])
    assert np.array_equal(first, second)  # nothing is reused


# ---- weights with solvers of their own ----

THREE, FIVE = (900, 500, 100), (900, 700, 500, 300, 100)
OWN = replace(SPACE, weights=("teacher", "few"), tied=frozenset({"few"}), bound=float("inf"),
              recipe=lambda c: recipe_of(replace(c, solver="ddim")),
              own={"teacher": {"learned_3": THREE, "learned_5": FIVE}, "few": {"few": (999, 400)}})


def fits(c: Candidate) -> bool:
    """Whether its solver is one of its weights', and its timesteps are its solver's."""
    own = OWN.own[c.weights].get(c.solver)
    return c.timesteps == own if own else c.weights == "teacher" and c.solver in OWN.solvers and 4 <= len(c.timesteps) <= 12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_solvers_stay_with_their_weights_and_timesteps_with_their_solvers(seed):
    rng = np.random.default_rng(seed)
    a, b = OWN.sample(rng), OWN.sample(rng)
    tight = replace(OWN, bound=100.0)
    assert all(map(fits, (a, b, OWN.mutate(a, 0.5, rng), OWN.crossover(a, b, rng), tight.repair(a, rng), tight.sample(rng))))
    assert tight.cost(tight.repair(a, rng)) <= 100


def test_every_solver_of_all_weights_is_found():
    rng = np.random.default_rng(0)
    found = {(c.weights, c.solver) for c in (OWN.sample(rng) for _ in range(200))}
    assert found == {("teacher", s) for s in ("ddim", "dpm2m", "learned_3", "learned_5")} | {("few", "few")}


def test_a_classical_list_may_begin_as_a_learned_one():
    """Too short a one gets as many steps as there have to be."""
    learned = Candidate(THREE, ("w4",) * 6, 0.0, "learned_3")
    assert OWN.settled(replace(learned, solver="ddim"), np.random.default_rng(0)).timesteps == resize(THREE, 4)


def test_repair_goes_to_the_learned_solver_of_fewer_steps():
    teacher = replace(OWN, weights=("teacher",), bound=3 * 6 * 4)
    repaired = teacher.repair(Candidate(FIVE, ("w4",) * 6, 0.5, "learned_5"), np.random.default_rng(0))
    assert (repaired.solver, repaired.timesteps) == ("learned_3", THREE)


def test_the_cheapest_has_the_fewest_steps_of_all_weights():
    cheapest = OWN.cheapest()
    assert (cheapest.weights, cheapest.solver, cheapest.timesteps) == ("few", "few", (999, 400))


def test_features_tell_weights_and_their_solvers_apart_and_take_a_choice_that_is_on_no_menu():
    genes = ("w4",) * 6
    made = [Candidate(THREE, genes, 0.0, "learned_3"), Candidate((999, 400), genes, 0.0, "few", "few"),
            Candidate(FIVE, genes, 0.0, "learned_5"), Candidate(FIVE, genes, 0.0, "ddim")]
    assert len(np.unique(OWN.features(made), axis=0)) == 4
    off = replace(made[3], genes=("w3", *genes[1:]))
    assert np.array_equal(*OWN.features([off, made[3]]))
    moves = OWN.cheaper(replace(off, genes=("w7",) * 6), np.random.default_rng(1))
    assert [c.genes.count("w4") for c in moves if c.genes.count("w7") < 6] == [1]
