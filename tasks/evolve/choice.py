"""What a search hands over: the answer to the verdict's own question, as far as the proxy can tell.

The verdict asks for the cheapest that is good enough. So of all within the bound on cost the cheapest is taken whose loss is
within the tolerated one for certain: at the 95 % bound of the proxy's error, since the luckiest of many candidates is chosen.
Where there is none, the nearest. Nothing that costs more than a plan of one precision is taken for a gain that may be chance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.core.quality import NORMAL_95, Difference
from tasks.evolve.search import Evaluation

Above = Callable[[Evaluation, Evaluation | None], Difference]  # loss of one above that of another, None: above nothing


@dataclass(frozen=True, kw_only=True)
class Choice:
    best: Evaluation
    cheapest: Evaluation | None  # that holds the tolerated loss for certain
    nearest: Evaluation          # within the bound, whatever it costs

    @property
    def rule(self) -> str:
        return "nearest" if self.cheapest is None else "cheapest"


def choose(told: Sequence[Evaluation], bound: float, tolerated: float, above: Above,
           companions: Callable[[Evaluation], Sequence[Evaluation]] = lambda e: ()) -> Choice:
    """companions: what is the same candidate but for its precision, of one precision throughout.

    Raises ValueError when nothing within the bound could be evaluated.
    """
    within = [e for e in told if e.loss is not None and e.cost <= bound]
    if not within:
        raise ValueError(f"evolve: all {len(told)} evaluations failed; the lines above say why")
    nearest = min(within, key=lambda e: (e.loss, e.cost))
    good = [e for e in within if above(e, None).upper95 <= tolerated]
    cheapest = min(good, key=lambda e: (e.cost, e.loss), default=None)
    best = nearest if cheapest is None else cheapest
    return Choice(best=without_idle_precision(best, companions(best), above, good), cheapest=cheapest, nearest=nearest)


def without_idle_precision(best: Evaluation, uniform: Sequence[Evaluation], above: Above,
                           good: Sequence[Evaluation] = ()) -> Evaluation:
    """`best`, unless one of `uniform` costs no more and best is not shown to be nearer: then the cheapest of these.

    good: what holds the tolerated loss; to hold it, where the other does not, is a gain.
    """
    def gains(e: Evaluation) -> bool:
        told = above(e, best)
        return told.estimate > NORMAL_95 * told.error or (best in good and e not in good)

    idle = [e for e in uniform if e.loss is not None and e.cost <= best.cost and not gains(e)]
    return min([*idle, best], key=lambda e: (e.cost, e.loss))
