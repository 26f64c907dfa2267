"""What is measured once per model, on a grid of timesteps, for cache plans on any timestep list (`table.ReuseTable`).

Along the teacher's own trajectories: how wrong the prediction becomes when one sublayer reuses an output, as CEM (arXiv
2512.23258) has it; how an error of the state at each timestep grows on its way to the image; and how alike the outputs of a
sublayer are from step to step, which says what sum of the last ones is nearest to the next.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from tasks.core.denoiser import Denoiser
from tasks.core.hooks import record, replaced
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.sampler import network, trajectory
from tasks.runtime.solver import clip_bound, integrate, solver_steps

TINY = 1e-12       # of distances: none is 0, so that growth has a logarithm
SKETCH = 1 << 15   # elements of each output from which its products with others are estimated


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


def measure_growth(denoiser: Denoiser, grid: Sequence[int], noise: Tensor, labels: Tensor | None, growth: np.ndarray,
                   keep: Callable[[np.ndarray], None] = lambda growth: None) -> np.ndarray:
    """Fill growth[j] = (distance of the images / distance of the states at timestep grid[j])^2 of two runs that part there.

    Both are DDIM's over the grid; the other one's state is off by what the step before makes of the prediction of the step
    before that, unclipped: an error as a cache makes it. Distances are means over images: of squares, a few samples that turn
    into another image would decide. The first two, which nothing can reach, are as the third. growth: (G,), G >= 3, NaN where
    it is to be measured; changed in place, and handed to `keep` after every entry. -> growth.
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
            moved = state + before.gain * (predictions[j - 2] - predictions[j - 1])
            *_, (_, _, image) = integrate(predict, steps[j:], moved, labels, clip)
            growth[j] = (max(distance(image, visited[-1][2]), TINY) / max(distance(moved, state), TINY)) ** 2
            keep(growth)
    growth[:2] = growth[2]
    return growth


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).double().flatten(1).norm(dim=1).mean().item()


@torch.inference_mode()
def measure_products(denoiser: Denoiser, sublayers: Sequence[str], grid: Sequence[int], noise: Tensor,
                     labels: Tensor | None) -> np.ndarray:
    """(S, G, G): mean product of a sublayer's outputs at two timesteps of the grid, over elements and samples, of as many of
    them as SKETCH says, the same at each timestep. Walked by DDIM from `noise`."""
    seen: list[list[Tensor]] = []

    def predict(x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        with record(denoiser.model, sublayers) as outputs:
            prediction = denoiser(x, t, labels)
        seen.append([some_elements(output) for output in outputs])
        return prediction

    for _ in trajectory(predict, denoiser.schedule, Recipe(timesteps=tuple(grid)), noise, labels):
        pass
    outputs = [torch.stack(found).double() for found in zip(*seen, strict=True)]  # (G, SKETCH) each
    return np.stack([(y @ y.T / y.shape[1]).numpy() for y in outputs])


def some_elements(output: Tensor) -> Tensor:
    """(SKETCH,) or all, if there are fewer; the same ones of equal shapes."""
    flat = output.flatten()
    return flat[torch.randint(len(flat), (SKETCH,), generator=torch.Generator().manual_seed(0))] if len(flat) > SKETCH else flat
