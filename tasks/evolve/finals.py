"""The verdict's own question, asked of the few that might be handed over: relative FID over dense, and its 95 % bound.

A search compares hundreds of candidates on few images, each with the teacher's of the same noise; weights and solvers that were
learned make other images that are as good, which such a distance cannot tell. So finalists of the front are sampled as `fid`
will sample them, more images from noise of their own, and judged by FID against the real training images, by the net that
guides the search. Neither these noises nor this net are those of the verdict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.core.params import check_range
from tasks.core.quality import Difference, Gaussian, paired_bootstrap, strata_of
from tasks.core.sampler import labels_for
from tasks.evolve.search import Evaluation, pareto_front

FAR = 4.0    # times the least distance of all: above it nothing is a finalist
APART = 1.08  # of costs: nearer neighbours of a front are one finalist


@dataclass(frozen=True, kw_only=True)
class Finals:
    images: int      # of each finalist; 0: there are no finals, the proxy decides
    finalists: int   # at most
    resamples: int   # of the paired bootstrap
    seed: int        # of the noise

    def __post_init__(self):
        if self.images:
            check_range("evolve.finals.images", self.images, 100, 10**6)
        for name, low, high in (("images", 0, 10**6), ("finalists", 1, 1000), ("resamples", 20, 10**5), ("seed", 0, 10**6)):
            check_range(f"evolve.finals.{name}", getattr(self, name), low, high)


@dataclass(frozen=True)
class Final:
    """One finalist and its loss as the verdict has it: the relative increase of FID over dense."""

    evaluation: Evaluation
    loss: Difference

    @property
    def facts(self) -> dict:
        return {"loss": self.loss.estimate, "loss_upper95": self.loss.upper95}


def finalists(told: Sequence[Evaluation], bound: float, most: int, family: Callable[[Evaluation], object]) -> list[Evaluation]:
    """At most `most` of the fronts of each family (weights, and whether the solver was learned), by rising cost, and the
    nearest of all, whatever it costs. What is FAR is left out, as are neighbours at nearly one cost.

    Raises ValueError when nothing within the bound could be evaluated.
    """
    within = [e for e in told if e.loss is not None and e.cost <= bound]
    if not within:
        raise ValueError(f"evolve: all {len(told)} evaluations failed; the lines above say why")
    nearest = min(within, key=lambda e: (e.loss, e.cost))
    families: dict[object, list[Evaluation]] = {}
    for e in within:
        if e.loss <= FAR * nearest.loss:
            families.setdefault(family(e), []).append(e)
    ranked = sorted((e for near in families.values() for e in apart(pareto_front(near))), key=lambda e: (e.cost, e.loss))
    return [e for e in spread(ranked, most - 1) if e is not nearest] + [nearest]


def apart(front: Sequence[Evaluation]) -> list[Evaluation]:
    """front: by rising cost. Of those at nearly one cost, the first."""
    found: list[Evaluation] = []
    for e in front:
        if not found or e.cost > APART * found[-1].cost:
            found.append(e)
    return found


def spread(ranked: Sequence[Evaluation], most: int) -> list[Evaluation]:
    """At most `most`, evenly spread over the order."""
    if len(ranked) <= most:
        return list(ranked)
    return [ranked[i] for i in sorted({round(k * (len(ranked) - 1) / max(1, most - 1)) for k in range(most)})]


def judge_finals(found: Sequence[Evaluation], seen: Sequence[np.ndarray | None], dense: np.ndarray,
                 reference: Gaussian, params: Finals, num_classes: int) -> list[Final]:
    """seen: features (N, D) of each, None where it could not be sampled; dense: of the same noises; reference: of real ones."""
    strata = strata_of(None if num_classes == 0 else labels_for(range(len(dense)), num_classes).numpy())
    return [Final(e, paired_bootstrap(x, dense, reference, params.resamples, np.random.default_rng(params.seed), strata))
            for e, x in zip(found, seen, strict=True) if x is not None]


def decide(finals: Sequence[Final], bound: float) -> tuple[str, Final]:
    """The rule and what it chose: the cheapest that holds the bound for certain; else the cheapest that holds it by its
    estimate, since few images make no one certain; else the one of least loss."""
    def cheapest(held: Sequence[Final]) -> Final:
        return min(held, key=lambda one: (one.evaluation.cost, one.loss.estimate))

    for rule, held in (("certain", [f for f in finals if f.loss.upper95 <= bound]),
                       ("likely", [f for f in finals if f.loss.estimate <= bound])):
        if held:
            return rule, cheapest(held)
    return "nearest", min(finals, key=lambda one: one.loss.estimate)
