"""Plans of hard gates that learn from gradients, under a budget: what is trained is the plan that runs.

Each training step runs with gates of 0 and 1 that remove exactly the budget's share with at most `max_masks` distinct rows. A
hard gate passes its gradient on as if it were continuous (straight-through, arXiv 1308.3432): the price of not computing that
sublayer at that step while all else runs as planned. Prices add up in `scores`, and the next plan is the cheapest for costs +
scores + noise: "follow the perturbed leader" (Kalai and Vempala, J. Comput. Syst. Sci. 71, 2005). Only differences of prices
move the plan, so no weight trades quality against the budget. The noise falls to 0; without it most gates are seen from one
side alone, and the gradient at 1 leaves out the error that skipping itself would add.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tasks.cache_learn.plan import pattern_costs, plan_from_costs
from tasks.core.recipe import CachePlan


class Leader:
    """The best plan so far, and what it learned from.

    costs: (S, N, N) of reuse, as for `plan_from_costs`: what is known before training, 0 if nothing; inf where reuse is
    forbidden. They count in units of what their own best plan pays for one reuse, gradients in units of their mean size over
    skipped gates so far: after 1 / lr steps both weigh the same. noise: standard deviation at the first of `steps`, same units.
    """

    def __init__(self, costs: np.ndarray, sublayers: Sequence[str], budget: float, max_masks: int, lr: float, noise: float,
                 steps: int):
        self.sublayers, self.budget, self.max_masks = sublayers, budget, max_masks
        self.lr, self.noise, self.steps = lr, noise, steps
        self.costs = in_units(costs, plan_from_costs(costs, sublayers, budget, max_masks))
        self.scores = torch.zeros(costs.shape[1], costs.shape[0])
        self.paid = torch.zeros(2)  # sizes of the gradients of skipped gates, summed; their number

    def explore(self, i: int, rng: torch.Generator) -> Tensor:
        """The plan that training step i runs with: (N, S) bool, computed or not."""
        noise = self.noise * (1 - i / self.steps) * torch.randn(self.scores.shape, generator=rng)
        return torch.tensor(self.cheapest(self.scores + noise, near=True).compute)

    def learn(self, compute: Tensor, gradient: Tensor, seen: slice = slice(None)) -> None:
        """gradient: (N, S) of the loss with respect to gates at `compute`; 0 for steps not in `seen`."""
        skipped = ~compute[seen]
        self.paid += torch.stack([gradient[seen][skipped].abs().sum(), skipped.sum()])
        if self.paid[0] > 0:
            self.scores -= self.lr * gradient * self.paid[1] / self.paid[0]

    def plan(self) -> CachePlan:
        return self.cheapest(self.scores, near=False)

    def cheapest(self, scores: Tensor, near: bool) -> CachePlan:
        """Reuse at step n of sublayer i costs scores[n, i] more. All are lifted above 0, which changes no comparison between
        plans that remove the same number."""
        apart = ~np.eye(self.costs.shape[1], dtype=bool)
        priced = self.costs + scores.double().numpy().T[:, None, :]
        lowest = priced[:, apart].min()
        lifted = np.where(apart, priced - lowest + 1e-3, 0.0)
        return plan_from_costs(lifted, self.sublayers, self.budget, self.max_masks, near)

    def state(self) -> dict:
        return {"scores": self.scores, "paid": self.paid}

    def restore(self, saved: dict) -> None:
        self.scores, self.paid = saved["scores"], saved["paid"]


def in_units(costs: np.ndarray, plan: CachePlan) -> np.ndarray:
    """costs in units of what the plan pays for one reuse on average; as they are if it pays nothing."""
    compute = np.array(plan.compute).T  # (S, N)
    paid = sum(float(pattern_costs(costs[i: i + 1], compute[i])[0]) for i in range(len(costs)))
    return costs * ((~compute).sum() / paid) if paid > 0 else costs
