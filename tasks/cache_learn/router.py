"""The Learning-to-Cache router (Ma et al., NeurIPS 2024, arXiv 2406.01733): one learned score per sublayer and cache step.

Steps come in pairs: s is computed in full, the next one, m, may reuse. A sublayer's output at m becomes

    beta f(h_m) + (1 - beta) f(h_s)                                  (eq. 6 with alpha = 1)

with beta = sigmoid(logit). The network is frozen; the logits minimise |prediction~(x_m) - prediction(x_m)|^2 + lambda sum beta
(eq. 9). Where the paper's text and its code differ we follow the code: the input is the current h_m (alpha = 1, the text: 0), f
is taken before the gate, and a sublayer is computed where beta > theta (algorithm 2 prints the reverse). Departure: pairs are
visited in shuffled rounds, not drawn independently, so that short trainings visit every pair equally often.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.hooks import record, rewrite
from tasks.core.recipe import CachePlan
from tasks.core.training import draw_batch, optimise, step_generator
from tasks.runtime.solver import SolverStep, advance, clip_bound, solver_steps

CLAMP = 5.0  # logits stay in [-5, 5] (their code), so that no sigmoid saturates beyond recall


def step_pairs(steps: int) -> list[tuple[int, int]]:
    """(full, cache) step indices: (0, 1), (2, 3), ... The last step of an odd number is computed in full."""
    return [(i, i + 1) for i in range(0, steps - 1, 2)]


@contextlib.contextmanager
def interpolated(model: torch.nn.Module, sublayers: Sequence[str], beta: Tensor, kept: Sequence[Tensor]) -> Iterator[None]:
    """Sublayer i puts out beta[i] f(h_m) + (1 - beta[i]) f(h_s). beta: (S,); kept: f(h_s) of every sublayer."""
    with rewrite(model, sublayers, lambda i, fresh: torch.lerp(kept[i], fresh, beta[i])):
        yield


def distance(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    """mean: over all elements (their DiT); sum: over each image's elements, mean over images (their U-ViT)."""
    return mse_loss(student, teacher, reduction=reduction) / (len(student) if reduction == "sum" else 1)


def pair_distance(denoiser: Denoiser, sublayers: Sequence[str], gates: Tensor, s: SolverStep, m: int, x_s: Tensor,
                  labels: Tensor | None, reduction: str) -> Tensor:
    """First term of eq. 9 for one pair. gates: (S,) in [0, 1]; s: the solver's step from s to m; x_s: (N, C, H, W) at timestep
    s.t -> scalar."""
    t_s, t_m = (torch.full((len(x_s),), float(t)) for t in (s.t, m))
    with torch.no_grad():
        with record(denoiser.model, sublayers) as kept:
            prediction = denoiser(x_s, t_s, labels)
        x_m, _ = advance(s, x_s, prediction, (), clip_bound(denoiser.schedule.config))  # DDIM: nothing precedes
        teacher = denoiser(x_m, t_m, labels)
    with interpolated(denoiser.model, sublayers, gates, kept):
        student = denoiser(x_m, t_m, labels)
    return distance(student, teacher, reduction)


def router_loss(denoiser: Denoiser, sublayers: Sequence[str], logits: Tensor, s: SolverStep, m: int, x_s: Tensor,
                labels: Tensor | None, lam: float, reduction: str) -> Tensor:
    """Eq. 9 for one pair. logits: (S,); the rest: see `pair_distance`."""
    beta = torch.sigmoid(logits)
    return pair_distance(denoiser, sublayers, beta, s, m, x_s, labels, reduction) + lam * beta.sum()


def pair_of_round(i: int, pairs: int, seed: int) -> int:
    """The pair that training step i visits: every round of `pairs` steps is a fresh permutation."""
    return int(torch.randperm(pairs, generator=step_generator(seed, -1 - i // pairs))[i % pairs])


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What the training draws from: noised images at the full step of a pair."""

    denoiser: Denoiser
    images: Tensor          # (N, C, H, W) fp32 in [-1, 1]
    labels: Tensor | None   # (N,) int64
    timesteps: Sequence[int]
    batch: int
    label_dropout: float
    seed: int

    @functools.cached_property
    def solver(self) -> list[SolverStep]:
        return solver_steps(self.denoiser.schedule.config, self.timesteps, "ddim")

    def draw(self, i: int) -> tuple[int, SolverStep, int, Tensor, Tensor | None]:
        """Training step i -> its pair, the solver's step from s to m, timestep m, x_s, labels. All forwards see the same
        dropped labels."""
        rng = step_generator(self.seed, i + 1)
        pairs = step_pairs(len(self.timesteps))
        pair = pair_of_round(i, len(pairs), self.seed)
        s, m = pairs[pair]
        x0, y = draw_batch(self.images, self.labels, self.batch, self.denoiser.null_label, self.label_dropout, rng)
        noise, t = torch.randn(x0.shape, generator=rng), torch.full((self.batch,), self.timesteps[s])
        return pair, self.solver[s], self.timesteps[m], self.denoiser.schedule.add_noise(x0, noise, t), y


def train_router(denoiser: Denoiser, sublayers: Sequence[str], images: Tensor, labels: Tensor | None,
                 timesteps: Sequence[int], *, steps: int, batch: int, lr: float, lam: float, reduction: str,
                 label_dropout: float, seed: int, checkpoint: Checkpoint) -> tuple[Tensor, list[tuple[int, float]]]:
    """As published. images: (N, C, H, W) fp32 in [-1, 1]; labels: (N,) int64 or None; the network must be frozen.

    -> beta (pairs, S) in (0, 1), curve of (step, loss).
    """
    drawn = Pairs(denoiser=denoiser, images=images, labels=labels, timesteps=timesteps, batch=batch,
                  label_dropout=label_dropout, seed=seed)
    start = torch.randn(len(timesteps) // 2, len(sublayers), generator=step_generator(seed, 0))
    logits = [torch.nn.Parameter(row.clone()) for row in start]  # one each: AdamW leaves the pairs not visited alone
    optimiser = torch.optim.AdamW(logits, lr=lr, weight_decay=0.0)

    def step(i: int) -> float:
        pair, s, m, x_s, y = drawn.draw(i)
        loss = router_loss(denoiser, sublayers, logits[pair], s, m, x_s, y, lam, reduction)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            logits[pair].clamp_(-CLAMP, CLAMP)
        return loss.item()

    def state() -> dict:
        return {"logits": [row.detach() for row in logits], "optimiser": optimiser.state_dict()}

    def restore(saved: dict) -> None:
        for row, kept in zip(logits, saved["logits"], strict=True):
            row.data.copy_(kept)
        optimiser.load_state_dict(saved["optimiser"])

    curve = optimise(step, state, restore, steps, checkpoint, "cache router")
    return torch.sigmoid(torch.stack([row.detach() for row in logits])), curve


def threshold_plan(beta: Tensor, theta: float, steps: int, sublayers: Sequence[str]) -> CachePlan:
    """As published: computed where beta > theta, and at every full step. Any number of distinct masks."""
    compute = np.ones((steps, len(sublayers)), bool)
    compute[[m for _, m in step_pairs(steps)]] = (beta > theta).numpy()
    return CachePlan(sublayers=tuple(sublayers), compute=tuple(tuple(map(bool, row)) for row in compute))


def router_costs(beta: Tensor, steps: int) -> np.ndarray:
    """beta as the cost of reuse, for `plan_from_costs`: (S, steps, steps), inf but from a full step to its cache step."""
    costs = np.full((beta.shape[1], steps, steps), np.inf)
    for row, (s, m) in zip(beta.double().numpy(), step_pairs(steps), strict=True):
        costs[:, s, m] = row
    costs[:, range(steps), range(steps)] = 0.0
    return costs
