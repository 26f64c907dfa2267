"""What a skipped sublayer makes of its last outputs, learned for one plan on one timestep list: forecast `learned`.

A weight for each of the last outputs, at every step and sublayer that the plan skips, as in L2P (arXiv 2604.26365). `fit` has
them in one run: step by step the least squares towards the outputs of the uncached run, from the outputs that the cached run
really has, so later weights make up for what earlier ones left. `train` then follows the gradient of the images' distance
through all steps of the sampler (as HarmoniCa, arXiv 2410.01723, does for gates): errors that cancel on the way to the image
cost nothing.
"""

import contextlib
import copy
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from tasks.cache_learn.least_squares import solved
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.hooks import record
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import cached_network, network, sample, stepping, trajectory
from tasks.core.training import optimise
from tasks.runtime.cache import FORECASTS, CacheHandle, apply_cache, remove_cache, sources
from tasks.runtime.solver import advance, clip_bound, recipe_steps, remembered

HISTORY = FORECASTS["learned"]
KEEP = 4 << 30  # bytes of the uncached run's outputs that are kept; beyond that only the last step's are


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The uncached run of some noises, which a plan's run is compared with and learns from."""

    denoiser: Denoiser
    uncached: Denoiser       # the same weights in modules of its own: a cache may be live on the other
    recipe: Recipe
    sublayers: Sequence[str]
    states: Tensor           # (N + 1, B, C, H, W): before every step, then the images
    labels: Tensor | None    # (B,)
    kept: dict[int, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, denoiser: Denoiser, recipe: Recipe, sublayers: Sequence[str], noise: Tensor,
           labels: Tensor | None) -> "Reference":
        visited = list(trajectory(network(denoiser), denoiser.schedule, recipe, noise, labels))
        states = torch.stack([*[x for _, x, _ in visited], visited[-1][2]])
        return cls(denoiser=denoiser, uncached=twin(denoiser), recipe=recipe, sublayers=sublayers, states=states, labels=labels)

    def recording(self, sublayers: Sequence[str]) -> "Reference":
        """The same run, for plans of these sublayers."""
        return replace(self, sublayers=sublayers, kept={})

    @property
    def images(self) -> Tensor:
        return self.states[-1]

    @functools.cached_property
    def times(self) -> list[float]:
        """That the network is told, by step."""
        return [row.t for row in recipe_steps(self.denoiser.schedule.config, self.recipe)]

    @torch.inference_mode()
    def outputs(self, step: int) -> list[Tensor]:
        """Of every sublayer at this step."""
        if step in self.kept:
            return self.kept[step]
        x = self.states[step]
        with record(self.uncached.model, self.sublayers) as found:
            self.uncached(x, torch.full((len(x),), self.times[step]), self.labels)
        if self.kept and sum(y.nbytes for y in found) * (len(self.kept) + 1) > KEEP:
            self.kept.popitem()  # of the step before: every sublayer that this one skips will ask for its own
        self.kept[step] = list(found)
        return self.kept[step]

    def distance(self, images: Tensor) -> float:
        """Mean Euclidean distance of an image to the uncached one, pixels in [-1, 1]. Not its square: a few samples that turn
        into another image would decide."""
        return float((images - self.images).flatten(1).norm(dim=1).mean())


def twin(denoiser: Denoiser) -> Denoiser:
    """Other modules, the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*denoiser.model.parameters(), *denoiser.model.buffers())}
    other = copy.copy(denoiser)
    other.model = copy.deepcopy(denoiser.model, shared)
    return other


def fit(plan: CachePlan, reference: Reference) -> tuple[CachePlan, Tensor]:
    """-> the plan with forecast `learned`, (B, C, H, W) images of its run."""
    table = [[() for _ in plan.sublayers] for _ in plan.compute]
    assert tuple(plan.sublayers) == tuple(reference.sublayers)
    place = {name: i for i, name in enumerate(plan.sublayers)}

    def solve(name: str, step: int, outputs: Sequence[Tensor]) -> tuple[float, ...]:
        weights = least_squares(outputs, reference.outputs(step)[place[name]])
        table[step][place[name]] = weights
        return weights

    with weighed(reference.denoiser, plan, solve) as handle:
        images = sample(stepping(reference.denoiser, handle), reference.denoiser.schedule, reference.recipe,
                        reference.states[0], reference.labels)
    return replace(plan, forecast="learned", weights=tuple(map(tuple, table))), images


def least_squares(outputs: Sequence[Tensor], wanted: Tensor) -> tuple[float, ...]:
    """Weights w of least |sum w_j outputs_j - wanted|^2."""
    y = torch.stack([output.flatten() for output in outputs]).double()
    return solved((y @ y.T).numpy(), (y @ wanted.flatten().double()).numpy())


def train(plan: CachePlan, reference: Reference, *, steps: int, batch: int, lr: float, window: int,
          checkpoint: Checkpoint) -> tuple[CachePlan, list[tuple[int, float]]]:
    """Adam on the plan's weights, its rate falling to 0. plan: as `fit` returns it. batch: of the reference's noises, in turns.
    window: steps that a gradient passes back through; the loss is taken at the end of each, memory holds one.

    -> the plan with trained weights, or as it came if that is nearer to all of the reference; curve of (step, loss).
    """
    weights = torch.nn.Parameter(padded(plan))
    optimiser = torch.optim.Adam([weights], lr=lr)
    batch = min(batch, reference.states.shape[1])

    def step(i: int) -> float:
        for group in optimiser.param_groups:
            group["lr"] = lr * (1 - i / steps)
        chosen = (torch.arange(batch) + i * batch) % reference.states.shape[1]
        loss = backward(plan, reference, weights, chosen, window)
        optimiser.step()
        optimiser.zero_grad()
        return loss

    def state() -> dict:
        return {"weights": weights.detach(), "optimiser": optimiser.state_dict()}

    def restore(saved: dict) -> None:
        weights.data.copy_(saved["weights"])
        optimiser.load_state_dict(saved["optimiser"])

    curve = optimise(step, state, restore, steps, checkpoint, "cache forecast", log_every=10)
    trained = replace(plan, weights=cut_to(plan, weights.detach()))
    return min(plan, trained, key=lambda one: reference.distance(run_plan(one, reference))), curve


def run_plan(plan: CachePlan, reference: Reference) -> Tensor:
    """-> (B, C, H, W) images of the plan from the reference's noises."""
    return sample_plan(reference.denoiser, replace(reference.recipe, cache=plan), reference.states[0], reference.labels)


def sample_plan(denoiser: Denoiser, recipe: Recipe, noise: Tensor, labels: Tensor | None) -> Tensor:
    """-> (B, C, H, W) images with the recipe's cache live; the model is left as it was."""
    try:
        return sample(cached_network(denoiser, recipe), denoiser.schedule, recipe, noise, labels)
    finally:
        remove_cache(denoiser.model)


@contextlib.contextmanager
def weighed(denoiser: Denoiser, plan: CachePlan,
            weigh: Callable[[str, int, Sequence[Tensor]], Sequence]) -> Iterator[CacheHandle]:
    """The plan live, weigh(sublayer, step, its last outputs) being asked for the weights of each skipped output."""
    handle = apply_cache(denoiser.model, plan.sublayers, plan.compute, "learned", weights=cut_to(plan, padded(plan)))
    for name, unit in handle.units.items():
        unit.weigh = partial(weigh, name)  # instead of looking them up
    try:
        yield handle
    finally:
        remove_cache(denoiser.model)


def padded(plan: CachePlan) -> Tensor:
    """(N, S, HISTORY) the plan's weights, 0 where there is no output; all 0 for a plan that has none."""
    table = torch.zeros(len(plan.compute), len(plan.sublayers), HISTORY)
    for step, row in enumerate(plan.weights or ()):
        for i, weights in enumerate(row):
            table[step, i, : len(weights)] = torch.tensor(weights)
    return table


def cut_to(plan: CachePlan, table: Tensor) -> tuple:
    """(N, S, HISTORY) -> weights as a CachePlan has them, one for each output."""
    columns = [sources(column, "learned") for column in zip(*plan.compute, strict=True)]
    return tuple(tuple(tuple(round(float(w), 6) for w in row[i, : len(column[step])]) for i, column in enumerate(columns))
                 for step, row in enumerate(table))


def backward(plan: CachePlan, reference: Reference, weights: Tensor, chosen: Tensor, window: int) -> float:
    """Gradients of the distance of states at the ends of windows, towards `weights` (N, S, HISTORY). -> loss at the image."""
    denoiser, recipe = reference.denoiser, reference.recipe
    place = {name: i for i, name in enumerate(plan.sublayers)}
    steps = recipe_steps(denoiser.schedule.config, recipe)
    labels = None if reference.labels is None else reference.labels[chosen]
    x = reference.states[0, chosen].clone()
    earlier = remembered(steps, x, labels)
    with weighed(denoiser, plan, lambda name, step, outputs: weights[step, place[name], : len(outputs)]) as handle:
        predict = stepping(denoiser, handle)
        for i, solver in enumerate(steps):
            prediction = predict(x, torch.full((len(x),), solver.t), labels, i)
            x, x0 = advance(solver, x, prediction, earlier, clip_bound(denoiser.schedule.config))
            earlier.appendleft(x0)
            if (i + 1) % window == 0 or i + 1 == len(steps):
                loss = root_distance(x, reference.states[i + 1, chosen])
                if loss.requires_grad:
                    loss.backward()
                x, earlier = x.detach(), deque((x0.detach() for x0 in earlier), earlier.maxlen)
                detach(handle)
    return loss.item()


def detach(handle: CacheHandle) -> None:
    for unit in handle.units.values():
        unit.kept = {source: (kind, y.detach()) for source, (kind, y) in unit.kept.items()}


def root_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Root mean squared difference of each image, mean over images."""
    return (found - wanted).square().mean(dim=(1, 2, 3)).add(1e-12).sqrt().mean()
