"""The line that says where a search stands, against arithmetic done by hand."""

from tasks.evolve.standing import Standing


def through(standing, pairs):
    """(cost, loss) pairs pass as candidates, each its own cost, and losses."""
    list(standing.asked(pairs))
    return list(standing.told(loss for _, loss in pairs))


def test_nothing_is_said_before_anything_is_told():
    assert Standing(lambda c: c[0]).line() == ""


def test_best_and_hypervolume_by_hand():
    standing = Standing(lambda c: c[0])
    assert through(standing, [(1.0, 3.0), (2.0, 1.0), (4.0, 4.0)]) == [3.0, 1.0, 4.0]
    assert standing.line() == "best 1 at cost 2, hypervolume 0.438"  # (4 - 1)(4 - 3) + (4 - 2)(3 - 1) = 7 of 16
    through(standing, [(3.0, 0.5)])
    assert standing.line() == "best 0.5 at cost 3, hypervolume 0.469"  # and (4 - 3)(1 - 0.5)


def test_failures_are_counted_and_nothing_else_is_made_of_them():
    standing = Standing(lambda c: c[0])
    through(standing, [(1.0, None)])
    assert standing.line() == "1 failed"
    through(standing, [(1.0, 2.0), (9.0, None)])
    assert standing.line() == "best 2 at cost 1, hypervolume 0.000, 2 failed"


def test_costs_are_worked_out_when_a_line_is_wanted():
    asked = []
    standing = Standing(lambda c: asked.append(c) or c[0])
    through(standing, [(1.0, 3.0), (2.0, 1.0)])
    assert asked == []
    standing.line()
    standing.line()
    assert asked == [(1.0, 3.0), (2.0, 1.0)]
