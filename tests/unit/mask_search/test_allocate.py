"""The knapsack, by hand and against brute force."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.mask_search.allocate import Option, allocate


def test_the_cheap_block_pays_first():
    options = {"a": [Option(1.0, 0.0, 0), Option(0.5, 3.0, 10)], "b": [Option(1.0, 0.0, 0), Option(0.5, 1.0, 10)]}
    assert allocate(options, 10) == {"a": 1.0, "b": 0.5}
    assert allocate(options, 11) == {"a": 0.5, "b": 0.5}
    assert allocate(options, 0) == {"a": 1.0, "b": 1.0}


def test_an_unreachable_budget_says_what_is_reachable():
    with pytest.raises(ValueError, match="budget 21: the densities on offer remove 20 at most"):
        allocate({"a": [Option(0.5, 1.0, 20)]}, 21)


blocks = st.lists(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(blocks, st.floats(0, 1))
def test_least_error_of_all_ways(raw, share):
    options = {str(i): [Option(float(j), float(error), removed) for j, (error, removed) in enumerate(choices)]
               for i, choices in enumerate(raw)}
    budget = int(share * sum(max(o.removed for o in choices) for choices in options.values()))
    picked = allocate(options, budget)
    chosen = [next(o for o in options[block] if o.density == density) for block, density in picked.items()]
    best = min(sum(o.error for o in way) for way in product(*options.values()) if sum(o.removed for o in way) >= budget)
    assert sum(o.removed for o in chosen) >= budget
    assert sum(o.error for o in chosen) == best
