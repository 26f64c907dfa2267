"""Samples of packages, spread over workers, kept through a kill: sample i of a job is the same image wherever it is made."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tasks.core.checkpoint import Checkpoint
from tasks.core.cluster import Cluster
from tasks.core.denoiser import Schedule
from tasks.core.parcel import Parcel
from tasks.core.recipe import Recipe
from tasks.core.sampler import sample_in_chunks
from tasks.core.serial import Failed
from tasks.runtime.solver import Predict

KEPT_OPEN = 3  # the race of the dull front turns to compressed and to two precisions again and again


@dataclass(frozen=True, kw_only=True)
class Job:
    """Samples first .. first + n - 1 of a package under a recipe that need not be the package's own."""

    name: str
    package: str
    recipe: Recipe
    n: int
    seed: int
    first: int = 0

    def blocks(self, size: int, done: int = 0) -> list["Job"]:
        """The job in pieces of `size` samples, without those done already."""
        starts = range(self.first + done, self.first + self.n, size)
        return [replace(self, first=start, n=min(size, self.first + self.n - start)) for start in starts]


def open_package(folder: Path, batch: int) -> Predict:
    """The package through the backend that it ships for."""
    from tasks.runtime.graph import open_graph
    return open_graph(folder / "openvino", batch, torch.get_num_threads())


class Sampler:
    """Block -> uint8 (n, C, H, W). Keeps the last KEPT_OPEN packages open: compiling graphs takes as long as a block.

    shape: (C, H, W); batch: the padded batch that every network evaluation has; num_classes: 0 if unconditional.
    """

    def __init__(self, packages: Parcel, schedule: Schedule, shape: tuple[int, ...], num_classes: int, batch: int,
                 open_package: Callable[[Path, int], Predict] = open_package):
        self.packages, self.schedule, self.shape = packages.open(), schedule, shape
        self.num_classes, self.batch = num_classes, batch
        self.opened = functools.lru_cache(KEPT_OPEN)(lambda package: open_package(self.packages / package, batch))

    def __call__(self, block: Job) -> np.ndarray:
        predict = self.opened(block.package)
        predict = predict if block.recipe.cache else without_steps(predict)
        return np.concatenate(list(sample_in_chunks(predict, self.schedule, block.recipe, self.shape, block.n, block.seed,
                                                    self.num_classes, self.batch, block.first)))


def without_steps(predict: Predict) -> Predict:
    """Without a cache every step runs the same graph, and a recipe may have more steps than a package's own plan."""
    return predict if not getattr(predict, "has_plan", True) else lambda x, t, labels, step: predict(x, t, labels, 0)


def sample_jobs(jobs: Sequence[Job], make: Callable[[], Sampler], cluster: Cluster, batch: int,
                checkpoint: Callable[[str], Checkpoint], label: str) -> dict[str, np.ndarray]:
    """All samples by job name, uint8 (n, C, H, W); each job goes on where an interrupted run left it.

    Raises RuntimeError when a block failed on every worker that tried it.
    """
    checkpoints = {job.name: checkpoint(f"samples-{job.name}") for job in jobs}
    images = {name: restored(c) for name, c in checkpoints.items()}
    blocks = [block for job in jobs for block in job.blocks(batch, done=sum(map(len, images[job.name])))]
    for block, result in zip(blocks, cluster.map(make, blocks, label), strict=True):
        if isinstance(result, Failed):
            raise RuntimeError(f"{label}: {block.name}, samples from {block.first}: {result.reason}")
        images[block.name].append(result)
        checkpoints[block.name].save_if_due(lambda: state(images[block.name]))  # noqa: B023
    return {job.name: np.concatenate(images[job.name]) for job in jobs}


def state(images: list[np.ndarray]) -> dict:
    return {"images": torch.from_numpy(np.concatenate(images))}


def restored(checkpoint: Checkpoint) -> list[np.ndarray]:
    saved = checkpoint.load()
    return [saved["images"].numpy()] if saved else []
