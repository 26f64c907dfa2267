"""What it costs the image when one sublayer reuses its output: a table that serves every timestep list.

Measured once on a grid of timesteps, along the teacher's own trajectories: how wrong the prediction becomes, as CEM (arXiv
2512.23258) has it, and how an error of the state at each timestep grows on its way to the image. Without the second, plans skip
early: an error there is small in the prediction, but it grows, and one near the end does not (benchmarks/cache,
`errors_ungrown`). Errors of several sublayers and steps are taken to add up.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from tasks.core.artifacts import read_json, write_json
from tasks.core.denoiser import Denoiser
from tasks.core.hooks import record, replaced
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.sampler import network, trajectory
from tasks.runtime.solver import clip_bound, integrate, solver_steps

TINY = 1e-12  # of distances: none is 0, so that growth has a logarithm
LAST = -1  # stands for the timestep of the image itself: an error there is as large as it is


@dataclass(frozen=True, kw_only=True)
class ReuseTable:
    """sublayers: S names. grid: G strictly decreasing timesteps. errors: (S, G, G), see `measure_errors`. growth: (G,), see
    `measure_growth`."""

    sublayers: Sequence[str]
    grid: Sequence[int]
    errors: np.ndarray
    growth: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "ReuseTable":
        """From errors.npy and grid.json of the stage."""
        grid = read_json(folder / "grid.json")
        return cls(sublayers=grid["sublayers"], grid=grid["timesteps"], errors=np.load(folder / "errors.npy"),
                   growth=np.array(grid["growth"]))

    def write(self, folder: Path, **more) -> None:
        """more: what else grid.json says."""
        np.save(folder / "errors.npy", self.errors)
        write_json(folder / "grid.json", {"timesteps": self.grid, "sublayers": self.sublayers,
                                          "growth": self.growth.tolist(), **more})

    def costs(self, scheduler_config: Mapping, timesteps: Sequence[int], solver: str) -> np.ndarray:
        """(S, N, N) mean squared error of the image from reusing at step `to` what step `from` computed; inf over gaps that
        were not measured."""
        weights = step_weights(scheduler_config, timesteps, solver, growth_at(self.grid, self.growth, timesteps))
        return interpolate_errors(self.errors, self.grid, timesteps) * weights


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


def measure_growth(denoiser: Denoiser, grid: Sequence[int], noise: Tensor, labels: Tensor | None, growth: np.ndarray,
                   keep: Callable[[np.ndarray], None] = lambda growth: None) -> np.ndarray:
    """Fill growth[j] = (distance of the images / distance of the states at timestep grid[j])^2 of two runs that part there.

    Both are DDIM's over the grid; the other one's state is off by what the step before makes of the prediction of the step
    before that, unclipped: an error as a cache makes it. (With x0 clipped in that step, too, as it is where a cache runs, late
    errors grow less; plans from that table were farther on one teacher and the same on the other.) Distances are means over
    images: of squares, a few samples that turn into another image would decide. The first two, which nothing can reach, are as
    the third. growth: (G,), G >= 3, NaN where it is to be measured; changed in place, and handed to `keep` after every entry.
    -> growth.
    """
    steps, clip = solver_steps(denoiser.schedule.config, tuple(grid), "ddim"), clip_bound(denoiser.schedule.config)
    predict, predictions = network(denoiser), []

    def recorded(x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        predictions.append(predict(x, t, labels, step))
        return predictions[-1]

    due = [j for j in range(2, len(grid)) if np.isnan(growth[j])]
    with torch.inference_mode():
        visited = list(integrate(recorded, steps, noise, labels, clip)) if due else []
        for j in track(due, len(due), "growth of errors"):
            state, before = visited[j][1], steps[j - 1]
            moved = state + before.b * before.q * (predictions[j - 2] - predictions[j - 1])
            *_, (_, _, image) = integrate(predict, steps[j:], moved, labels, clip)
            growth[j] = (max(distance(image, visited[-1][2]), TINY) / max(distance(moved, state), TINY)) ** 2
            keep(growth)
    growth[:2] = growth[2]
    return growth


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).double().flatten(1).norm(dim=1).mean().item()


def growth_at(grid: Sequence[int], growth: np.ndarray, timesteps: Sequence[int]) -> np.ndarray:
    """(G,) -> (N + 1,): of an error of the state before each step, and of the image. Its logarithm is interpolated in t."""
    known = [*grid, LAST], np.log([*growth, 1.0])
    return np.exp(np.interp([*timesteps, LAST], known[0][::-1], known[1][::-1]))


def step_weights(scheduler_config: Mapping, timesteps: Sequence[int], solver: str, growth: np.ndarray) -> np.ndarray:
    """(N,) squared derivative of the image with respect to the prediction at each step: through the state after it, and for
    dpm2m also through the x0 that the step after it takes from it. growth: (N + 1,), see `growth_at`."""
    steps, roots = solver_steps(dict(scheduler_config), tuple(timesteps), solver), np.sqrt([*growth, 1.0])
    carried = [*(step.c for step in steps[1:]), 0.0]
    return np.array([(step.q * (step.b * roots[i + 1] + carried[i] * roots[i + 2])) ** 2 for i, step in enumerate(steps)])
