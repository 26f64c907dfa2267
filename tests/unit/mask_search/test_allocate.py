"""The allocation under one budget, by hand and against every subset."""

from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.mask_search.allocate import Option, allocate, ceiling, uniform


def option(layers: str, grain: str, density: float, error: float, saved: float) -> Option:
    return Option(tuple(layers), grain, density, error, saved)


BLOCK = option("ab", "unit", 0.5, 3.0, 10)  # both layers at once ...
FIRST, SECOND = option("a", "2:4", 0.5, 1.0, 4), option("b", "2:4", 0.5, 1.5, 4)  # ... or each by itself
OTHER = option("c", "2:4", 0.5, 9.0, 4)


@pytest.mark.parametrize(("budget", "taken"), [
    (0, []), (1, [FIRST]), (4, [FIRST]), (5, [FIRST, SECOND]), (8, [FIRST, SECOND]), (9, [BLOCK]),
    (11, [FIRST, SECOND, OTHER]), (13, [BLOCK, OTHER])])
def test_by_hand_a_block_is_pruned_whole_or_layer_by_layer(budget, taken):
    assert allocate([BLOCK, FIRST, SECOND, OTHER], budget) == taken


def test_what_saves_nothing_is_left_alone():
    idle, busy = option("a", "2:4", 0.5, 0.1, 0), option("b", "unit", 0.5, 5.0, 1)
    assert allocate([idle, busy], 1) == [busy]


def test_an_unreachable_budget_says_what_is_reachable():
    assert ceiling([BLOCK, FIRST, SECOND, OTHER]) == 14  # not 22: a and b are pruned once
    with pytest.raises(ValueError, match="budget 15: the options save 14 at most"):
        allocate([BLOCK, FIRST, SECOND, OTHER], 15)
    with pytest.raises(ValueError, match="budget 1: the options save 0 at most"):
        allocate([], 1)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e12])
def test_the_unit_of_errors_and_of_savings_is_free(unit):
    scaled = [Option(o.layers, o.grain, o.density, o.error * unit, o.saved / unit) for o in (BLOCK, FIRST, SECOND, OTHER)]
    assert allocate(scaled, 8 / unit) == scaled[1:3]


options = st.lists(st.builds(option, st.sampled_from(["a", "b", "c", "d", "ab", "cd"]), st.just("unit"), st.just(0.5),
                             st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(options, st.floats(0, 1))
def test_least_error_of_all_subsets(offered, share):
    subsets = chain.from_iterable(combinations(offered, n) for n in range(len(offered) + 1))
    ways = [way for way in subsets if len({layer for o in way for layer in o.layers}) == sum(len(o.layers) for o in way)]
    most = max(sum(o.saved for o in way) for way in ways)
    budget = int(share * most)
    picked = allocate(offered, budget)
    assert ceiling(offered) == most and tuple(picked) in ways
    assert sum(o.saved for o in picked) >= budget
    assert sum(o.error for o in picked) == min(sum(o.error for o in way) for way in ways if sum(o.saved for o in way) >= budget)


def test_by_hand_uniform_is_the_highest_density_that_saves_enough():
    def offer(density):
        return [Option((layer,), "fine", density, 0.0, 100 * (1 - density)) for layer in "ab"]
    assert uniform(offer, 58, lowest=0.25) == offer(0.71)
    assert uniform(offer, 150, lowest=0.25) == offer(0.25)
    assert uniform(offer, 151, lowest=0.25) is None
    assert uniform(offer, 149.5, lowest=0.255) is None
