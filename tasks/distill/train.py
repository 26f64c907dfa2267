"""Sparse transfer training: a masked student learns from data, from teacher samples and from the dense teacher.

SparseDM (arXiv 2404.10445) with SR-STE (arXiv 2102.04010). Where SparseDM's code and text differ, or the code is unfit here:
- The pattern is fixed from the first step (its code); the paper's first version raises the sparsity progressively.
- SR-STE's decay is a part of the gradient and so goes through Adam's normalisation (its code), not a decoupled decay.
- The teacher's term stands beside the data's, lam = 0.1 (its CIFAR code; the released ImageNet and COCO scripts have none).
- It masks anew in every forward, evaluation included, and stores no mask. We freeze the mask of the EMA weights at the end:
  what is judged is what ships.
- A convolution whose input channels are no multiple of M stays dense; its code groups across kernel taps there.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.params import check_range
from tasks.core.sparsity import nm_mask
from tasks.core.training import Ema, mixed_precision, optimise, step_generator, stratified_timesteps, warmup_cosine


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a student is trained; the same for every grain."""

    steps: int
    batch: int
    lr: float             # peak, after the warm-up; a cosine to 0 follows
    warmup: int           # steps
    weight_decay: float   # AdamW's, decoupled
    ema_decay: float
    sr_ste: float         # decay of pruned weights, a part of the gradient (N:M only)
    lam: float            # weight of the teacher's term; the data's has weight 1
    bank_share: float     # share of a batch that are teacher samples
    label_dropout: float  # share of labels replaced by the null label
    bf16: bool            # autocast
    log_every: int        # steps between two rows of the curve
    seed: int

    def __post_init__(self):
        for key, low, high in (("steps", 1, 10**7), ("batch", 1, 65_536), ("warmup", 0, 10**6), ("log_every", 1, 10**6),
                               ("lr", 0, 1), ("weight_decay", 0, 1), ("ema_decay", 0, 1), ("sr_ste", 0, 1), ("lam", 0, 1e6),
                               ("bank_share", 0, 1), ("label_dropout", 0, 1), ("seed", 0, 2**31)):
            check_range(f"distill.{key}", getattr(self, key), low, high)


@dataclass(frozen=True)
class Student:
    weights: dict[str, Tensor]                # state_dict of the EMA in dense shape, masks applied
    masks: dict[str, Tensor]                  # parameter name -> bool, frozen
    curve: list[tuple[int, float, float]]     # step, mean loss since the last row, flip rate since the last row


@dataclass(frozen=True, kw_only=True)
class Images:
    """Real images and teacher samples in one pool: the first `real` are real."""

    pixels: Tensor         # (N, C, H, W) uint8
    labels: Tensor | None  # (N,) int64
    real: int


class SrSte(torch.autograd.Function):
    """w * m forward; backward dL/dw = dL/d(w m) + decay (1 - m) w (SR-STE, eq. 9): pruned weights learn on, and shrink."""

    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * weight.masked_fill(mask, 0), None, None


def refresh(model: nn.Module, masks: Mapping[str, Tensor], pattern: tuple[int, int] | None) -> dict[str, Tensor]:
    """The masks of the model's present weights: recomputed for an N:M pattern, fixed without one."""
    if pattern is None:
        return dict(masks)
    return {name: nm_mask(model.get_parameter(name), *pattern) for name in masks}


def masked(model: nn.Module, masks: Mapping[str, Tensor], decay: float | None) -> dict[str, Tensor]:
    """The weights a student computes with. decay: SR-STE's; None cuts the gradient of pruned weights off."""
    weights = {name: model.get_parameter(name) for name in masks}
    if decay is None:
        return {name: weight * masks[name] for name, weight in weights.items()}
    return {name: SrSte.apply(weight, masks[name], decay) for name, weight in weights.items()}


def with_weights(denoiser: Denoiser, weights: Mapping[str, Tensor]) -> Denoiser:
    """The same denoiser computing with some parameters replaced; its model keeps its own."""
    replaced = copy.copy(denoiser)
    replaced.model = lambda *args, **kwargs: functional_call(denoiser.model, dict(weights), args, kwargs)
    return replaced


def flip_rate(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Share of mask bits that changed (SR-STE's sparse architecture divergence, per bit)."""
    changed = sum((before[name] != mask).sum().item() for name, mask in after.items())
    return changed / sum(mask.numel() for mask in after.values())


def draw(images: Images, batch: int, bank_share: float, null_label: int, label_dropout: float,
         rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """-> (batch, C, H, W) in [-1, 1], each a teacher sample with probability bank_share, and (batch,) labels or None.

    Labels are dropped as in the teacher's training, so guidance keeps working.
    """
    index = torch.randint(images.real, (batch,), generator=rng)
    if images.real < len(images.pixels):
        taught = torch.randint(images.real, len(images.pixels), (batch,), generator=rng)
        index = torch.where(torch.rand(batch, generator=rng) < bank_share, taught, index)
    x0 = images.pixels[index].float() / 127.5 - 1
    if images.labels is None:
        return x0, None
    dropped = torch.rand(batch, generator=rng) < label_dropout
    return x0, images.labels[index].masked_fill(dropped, null_label)


def transfer_loss(student: Denoiser, teacher: Denoiser, x0: Tensor, labels: Tensor | None, lam: float, bf16: bool,
                  rng: torch.Generator) -> Tensor:
    """mse(target, student) + lam * mse(teacher, student) on x0 (N, C, H, W) noised to a timestep of its own each. -> ()"""
    device = next(teacher.model.parameters()).device
    t = stratified_timesteps(len(x0), teacher.schedule.steps, rng)
    noise = torch.randn(x0.shape, generator=rng)
    target = teacher.schedule.target(x0, noise, t).to(device)
    x, t = teacher.schedule.add_noise(x0, noise, t).to(device), t.to(device)
    labels = None if labels is None else labels.to(device)
    with mixed_precision(device, bf16):
        predicted = student(x, t, labels).float()
        with torch.no_grad():
            taught = teacher(x, t, labels).float()
    return mse_loss(predicted, target) + lam * mse_loss(predicted, taught)


def freeze(ema: nn.Module, masks: Mapping[str, Tensor], pattern: tuple[int, int] | None) -> tuple[dict, dict]:
    """The EMA's state_dict with its masks applied, and these masks."""
    final = refresh(ema, masks, pattern)
    state = {name: tensor.masked_fill(~final[name], 0) if name in final else tensor.clone()
             for name, tensor in ema.state_dict().items()}
    return state, final


def train(teacher: Denoiser, masks: Mapping[str, Tensor], pattern: tuple[int, int] | None, images: Images,
          settings: Settings, checkpoint: Checkpoint, label: str = "distill") -> Student:
    """Train a student that starts as the teacher under `masks`, on the device of the teacher, which stays as it is.

    pattern: (n, m) recomputes the masks from the dense shadow weights before every step; None keeps them as they are.
    The same arguments give the same student, to the bit, also when killed and resumed on the way.
    """
    shadow = copy.copy(teacher)
    shadow.model = copy.deepcopy(teacher.model).requires_grad_(True).eval()
    parameters = list(shadow.model.parameters())
    ema = Ema(shadow.model, settings.ema_decay)
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    logged = {name: mask.to(parameters[0].device, torch.bool) for name, mask in masks.items()}
    flips: list[float] = []

    def step(i: int) -> float:
        nonlocal logged
        rng = step_generator(settings.seed, i)
        live = refresh(shadow.model, logged, pattern)
        if (i + 1) % settings.log_every == 0 or i + 1 == settings.steps:
            flips.append(flip_rate(logged, live))
            logged = live
        x0, labels = draw(images, settings.batch, settings.bank_share, teacher.null_label, settings.label_dropout, rng)
        student = with_weights(shadow, masked(shadow.model, live, settings.sr_ste if pattern else None))
        loss = transfer_loss(student, teacher, x0, labels, settings.lam, settings.bf16, rng)
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * warmup_cosine(i, settings.steps, settings.warmup)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        ema.update(shadow.model, i)
        return loss.item()

    def state() -> dict:
        return {"shadow": shadow.model.state_dict(), "ema": ema.module.state_dict(), "optimiser": optimiser.state_dict(),
                "logged": logged, "flips": flips}

    def restore(saved: dict) -> None:
        nonlocal logged
        shadow.model.load_state_dict(saved["shadow"])
        ema.module.load_state_dict(saved["ema"])
        optimiser.load_state_dict(saved["optimiser"])
        logged = saved["logged"]
        flips.extend(saved["flips"])

    curve = optimise(step, state, restore, settings.steps, checkpoint, label, settings.log_every)
    weights, final = freeze(ema.module, logged, pattern)
    return Student(weights, final, [(*row, rate) for row, rate in zip(curve, flips, strict=True)])
