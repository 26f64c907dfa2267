"""A plan trained along the sampler's own steps, where errors accumulate as when it runs.

From the same noise the teacher takes the solver's steps uncached, the student takes them with a plan live; the loss is the
distance of their images, as in HarmoniCa (arXiv 2410.01723). Its gates are soft and its budget is a weight; ours are hard and
the budget is kept at every step, see `leader.py`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tasks.cache_learn.hooks import rewrite
from tasks.cache_learn.leader import Leader
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import network, trajectory
from tasks.core.training import optimise, step_generator
from tasks.runtime.cache import FORECASTS, extrapolate
from tasks.runtime.solver import SolverStep, advance, clip_bound, solver_steps


class GatedHistory:
    """The last outputs of one sublayer: at gate 1 the fresh one enters, at gate 0 none does."""

    def __init__(self, length: int):
        self.length = length
        self.outputs: list[tuple[float, Tensor]] = []  # last first

    def __call__(self, t: float, fresh: Tensor, gate: Tensor) -> Tensor:
        """-> what the sublayer puts out at t: `fresh` at gate 1, what the live cache returns at gate 0.

        gate: 0-dim, 0 or 1; its gradient comes from this output and from all that later steps reuse of it."""
        if not self.outputs:
            self.outputs = [(t, fresh)]
            return fresh
        output = torch.lerp(extrapolate(t, self.outputs), fresh, gate)
        entering = [(t, fresh), *self.outputs][: self.length]
        times = [time for time, _ in (entering if gate > 0.5 else self.outputs)]
        before = [*self.outputs, self.outputs[-1]]
        self.outputs = [(time, torch.lerp(old, new, gate)) for time, (_, old), (_, new) in
                        zip(times, before, entering, strict=False)]
        return output

    def detach(self) -> None:
        self.outputs = [(t, y.detach()) for t, y in self.outputs]


@contextlib.contextmanager
def gated(model: torch.nn.Module, sublayers: Sequence[str], histories: Sequence[GatedHistory], t: float,
          gates: Tensor) -> Iterator[None]:
    """Every sublayer computes, and puts out what its gate decides. gates: (S,)."""
    with rewrite(model, sublayers, lambda i, fresh: histories[i](t, fresh, gates[i])):
        yield


def root_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Root mean squared difference of each image, mean over images: squared, the few images that turn into another one would
    decide the plan."""
    return (student - teacher).square().mean(dim=(1, 2, 3)).add(1e-12).sqrt().mean()


def gate_gradient(denoiser: Denoiser, sublayers: Sequence[str], compute: Tensor, steps: Sequence[SolverStep], states: Tensor,
                  labels: Tensor | None, window: int, forecast: str) -> tuple[Tensor, float]:
    """-> (N, S) gradient of the loss with respect to gates at `compute`, the loss at the last step.

    compute: (N, S) bool. states: (N + 1, B, C, H, W), the uncached trajectory from noise to image. window: steps that a
    gradient passes back through; the loss is taken at the end of each window, and memory holds one. N or more: of the image
    alone.
    """
    gates = compute.float().requires_grad_()
    histories = [GatedHistory(FORECASTS[forecast]) for _ in sublayers]
    x, x0 = states[0], torch.zeros_like(states[0])
    for i, step in enumerate(steps):
        with gated(denoiser.model, sublayers, histories, step.t, gates[i]):
            prediction = denoiser(x, torch.full((len(x),), step.t, dtype=torch.int64), labels)
        x, x0 = advance(step, x, prediction, x0, clip_bound(denoiser.schedule.config))
        if (i + 1) % window == 0 or i + 1 == len(steps):
            loss = root_distance(x, states[i + 1])
            if loss.requires_grad:
                loss.backward()
            x, x0 = x.detach(), x0.detach()
            for history in histories:
                history.detach()
    return torch.zeros_like(gates) if gates.grad is None else gates.grad, loss.item()


def uncached_states(denoiser: Denoiser, recipe: Recipe, noise: Tensor, labels: Tensor | None) -> Tensor:
    """(N + 1, B, C, H, W): the states before every step, then the image."""
    visited = list(trajectory(network(denoiser), denoiser.schedule, recipe, noise, labels))
    return torch.stack([*[x for _, x, _ in visited], visited[-1][2]]).clone()


def draw_labels(denoiser: Denoiser, batch: int, label_dropout: float, rng: torch.Generator) -> Tensor | None:
    """(batch,) uniform over the classes, some replaced by the null label, as guidance needs them."""
    if not denoiser.num_classes:
        return None
    labels = torch.randint(denoiser.num_classes, (batch,), generator=rng)
    return labels.masked_fill(torch.rand(batch, generator=rng) < label_dropout, denoiser.null_label)


def train_rollout(denoiser: Denoiser, sublayers: Sequence[str], costs: np.ndarray, recipe: Recipe, *, budget: float,
                  max_masks: int, steps: int, batch: int, lr: float, noise: float, window: int, forecast: str,
                  label_dropout: float, seed: int, checkpoint: Checkpoint) -> tuple[CachePlan, list[tuple[int, float]]]:
    """costs: (S, N, N) of reuse, which the training starts from; they, budget, max_masks, lr, noise: see `Leader`. recipe:
    solver and timesteps. window, forecast: see `gate_gradient`. -> plan over the whole list, curve of (step, loss)."""
    solver = solver_steps(denoiser.schedule.config, recipe.timesteps, recipe.solver)
    leader = Leader(costs, sublayers, budget, max_masks, lr, noise, steps)

    def step(i: int) -> float:
        rng = step_generator(seed, i + 1)
        x_T = torch.randn(batch, *denoiser.sample_shape, generator=rng)
        labels = draw_labels(denoiser, batch, label_dropout, rng)
        compute = leader.explore(i, rng)
        states = uncached_states(denoiser, recipe, x_T, labels)
        gradient, loss = gate_gradient(denoiser, sublayers, compute, solver, states, labels, window, forecast)
        leader.learn(compute, gradient)
        return loss

    curve = optimise(step, leader.state, leader.restore, steps, checkpoint, "cache rollout", log_every=10)
    return replace(leader.plan(), forecast=forecast), curve
