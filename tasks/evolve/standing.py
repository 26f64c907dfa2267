"""Where a search that is running stands, in a line."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from tasks.evolve.search import Evaluation, hypervolume, pareto_front


class Standing:
    """Candidates and losses pass through it. What is to be said of them is worked out when `line` is asked for, not before."""

    def __init__(self, cost: Callable):
        self.cost = cost                       # of a candidate
        self.waiting: deque = deque()          # candidates asked and not told
        self.fresh: list[tuple] = []           # (candidate, loss) told since the last line
        self.front: list[Evaluation] = []
        self.corner = (0.0, 0.0)               # the dearest and the farthest so far
        self.failed = 0

    def asked(self, candidates: Iterable) -> Iterator:
        for candidate in candidates:
            self.waiting.append(candidate)
            yield candidate

    def told(self, losses: Iterable[float | None]) -> Iterator[float | None]:
        """losses: in the order in which the candidates were asked; None where an evaluation failed."""
        for loss in losses:
            self.fresh.append((self.waiting.popleft(), loss))
            yield loss

    def line(self) -> str:
        """`best 1.23 at cost 0.14, hypervolume 0.52, 1 failed`: the least distance and what it costs; the share that the front
        dominates of the box up to the dearest and the farthest candidate so far."""
        found = [Evaluation(candidate, self.cost(candidate), loss) for candidate, loss in self.fresh if loss is not None]
        self.failed += len(self.fresh) - len(found)
        self.fresh = []
        self.front = pareto_front([*self.front, *found])
        self.corner = (max([self.corner[0], *(e.cost for e in found)]), max([self.corner[1], *(e.loss for e in found)]))
        failed = f"{self.failed} failed" if self.failed else ""
        if not self.front or not all(self.corner):
            return failed
        best = self.front[-1]
        said = f"best {best.loss:.4g} at cost {best.cost:.3g}, hypervolume {hypervolume(self.front, self.corner):.3f}"
        return f"{said}, {failed}" if failed else said
