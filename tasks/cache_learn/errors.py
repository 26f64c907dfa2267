"""How wrong the prediction becomes when one sublayer reuses its output: a table that serves every timestep list.

Measured once on a grid of timesteps, along the teacher's own trajectories, as CEM (arXiv 2512.23258) does; errors of several
sublayers and steps are taken to add up. Left out: how an error at one step changes the states of later ones.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from tasks.cache_learn.hooks import record, replaced
from tasks.core.denoiser import Denoiser
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.sampler import trajectory


def empty_errors(sublayers: int, grid: int) -> np.ndarray:
    """E[sublayer, from, to] in fp64: 0 where from == to (nothing is reused), NaN where nothing is measured."""
    errors = np.full((sublayers, grid, grid), np.nan)
    errors[:, range(grid), range(grid)] = 0.0
    return errors


def measure_errors(denoiser: Denoiser, sublayers: Sequence[str], grid: Sequence[int], noise: Tensor, labels: Tensor | None,
                   max_gap: int, errors: np.ndarray, keep: Callable[[np.ndarray], None] = lambda errors: None) -> np.ndarray:
    """Fill E[sublayer, from, to] = mean of (prediction with that one sublayer's output taken from step `from` - prediction)^2.

    grid: strictly decreasing timesteps, walked by DDIM from `noise` (N, C, H, W). Measured where 0 < to - from <= max_gap, in
    grid indices. errors: `empty_errors`, or a table that a killed run had begun (finished columns are not measured again);
    changed in place, and handed to `keep` after every column. Deterministic. -> errors.
    """
    recent: deque[tuple[int, list[Tensor]]] = deque(maxlen=max_gap)

    def predict(x: Tensor, t: Tensor, labels: Tensor | None, to: int) -> Tensor:
        with record(denoiser.model, sublayers) as outputs:
            prediction = denoiser(x, t, labels)
        if np.isnan(errors[:, max(0, to - max_gap): to, to]).any():
            for index, kept in recent:
                for i, name in enumerate(sublayers):
                    with replaced(denoiser.model, name, kept[i]):
                        errors[i, index, to] = mse_loss(denoiser(x, t, labels).double(), prediction.double()).item()
            keep(errors)
        recent.append((to, list(outputs)))
        return prediction

    with torch.inference_mode():
        steps = trajectory(predict, denoiser.schedule, Recipe(timesteps=tuple(grid)), noise, labels)
        for _ in track(steps, len(grid), "reuse errors"):
            pass
    return errors


def interpolate_errors(errors: np.ndarray, grid: Sequence[int], timesteps: Sequence[int]) -> np.ndarray:
    """(S, G, G) on the grid -> (S, N, N) between the steps of any timestep list; inf where the gap was never measured.

    Interpolates sqrt(E), which is close to linear in the gap, bilinearly over (to, gap) in units of grid indices; gap 0 has no
    error. A step outside the grid takes the row of its nearest end.
    """
    roots = roots_by_gap(errors)
    position = grid_position(grid, timesteps)
    gap = position[None, :] - position[:, None]  # [from, to]
    to = np.broadcast_to(position, gap.shape)
    measured = (gap >= 0) & (gap <= roots.shape[2] - 1 + 1e-9)
    values = np.where(measured, bilinear(roots, to, gap), np.inf) ** 2
    values[:, range(len(position)), range(len(position))] = 0.0
    return values


def roots_by_gap(errors: np.ndarray) -> np.ndarray:
    """E[sublayer, from, to] -> sqrt(E)[sublayer, to, gap], gap from 0 to the largest measured one.

    Where the trajectory has no step that far back, the first `to` that has one stands in."""
    count = errors.shape[1]
    gaps = [g for g in range(count) if not np.isnan(np.diagonal(errors, g, 1, 2)).any()]
    columns = [np.sqrt(np.diagonal(errors, g, 1, 2)) for g in gaps]  # (S, count - g), first entry is to = g
    padded = [np.concatenate([np.repeat(c[:, :1], g, axis=1), c], axis=1) for g, c in zip(gaps, columns, strict=True)]
    return np.stack(padded, axis=2)


def grid_position(grid: Sequence[int], timesteps: Sequence[int]) -> np.ndarray:
    """Fractional index of every timestep in a decreasing grid, continued linearly beyond both ends."""
    grid, t = np.asarray(grid, float), np.asarray(timesteps, float)
    i = np.clip(np.searchsorted(-grid, -t, side="right") - 1, 0, len(grid) - 2)
    return i + (grid[i] - t) / (grid[i] - grid[i + 1])


def bilinear(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """table (S, R, C) at fractional rows and columns, clamped to the table -> (S, *rows.shape)."""
    def split(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        x = np.clip(x, 0, size - 1)
        low = np.minimum(x.astype(int), max(size - 2, 0))
        return low, x - low

    (r, wr), (c, wc) = split(rows, table.shape[1]), split(columns, table.shape[2])
    r1, c1 = np.minimum(r + 1, table.shape[1] - 1), np.minimum(c + 1, table.shape[2] - 1)
    return ((1 - wr) * ((1 - wc) * table[:, r, c] + wc * table[:, r, c1])
            + wr * ((1 - wc) * table[:, r1, c] + wc * table[:, r1, c1]))
