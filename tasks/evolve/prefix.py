"""Network evaluations that candidates share: where trajectories begin alike, their common steps are computed once.

What is kept is the network's prediction at a step, from which the solver's state follows in a few sums, its history (the x0 of
the steps before) included: a trajectory that goes on from kept predictions is the same bit for bit. Prediction i
depends on the weights, the bits of every layer, noise and labels, what the cache plan skipped up to step i, the coefficients of
the steps before it and its own timestep; of the next timestep it knows nothing, and neither do the solvers differ before their
coefficients do.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import astuple

from torch import Tensor

from tasks.core.artifacts import digest
from tasks.core.recipe import CachePlan
from tasks.runtime.cache import sources
from tasks.runtime.solver import Predict, SolverStep


class Predictions:
    """Predictions by key, the least recently used dropped first. capacity: bytes of their elements; 0 keeps none."""

    def __init__(self, capacity: int):
        self.capacity, self.size = capacity, 0
        self.kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.asked = self.saved = 0  # evaluations of the network, and how many of them were not computed

    @property
    def hit_rate(self) -> float:
        return self.saved / self.asked if self.asked else 0.0

    def get(self, key: Hashable) -> Tensor | None:
        if key not in self.kept:
            return None
        self.kept.move_to_end(key)
        return self.kept[key]

    def put(self, key: Hashable, prediction: Tensor) -> None:
        self.size -= 0 if key not in self.kept else self.kept.pop(key).nbytes
        prediction = prediction.clone()  # a network may return a view of more than this, a learned variance for example
        self.kept[key] = prediction
        self.size += prediction.nbytes
        while self.size > self.capacity:
            self.size -= self.kept.popitem(last=False)[1].nbytes


def shared(predict: Predict, store: Predictions, head: object, steps: Sequence[SolverStep], plan: CachePlan | None,
           first: int = 0) -> Predict:
    """`predict` of one recipe, answering from `store` where it can.

    head: JSON-like, all that tells apart two evaluations of equal steps and plan: weights, bits, protocol. Step 0 begins the
    next chunk of samples, counted from `first`. Chunk k is of the same noise and labels every time.
    """
    chunk, known = first - 1, {}
    keys: list[str] = []

    def answer(x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        nonlocal chunk, keys, known
        if step == 0:
            chunk += 1
            keys = step_keys([head, chunk], steps, plan)
            found = [store.get(key) for key in keys]
            compute = evaluated([one is not None for one in found], plan)
            known = {i: one for i, one in enumerate(found) if not compute[i]}
            store.asked += len(keys)
            store.saved += len(known)
        if step in known:
            return known[step]
        prediction = predict(x, t, labels, step)
        store.put(keys[step], prediction)
        return prediction

    return answer


def step_keys(head: object, steps: Sequence[SolverStep], plan: CachePlan | None) -> list[str]:
    """A key for each step: equal where all that the step's prediction depends on is equal."""
    keys, past = [], digest([head, steps[0].opening and astuple(steps[0].opening)])
    weights = plan.weights if plan and plan.weights else [()] * len(steps)
    for step, skips, learned in zip(steps, skipped(plan, len(steps)), weights, strict=True):
        keys.append(digest([past, step.t, skips, learned]))
        past = digest([keys[-1], astuple(step)])
    return keys


def skipped(plan: CachePlan | None, steps: int) -> list[list]:
    """[sublayer, steps whose outputs stand in for its own] of all that each step skips."""
    if plan is None:
        return [[]] * steps
    found = [sources(column, plan.forecast) for column in zip(*plan.compute, strict=True)]
    columns = dict(zip(plan.sublayers, found, strict=True))
    return [[[name, column[i]] for name, column in columns.items() if column[i]] for i in range(steps)]


def evaluated(known: Sequence[bool], plan: CachePlan | None) -> list[bool]:
    """Which steps the network has to be evaluated at: those that are not known, and those from which these reuse outputs of
    sublayers, which are not kept."""
    compute = [not one for one in known]
    reuses = skipped(plan, len(known))
    for step in reversed(range(len(known))):
        if compute[step]:
            for source in (source for _, found in reuses[step] for source in found):
                compute[source] = True
    return compute
