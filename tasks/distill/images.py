"""What students learn from: real images, the teacher's own samples, or both; and a batch of them with noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.core.denoiser import Schedule
from tasks.core.training import stratified_timesteps


@dataclass(frozen=True, kw_only=True)
class Images:
    """Real images and teacher samples in one pool: the first `real` are real."""

    pixels: Tensor         # (N, C, H, W) uint8
    labels: Tensor | None  # (N,) int64
    real: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    x: Tensor              # (N, C, H, W) fp32, noised to t
    t: Tensor              # (N,) int64
    labels: Tensor | None  # (N,) int64
    target: Tensor         # (N, C, H, W), what the data says the prediction is

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{key: None if value is None else value.to(device) for key, value in vars(self).items()})

    def split(self, parts: int) -> list["Batch"]:
        """parts: divides N."""
        size = len(self.x) // parts
        return [Batch(**{key: None if value is None else value[i:i + size] for key, value in vars(self).items()})
                for i in range(0, len(self.x), size)]


def check_pool(images: Images, bank_share: float) -> None:
    """Raises ValueError where a share asks for images that there are none of."""
    if bank_share < 1 and images.real == 0:
        raise ValueError(f"distill.bank_share: {bank_share} asks for real images, and there are none")
    if bank_share > 0 and images.real == len(images.pixels):
        raise ValueError(f"distill.bank_share: {bank_share} asks for teacher samples, and there are none (pretrain_load.bank)")


def draw(images: Images, batch: int, bank_share: float, null_label: int, label_dropout: float,
         rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """-> (batch, C, H, W) in [-1, 1], each a teacher sample with probability bank_share, and (batch,) labels or None.

    Labels are dropped as in the teacher's training, so guidance keeps working.
    """
    taught = torch.rand(batch, generator=rng) < bank_share  # rand < 1, so never for 0 and always for 1
    low = torch.where(taught, images.real, 0)
    high = torch.where(taught, len(images.pixels), images.real)
    index = low + (torch.rand(batch, generator=rng, dtype=torch.float64) * (high - low)).long()
    x0 = images.pixels[index].float() / 127.5 - 1
    if images.labels is None:
        return x0, None
    dropped = torch.rand(batch, generator=rng) < label_dropout
    return x0, images.labels[index].masked_fill(dropped, null_label)


def with_noise(schedule: Schedule, x0: Tensor, labels: Tensor | None, rng: torch.Generator) -> Batch:
    """x0: (N, C, H, W) in [-1, 1]; each image gets a timestep of its own."""
    t = stratified_timesteps(len(x0), schedule.steps, rng)
    noise = torch.randn(x0.shape, generator=rng)
    return Batch(x=schedule.add_noise(x0, noise, t), t=t, labels=labels, target=schedule.target(x0, noise, t))
