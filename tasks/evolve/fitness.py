"""What a recipe does to the images: feature distance to the dense teacher's, sample by sample of the same noise and label.

A warm worker holds teacher and students and turns (weights, recipe) into features; the distance is made of two such arrays. One
unit is the distance between the dense teacher at 50 and at 100 steps, a change that nobody would notice.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tasks.core.artifacts import digest
from tasks.core.denoiser import Denoiser, Schedule, load
from tasks.core.memory import keep_freed_memory
from tasks.core.params import check_range
from tasks.core.parcel import Parcel
from tasks.core.quality import features, paired_distance
from tasks.core.recipe import Recipe
from tasks.core.sampler import (
    cached_network,
    dense_and_finer,
    initial_noise,
    labels_for,
    network,
    sample_in_chunks,
    spaced_timesteps,
    trajectory,
)
from tasks.data.features import load_feature_net
from tasks.evolve.conditioning import remembered
from tasks.evolve.prefix import Predictions, shared
from tasks.evolve.weights import TEACHER, Weights
from tasks.runtime.cache import remove_cache
from tasks.runtime.integer import INTEGER, available
from tasks.runtime.precision import SIMULATED, Integers, Kinds, Ranges, apply_precision, calibrate_ranges
from tasks.runtime.rounding import read_integers
from tasks.runtime.solver import Predict, recipe_steps

UNIT_STEPS = 50
TEACHER_INTEGERS = "teacher.safetensors"  # whose rounding was learned; a student's are in a file named as that of its weights
CONDITIONS = 64 << 20  # bytes of what is remembered of timesteps and labels
# (name of the weights, recipe) or (.., .., Heat) -> (images, D) features, float64
Sampler = Callable[[tuple], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything besides weights and recipe that an evaluation depends on."""

    images: int
    seed: int                # of their noise; label i is i mod classes
    chunk: int               # images sampled at once
    calibration_steps: int   # trajectory that activation ranges come from; its noises are beyond the images'
    calibration_images: int
    prefix_mb: int           # MiB of predictions that a worker keeps for candidates that begin alike; it changes no result

    def __post_init__(self):
        for name, low, high in (("images", 1, 100_000), ("chunk", 1, 4096), ("calibration_steps", 1, 1000),
                                ("calibration_images", 1, 100_000), ("prefix_mb", 0, 1_000_000)):
            check_range(f"evolve.protocol.{name}", getattr(self, name), low, high)


def make_sampler(teacher: Parcel, distill: Parcel | None, weights: Mapping[str, Weights], data: Parcel, protocol: Protocol,
                 rounding: Parcel | None = None) -> Sampler:
    """Built once per worker. teacher: its diffusers folder; distill: holds the files of `weights`, None where these are the
    teacher's alone; data: holds the feature net that guides the search; rounding: a folder that `rounded.write_rounding` wrote,
    None if all weights go to the nearest integer."""
    keep_freed_memory()
    opened = open_weights(teacher.open(), distill and distill.open(), weights)
    ranges = WhenAsked(lambda name: ranges_of(opened[name], protocol, base_of(weights[name])))
    learned = rounding and rounding.open()
    integers = {name: read_integers(learned / integers_file(found)) for name, found in weights.items()} if learned else {}
    return Evaluator(opened, ranges, load_feature_net(data.open(), "search"), protocol, integers)


def open_weights(teacher: Path, distill: Path | None, weights: Mapping[str, Weights]) -> dict[str, Denoiser]:
    """What is compressed, by its name. teacher: its diffusers folder; distill: holds safetensors files of the same shapes."""
    dense = load(teacher)
    return {name: with_weights(dense, load_file(distill / found.file)) if found.file else dense
            for name, found in weights.items()}


def integers_file(weights: Weights) -> str:
    return weights.file or TEACHER_INTEGERS


def base_of(weights: Weights) -> Recipe | None:
    """The one that weights of few steps were trained for; they know no other states."""
    return next(iter(weights.own.values())) if weights.tied else None


class WhenAsked(dict):
    """What `make` makes of a key, once it is looked up: a worker may never see some of the weights."""

    def __init__(self, make: Callable):
        super().__init__()
        self.make = make

    def __missing__(self, key):
        self[key] = self.make(key)
        return self[key]


class Evaluator:
    """What a warm worker calls: (weights, recipe) -> features of all images, (weights, recipe, heat) -> of the first few, and
    of the others if these promise enough. An image has the same features in both.
    """

    def __init__(self, weights: dict[str, Denoiser], ranges: dict[str, Ranges], net: nn.Module, protocol: Protocol,
                 integers: Mapping[str, Integers] = MappingProxyType({})):
        """integers: of weights whose rounding was learned."""
        self.weights, self.ranges, self.net, self.protocol, self.integers = weights, ranges, net, protocol, integers
        self.kinds = INTEGER if available() else SIMULATED
        self.predictions = Predictions(protocol.prefix_mb << 20)
        self.parts = {name: denoiser.conditioning() for name, denoiser in weights.items()}
        self.conditions = Predictions(CONDITIONS)

    def __call__(self, item: tuple) -> np.ndarray:
        weights, recipe, *heat = item
        if not heat:
            return self.features(weights, recipe, 0, self.protocol.images)
        few = heat[0].how.images
        found = self.features(weights, recipe, 0, few)
        if not heat[0].promotes(found):
            return found
        return np.concatenate([found, self.features(weights, recipe, few, self.protocol.images - few)])

    def features(self, name: str, recipe: Recipe, first: int, n: int) -> np.ndarray:
        """(n, D) of images first .. first + n - 1; first: a multiple of the chunk."""
        denoiser, protocol = self.weights[name], self.protocol
        steps = recipe_steps(denoiser.schedule.config, recipe)
        head = digest([name, recipe.precision])
        with (live(denoiser, recipe, self.ranges[name], self.kinds, self.integers.get(name, {})) as predict,
              remembered(predict, denoiser.model, self.parts[name], name, recipe.precision, self.conditions) as predict):
            predict = shared(predict, self.predictions, head, steps, recipe.cache, first // protocol.chunk)
            chunks = sample_in_chunks(predict, denoiser.schedule, recipe, denoiser.sample_shape, n, protocol.seed,
                                      denoiser.num_classes, protocol.chunk, first)
            return np.concatenate([features(self.net, images) for images in chunks])


def with_weights(denoiser: Denoiser, state: dict[str, Tensor]) -> Denoiser:
    model = copy.deepcopy(denoiser.model)
    model.load_state_dict(state)
    return Denoiser(model.eval().requires_grad_(False), denoiser.schedule)


def ranges_of(denoiser: Denoiser, protocol: Protocol, base: Recipe | None = None) -> Ranges:
    """Activation ranges along dense trajectories; the package measures them again on the chosen recipe's own."""
    return calibrate_ranges(denoiser.model, calibration_states(denoiser, protocol, base), denoiser.joins())


def calibration_states(denoiser: Denoiser, protocol: Protocol,
                       base: Recipe | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """x, t, labels of every step of the protocol's dense trajectories, all images of a step together; of base's, if it is
    given: of so many images that there are as many states."""
    recipe = base or Recipe(timesteps=spaced_timesteps(denoiser.schedule, protocol.calibration_steps))
    images = -(-protocol.calibration_steps * protocol.calibration_images // recipe.nfe)
    indices = range(protocol.images, protocol.images + images)
    noise, labels = initial_noise(denoiser.sample_shape, indices, protocol.seed), labels_for(indices, denoiser.num_classes)
    states = list(trajectory(network(denoiser), denoiser.schedule, recipe, noise, labels))
    times = [row.t for row in recipe_steps(denoiser.schedule.config, recipe)]
    return ((x, torch.full((len(x),), times[step]), labels) for step, x, _ in states)


@contextlib.contextmanager
def live(denoiser: Denoiser, recipe: Recipe, ranges: Ranges, kinds: Kinds = SIMULATED,
         integers: Integers = MappingProxyType({})) -> Iterator[Predict]:
    """The denoiser with the recipe's precision and cache plan switched on."""
    apply_precision(denoiser.model, recipe.precision, ranges, kinds, integers)
    try:
        yield cached_network(denoiser, recipe)
    finally:
        remove_cache(denoiser.model)


def reference_items(schedule: Schedule) -> list[tuple[str, Recipe]]:
    """The dense teacher at 50 steps, what every candidate is compared to, and at 100; of a shorter schedule at half of its
    timesteps and at all."""
    return [(TEACHER, recipe) for recipe in dense_and_finer(schedule, UNIT_STEPS)]


def distance(found: np.ndarray, references: tuple[np.ndarray, np.ndarray]) -> float:
    """Features of a recipe's images -> distance to those of the dense 50 steps, in units of dense 50 to dense 100."""
    return paired_distance(found, references[0]) / paired_distance(references[1], references[0])
