"""What a student is told: the data's target, the teacher's prediction, and the outputs of the teacher's sublayers."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import mse_loss

from tasks.core.denoiser import Denoiser
from tasks.core.training import mixed_precision
from tasks.distill.images import Batch

SILENT = 1e-8  # mean square of a sublayer's output below which it is not told from zero


@contextlib.contextmanager
def sublayer_outputs(denoiser: Denoiser, record: bool = True) -> Iterator[list[Tensor]]:
    """While open, an evaluation appends the outputs of its sublayers in the order of computation; record=False: nothing."""
    outputs: list[Tensor] = []

    def keep(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    names = [sublayer.name for sublayer in denoiser.sublayers()] if record else []
    handles = [denoiser.model.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class RelativeError(torch.autograd.Function):
    """Mean over images of |mine - theirs|^2 / |theirs|^2. mine, theirs: (N, ...) of one dtype. -> () fp32

    By hand because a taught step is bound by memory: one pass forward and one backward in the outputs' own precision, where
    autograd makes four of each, the sums in fp32.
    """

    @staticmethod
    def forward(ctx, mine: Tensor, theirs: Tensor) -> Tensor:
        difference = (mine - theirs).flatten(1)
        distance = vector_norm(difference, dim=1, dtype=torch.float32).square()
        loudness = vector_norm(theirs.flatten(1), dim=1, dtype=torch.float32).square().clamp_min(SILENT * theirs[0].numel())
        ctx.save_for_backward(difference, loudness)
        ctx.shape = mine.shape
        return (distance / loudness).mean()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        difference, loudness = ctx.saved_tensors
        scale = (2 / len(loudness)) * gradient / loudness
        return (difference * scale.to(difference.dtype)[:, None]).view(ctx.shape), None


def feature_error(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over sublayers and images of |mine - theirs|^2 / |theirs|^2: no sublayer rules by being loud. -> ()

    Normalised image by image, so that a batch computed in parts has the loss of the whole.
    """
    return torch.stack([RelativeError.apply(*pair) for pair in zip(mine, theirs, strict=True)]).mean()


@torch.no_grad()
def teach(teacher: Denoiser, batch: Batch, record: bool, bf16: bool) -> tuple[Tensor, list[Tensor]]:
    """The teacher's prediction (N, C, H, W) and, on record, its sublayers' outputs.

    Plain autocast: without a backward pass attention in bf16 is the fastest there is.
    """
    with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=bf16), sublayer_outputs(teacher, record) as outputs:
        return teacher(batch.x, batch.t, batch.labels).float(), outputs


def transfer_loss(student: Denoiser, teacher: Denoiser, batch: Batch, data: float, lam: float, features: float,
                  bf16: bool) -> Tensor:
    """data mse(target, student) + lam mse(teacher, student) + features * feature_error. -> ()

    Where the last two weights are 0 the teacher is not evaluated.
    """
    with mixed_precision(batch.x.device, bf16), sublayer_outputs(student, features > 0) as mine:
        predicted = student(batch.x, batch.t, batch.labels).float()
    loss = data * mse_loss(predicted, batch.target)
    if lam or features:
        taught, theirs = teach(teacher, batch, features > 0, bf16)
        loss = loss + lam * mse_loss(predicted, taught)
    if features:
        loss = loss + features * feature_error(mine, theirs)
    return loss
