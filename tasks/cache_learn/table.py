"""A table that serves every timestep list: what reuse costs the image there, and what sums of kept outputs are best.

Errors of several sublayers and steps are taken to add up, each as large as it grows to on its way to the image. Without that,
plans skip early: an error there is small in the prediction, but it grows, and one near the end does not (benchmarks/cache,
`errors_ungrown`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicSpline

from tasks.cache_learn.least_squares import solved
from tasks.core.artifacts import read_json, write_json
from tasks.core.recipe import CachePlan
from tasks.runtime.cache import sources
from tasks.runtime.solver import SolverStep

LAST = -1  # stands for the timestep of the image itself: an error there is as large as it is


@dataclass(frozen=True, kw_only=True)
class ReuseTable:
    """sublayers: S names. grid: G strictly decreasing timesteps. errors: (S, G, G), see `measure_errors`. growth: (G,), see
    `measure_growth`. products: (S, G, G), see `measure_products`."""

    sublayers: Sequence[str]
    grid: Sequence[int]
    errors: np.ndarray
    growth: np.ndarray
    products: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "ReuseTable":
        """From errors.npy, products.npy and grid.json of the stage."""
        grid = read_json(folder / "grid.json")
        return cls(sublayers=grid["sublayers"], grid=grid["timesteps"], errors=np.load(folder / "errors.npy"),
                   growth=np.array(grid["growth"]), products=np.load(folder / "products.npy"))

    def write(self, folder: Path, **more) -> None:
        """more: what else grid.json says."""
        np.save(folder / "errors.npy", self.errors)
        np.save(folder / "products.npy", self.products)
        write_json(folder / "grid.json", {"timesteps": self.grid, "sublayers": self.sublayers,
                                          "growth": self.growth.tolist(), **more})

    def costs(self, steps: Sequence[SolverStep]) -> np.ndarray:
        """(S, N, N) mean squared error of the image from reusing at step `to` what step `from` computed; inf over gaps that
        were not measured."""
        times = [step.t for step in steps]
        return interpolate_errors(self.errors, self.grid, times) * step_weights(steps, growth_at(self.grid, self.growth, times))

    def forecasting(self, plan: CachePlan, forecast: str, timesteps: Sequence[int]) -> CachePlan:
        """The plan with a forecast: none | taylor | learned."""
        return self.weigh(plan, timesteps) if forecast == "learned" else replace(plan, forecast=forecast)

    def weigh(self, plan: CachePlan, timesteps: Sequence[int]) -> CachePlan:
        """The plan with forecast `learned`, weights by least squares from the products: what `forecast.fit` finds, but for the
        errors that the cached run makes by itself, without evaluating the network."""
        to_list = at_timesteps(self.grid, timesteps)
        found = [weights_of_column(column, to_list @ products @ to_list.T)
                 for column, products in zip(zip(*plan.compute, strict=True), self.products, strict=True)]
        return replace(plan, forecast="learned", weights=tuple(zip(*found, strict=True)))


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


def growth_at(grid: Sequence[int], growth: np.ndarray, timesteps: Sequence[int]) -> np.ndarray:
    """(G,) -> (N + 1,): of an error of the state before each step, and of the image. Its logarithm is interpolated in t."""
    known = [*grid, LAST], np.log([*growth, 1.0])
    return np.exp(np.interp([*timesteps, LAST], known[0][::-1], known[1][::-1]))


def step_weights(steps: Sequence[SolverStep], growth: np.ndarray) -> np.ndarray:
    """(N,) squared derivative of the image with respect to the prediction at each step: through the state after it, and through
    the x0 that later steps take from it. growth: (N + 1,), see `growth_at`."""
    roots = np.sqrt(growth)

    def carried(i: int) -> float:
        return sum(after.b[k] * roots[i + k + 1] for k, after in enumerate(steps[i:]) if 0 < k < len(after.b))

    return np.array([(step.gain * roots[i + 1] + step.q * carried(i)) ** 2 for i, step in enumerate(steps)])


def at_timesteps(grid: Sequence[int], timesteps: Sequence[int]) -> np.ndarray:
    """(N, G) that takes values on the grid to those at timesteps, by a cubic spline; beyond its ends they stay as they are
    there. A product of two interpolated outputs is then that of the table, interpolated on both sides."""
    within = np.clip(timesteps, grid[-1], grid[0])
    return CubicSpline(np.array(grid[::-1], float), np.eye(len(grid))[::-1])(within)


def weights_of_column(compute: Sequence[bool], products: np.ndarray) -> list[tuple[float, ...]]:
    """products: (N, N) of one sublayer's outputs. -> for every step the weights of its sources, () where it is computed."""
    return [solved(products[np.ix_(found, found)], products[list(found), step]) if found else ()
            for step, found in enumerate(sources(compute, "learned"))]
