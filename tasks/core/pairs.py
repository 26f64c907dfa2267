"""The teacher's images and the noises that they are of: what few steps are learned from, without any real image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.core.artifacts import read_json, write_json
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, sample_in_chunks
from tasks.runtime.graph import live_graph

CHUNK = 50  # images that are sampled together


@dataclass(frozen=True)
class Pairs:
    """images: uint8 (N, C, H, W); image i is of noise `first + i` of `seed`. num_classes: 0 without labels."""

    images: np.ndarray
    seed: int
    num_classes: int
    first: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def split(self, held: int) -> tuple["Pairs", "Pairs"]:
        """The first ones, and the last `held`. Raises ValueError where one of both would be empty."""
        if not 0 < held < len(self):
            raise ValueError(f"{len(self)} pairs of noise and image cannot hold out {held}: one is needed on both sides")
        cut = len(self) - held
        return self.part(0, cut), self.part(cut, len(self))

    def part(self, start: int, end: int) -> "Pairs":
        return Pairs(self.images[start:end], self.seed, self.num_classes, self.first + start)

    def take(self, which: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor]:
        """-> noise (n, C, H, W), labels (n,) or None, images (n, C, H, W) in [-1, 1]."""
        places = [int(i) for i in which]
        indices = [self.first + i for i in places]
        images = torch.from_numpy(self.images[places]).float() / 127.5 - 1
        return initial_noise(self.images.shape[1:], indices, self.seed), labels_for(indices, self.num_classes), images

    def write(self, folder: Path) -> None:
        np.save(folder / "pairs.npy", self.images)
        write_json(folder / "pairs.json", {"seed": self.seed, "num_classes": self.num_classes, "first": self.first})

    @classmethod
    def read(cls, folder: Path) -> "Pairs":
        return cls(np.load(folder / "pairs.npy"), **read_json(folder / "pairs.json"))


def sample_kept(teacher: Denoiser, recipe: Recipe, n: int, seed: int, checkpoint: Checkpoint, label: str) -> np.ndarray:
    """uint8 (n, C, H, W), in order; chunks that an interrupted run finished are not sampled again."""
    chunk = min(CHUNK, n)
    done = [c.numpy() for c in (checkpoint.load() or {"chunks": []})["chunks"]]
    first = sum(len(c) for c in done)
    if first < n:
        chunks = sample_in_chunks(live_graph(teacher, recipe, chunk), teacher.schedule, recipe, teacher.sample_shape,
                                  n - first, seed, teacher.num_classes, chunk, first)
        for images in track(chunks, -(-n // chunk), label, done=len(done)):
            done.append(images)
            checkpoint.save_if_due(lambda: {"chunks": [torch.from_numpy(c) for c in done]})
        checkpoint.save({"chunks": [torch.from_numpy(c) for c in done]})
    return np.concatenate(done)
