"""A solver whose numbers are learned: the times, what is told to the network, and corrections of the coefficients.

The parametrisation of GAS (arXiv 2510.17699, section 3.1): times by stick-breaking; coefficients are those of a classical
solver at these times plus corrections that start at zero, over x and every x0 so far; a shift of the time that the network
is told. Two differences: the past x of their form are left out, for each is a sum of the first x and of past x0; and there may
be an opening, an analytic first step, whose images are learned as well (`runtime.solver.Opening`).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from tasks.core.calibration import chunk_of
from tasks.core.denoiser import Denoiser
from tasks.core.sampler import initial_noise, labels_for, strictly_decreasing
from tasks.core.schedule import Schedule
from tasks.runtime.solver import NO_SIGNAL, Opening, SolverStep, alphas_cumprod, clip_bound, data_prediction, limited

SHIFT = 50.0      # timesteps that one unit of the learned shift is: all numbers then move at rates of one size
SPREAD = 0.05     # of an opening's x0 over the noise, as a share of its variance over labels and pixels: above, there is none
LEAST_GAP = 0.5   # timesteps between two times that coefficients are calculated at, at the start
APART = 1e-3      # timesteps between two times that the network is told, at the least


class LearnedSolver(nn.Module):
    """Numbers that rows are made of, differentiably: those of `start` as it is given, and how they change from there.

    start: the rows of any solver, classical or learned, with or without an opening. In fp64: the numbers are few, and small
    differences of large ones.
    """

    def __init__(self, schedule: Schedule, start: Sequence[SolverStep]):
        super().__init__()
        bars = schedule_bars(schedule)
        self.register_buffer("lam", 0.5 * (bars / (1 - bars)).log(), persistent=False)
        self.kind, self.last = schedule.prediction_type, schedule.steps - 1
        self.start, self.n, self.opened = tuple(start), len(start), start[0].opening is not None
        gaps = [max(LEAST_GAP, now - then) for now, then in pairwise([row.t for row in start] + [0.0])]
        self.register_buffer("gaps", torch.tensor(gaps, dtype=torch.float64).log(), persistent=False)
        self.stick, self.shift, self.a = (nn.Parameter(torch.zeros(self.n, dtype=torch.float64)) for _ in range(3))
        self.first = nn.Parameter(torch.zeros(3, dtype=torch.float64))  # the first time; the opening's a and b
        self.b = nn.Parameter(torch.zeros(self.n, self.n + self.opened, dtype=torch.float64))
        self.images = nn.Parameter(start[0].opening.images.clone()) if self.opened else None
        with torch.no_grad():
            told = torch.tensor([row.t for row in start], dtype=torch.float64)
            self.register_buffer("ahead", told - self.times(), persistent=False)
            self.register_buffer("offset", self.given() - self.theory(self.times()), persistent=False)

    def numbers(self) -> list[nn.Parameter]:
        """All parameters but the images."""
        return [self.stick, self.shift, self.first, self.a, self.b]

    def given(self) -> Tensor:
        """The start's numbers, (n + 1, 3 + n + opened): of the opening a and b; then of each row p, q, a and b."""
        table = torch.zeros(self.n + 1, 3 + self.b.shape[1], dtype=torch.float64)
        if self.opened:
            table[0, :2] = torch.tensor([self.start[0].opening.a, self.start[0].opening.b])
        for numbers, row in zip(table[1:], self.start, strict=True):
            numbers[:3 + len(row.b)] = torch.tensor([row.p, row.q, row.a, *row.b], dtype=torch.float64)
        return table

    def times(self) -> Tensor:
        """(n,) falling, from T - 1 at the most. At the start they are those of the given rows, but for LEAST_GAP."""
        first = self.start[0].t
        highest = first * torch.exp(self.first[0]).clamp(max=self.last / max(1.0, first))
        shares = (self.gaps + self.stick).softmax(0)
        return highest * (1 - torch.cat([shares.new_zeros(1), shares.cumsum(0)[:-1]]))

    def theory(self, t: Tensor) -> Tensor:
        """What DPM-Solver++(2M) has at any times, as `given` has it of the start: how the numbers follow when times move."""
        below = t.detach().floor().clamp(0, self.last - 1).long()
        lam = torch.lerp(self.lam[below], self.lam[below + 1], t - below)  # half log-SNR, linear between timesteps
        alpha, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
        zero = t.new_zeros(())
        rows = [[sigma[0], alpha[0]] if self.opened else []]
        for i in range(self.n):
            p, q = data_prediction(alpha[i], sigma[i], self.kind)
            if i + 1 == self.n:
                rows.append([zero + p, zero + q, zero, zero + 1])  # it ends at x0
                continue
            a = sigma[i + 1] / sigma[i]
            b, before = alpha[i + 1] - alpha[i] * a, lam[i - 1] if i else self.lam[-1]
            ratio = 0.5 * (lam[i + 1] - lam[i]) / (lam[i] - before) if i or self.opened else None
            rows.append([zero + p, zero + q, a, *([b] if ratio is None else [b * (1 + ratio), -b * ratio])])
        width = 3 + self.b.shape[1]
        return torch.stack([torch.stack([*row, *[zero] * (width - len(row))]) for row in rows])

    def table(self) -> tuple[Tensor, Tensor]:
        """Times that the network is told, (n,), and all numbers as `given` has them."""
        t = self.times()
        known = torch.ones_like(self.b).tril(int(self.opened))
        learned = torch.cat([self.a.new_zeros(self.n, 2), self.a[:, None], self.b * known], 1)
        opening = torch.cat([self.first[1:], self.a.new_zeros(learned.shape[1] - 2)])[None]
        told = falling((t + self.ahead + SHIFT * self.shift).clamp(0, self.last))
        return told, self.offset + self.theory(t) + torch.cat([opening, learned])

    @torch.no_grad()
    def rows(self) -> tuple[SolverStep, ...]:
        """As a recipe carries them."""
        told, table = (values.tolist() for values in self.table())
        rows = [SolverStep(t=t, p=p, q=q, a=a, b=tuple(b[:1 + i + self.opened]))
                for i, (t, (p, q, a, *b)) in enumerate(zip(told, table[1:], strict=True))]
        if self.opened:
            rows[0] = replace(rows[0], opening=Opening.of(*table[0][:2], self.images))
        return tuple(rows)


def falling(times: Tensor) -> Tensor:
    """(n,) Push times that do not fall by APART apart, as little as possible, staying at or above 0: those of a recipe's rows
    fall strictly."""
    spread = APART * torch.arange(len(times), dtype=times.dtype, device=times.device)
    return (times + spread).cummin(0).values.clamp(min=spread[-1]) - spread


def timesteps_of(rows: Sequence[SolverStep]) -> tuple[int, ...]:
    """The whole timesteps nearest to the rows' times, strictly decreasing."""
    return strictly_decreasing([round(row.t) for row in rows])


def schedule_bars(schedule: Schedule) -> Tensor:
    """alphas_cumprod, (T,) fp64, as `solver_steps` calculates with it: 0 at the end has no log-SNR."""
    bars = alphas_cumprod(schedule.config).clone()
    if bars[-1] == 0:
        bars[-1] = min(NO_SIGNAL, bars[-2].item() / 2)
    return bars


# ---- the opening ----

@torch.inference_mode()
def opening_images(denoiser: Denoiser, noises: int, seed: int) -> tuple[Tensor, float]:
    """What the network makes of pure noise, for each label: the mean over `noises`, (labels, C, H, W), and how much it depends
    on the noise, as a share of its variance. One row for a model without labels. Evaluated in chunks of bounded memory."""
    rows, shape, last = max(1, denoiser.num_classes), denoiser.sample_shape, denoiser.schedule.steps - 1
    bar, clip = schedule_bars(denoiser.schedule)[-1].item(), clip_bound(denoiser.schedule.config)
    p, q = data_prediction(bar**0.5, (1 - bar) ** 0.5, denoiser.schedule.prediction_type)
    device, chunk = next(denoiser.model.parameters()).device, chunk_of(shape)
    total, squares = torch.zeros(rows, *shape, dtype=torch.float64, device=device), 0.0
    for first in range(0, rows * noises, chunk):
        indices = range(first, min(first + chunk, rows * noises))
        noise, labels = initial_noise(shape, indices, seed).to(device), labels_for(indices, rows).to(device)
        t = torch.full((len(noise),), float(last), device=device)
        prediction = denoiser(noise, t, labels if denoiser.num_classes else None)
        x0 = limited(p * noise + q * prediction, clip).double()
        total.index_add_(0, labels, x0)
        squares += x0.square().sum().item()
    mean = total / noises
    variance = squares / (rows * noises * prod(shape)) - mean.square().mean()
    return mean.float().cpu(), (variance.clamp(min=0) / mean.var().clamp(min=1e-12)).item()


def opened(schedule: Schedule, rows: Sequence[SolverStep], images: Tensor) -> list[SolverStep]:
    """`rows` without the first one, which starts at pure noise and whose x0 are `images`: an opening stands in for it."""
    below = schedule_bars(schedule)[round(rows[1].t)].item()
    return [replace(rows[1], opening=Opening.of((1 - below) ** 0.5, below**0.5, images)), *rows[2:]]
