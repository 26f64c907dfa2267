"""Sparse transfer training: a masked student learns from data, from teacher samples and from the dense teacher.

SparseDM (arXiv 2404.10445) with SR-STE (arXiv 2102.04010). Where SparseDM's code and text differ, or the code is unfit here:
- The pattern is fixed from the first step by default (its code); its first version's progressive one is the method
  `progressive`, in which the weights, the optimiser and the EMA stay the same (its code trains none of them after a change).
- SR-STE's decay is a part of the gradient by default and so goes through Adam's normalisation (its code); `decay: decoupled`
  and `precondition` (STEP, arXiv 2302.01172) are two answers to that.
- The teacher's term stands beside the data's, lam = 0.1 (its CIFAR code; the released ImageNet and COCO scripts have none). By
  default it stands alone, beside that of the sublayers' outputs (benchmarks/sparsity: `fixed_taught` against `fixed`).
- It masks anew in every forward, evaluation included, and stores no mask. We freeze the mask of the EMA weights, at the end
  or before: what is judged is what ships.
- A convolution whose input channels are no multiple of M stays dense; its code groups across kernel taps there.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.training import Ema, optimise, step_generator, warmup_cosine
from tasks.distill.images import Batch, Images, check_pool, draw, with_noise
from tasks.distill.loss import transfer_loss
from tasks.distill.masking import (
    DECAYS_PRUNED,
    RECOMPUTES,
    flip_rate,
    pass_gradients,
    pruned_part,
    recomputed,
    shared_copy,
    shrink_pruned,
    targets,
    write_masked,
)
from tasks.distill.settings import Settings, check_method


@dataclass(frozen=True)
class Student:
    weights: dict[str, Tensor]                # state_dict of the EMA in dense shape, masks applied
    masks: dict[str, Tensor]                  # parameter name -> bool, frozen
    curve: list[tuple[int, float, float]]     # step, mean loss since the last row, flip rate since the last row
    flips_at_freeze: float                    # flip rate from the last masks in use to the frozen ones of the EMA


def with_model(denoiser: Denoiser, model: nn.Module) -> Denoiser:
    other = copy.copy(denoiser)
    other.model = model
    return other


class Transfer:
    """One student in training: `step(0)`, `step(1)`, ... in order; `state` and `restore` carry it over a kill.

    `dense` holds the weights that are trained, `live` computes with what the masks leave of them; parameters without a mask
    are one and the same in both. A step is three parts, so that each can be timed: masks, gradients, update.
    """

    def __init__(self, teacher: Denoiser, masks: Mapping[str, Tensor], grain: str | Mapping[str, str], method: str,
                 images: Images, settings: Settings, start: Mapping[str, Tensor] = MappingProxyType({})):
        check_method(method, settings)
        check_pool(images, settings.bank_share)
        self.teacher, self.method, self.images, self.settings = teacher, method, images, settings
        self.device = next(teacher.model.parameters()).device
        self.given = {name: mask.to(self.device, torch.bool) for name, mask in masks.items()} if method != "dense" else {}
        self.targets = targets(self.given, grain)
        self.dense = copy.deepcopy(teacher.model).requires_grad_(True).eval()
        self.dense.load_state_dict(start, strict=False)
        self.live = with_model(teacher, shared_copy(self.dense, self.given))
        self.ema = Ema(self.dense, settings.ema_decay)
        self.optimiser = torch.optim.AdamW(self.dense.parameters(), lr=settings.lr, weight_decay=settings.weight_decay,
                                           fused=True)
        self.warm_steps = round(settings.precondition * settings.steps)
        self.freeze_step = round(settings.freeze_at * settings.steps) if method in RECOMPUTES else 0
        self.frozen = self.given if self.freeze_step == 0 else None  # nothing was learned about masks by then
        self.flips_at_freeze = 0.0
        self.masks = self.logged = self.given
        self.flips: list[float] = []

    # ---- one step ----

    def step(self, i: int) -> float:
        self.mask(i)
        loss = self.gradients(i)
        self.update(i)
        return loss

    def mask(self, i: int) -> None:
        """The masks of step i, and the weights that compute under them."""
        if i == self.freeze_step and self.frozen is None:
            self.freeze(i)
        self.masks = self.masks_at(i)
        write_masked(self.live.model, self.dense, self.masks)
        if (i + 1) % self.settings.log_every == 0 or i + 1 == self.settings.steps:
            self.flips.append(flip_rate(self.logged, self.masks))
            self.logged = self.masks

    def masks_at(self, i: int) -> dict[str, Tensor]:
        if i < self.warm_steps:
            return {name: torch.ones_like(mask) for name, mask in self.given.items()}
        return self.recomputed_at(i) if self.frozen is None else self.frozen

    def recomputed_at(self, i: int) -> dict[str, Tensor]:
        shares = self.settings.prune_at if self.method == "progressive" else ()
        return recomputed(self.dense, self.given, self.targets, pruned_part(i, self.settings.steps, shares))

    def freeze(self, i: int) -> None:
        """From here on the masks are those of the EMA's weights, which is what ships."""
        self.frozen = recomputed(self.ema.module, self.given, self.targets)
        self.flips_at_freeze = flip_rate(self.recomputed_at(i), self.frozen)

    def gradients(self, i: int) -> float:
        """Leave the gradients of step i in the dense weights. -> loss"""
        settings, total = self.settings, 0.0
        for part in self.batch(i).split(settings.accumulate):
            loss = transfer_loss(self.live, self.teacher, part, settings.data, settings.lam, settings.features, settings.bf16)
            loss = loss / settings.accumulate
            loss.backward()
            total += loss.item()
        decay = settings.sr_ste if self.method in DECAYS_PRUNED and settings.decay == "gradient" else 0.0
        pass_gradients(self.live.model, self.dense, self.masks, self.cut, decay)
        return total

    def batch(self, i: int) -> Batch:
        settings, rng = self.settings, step_generator(self.settings.seed, i)
        null = self.teacher.null_label
        x0, labels = draw(self.images, settings.batch, settings.bank_share, null, settings.label_dropout, rng)
        return with_noise(self.teacher.schedule, x0, labels, rng).to(self.device)

    @property
    def cut(self) -> frozenset[str]:
        """Parameters whose masks will not change any more: what they prune need not learn."""
        return frozenset(name for name, target in self.targets.items() if self.frozen is not None or target.grain == "unit")

    def update(self, i: int) -> None:
        settings = self.settings
        lr = settings.lr * warmup_cosine(i, settings.steps, settings.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        nn.utils.clip_grad_norm_(self.dense.parameters(), 1.0)
        if self.method in DECAYS_PRUNED and settings.decay == "decoupled":
            shrink_pruned(self.live.model, self.dense, sorted(self.masks.keys() - self.cut), lr * settings.sr_ste)
        if 0 < self.warm_steps <= i:
            step_preconditioned(self.optimiser, i + 1, self.warm_steps)
        else:
            self.optimiser.step()
        self.optimiser.zero_grad()
        self.ema.update(self.dense, i)

    # ---- before, between and after ----

    def state(self) -> dict:
        return {"dense": self.dense.state_dict(), "ema": self.ema.module.state_dict(), "optimiser": self.optimiser.state_dict(),
                "logged": self.logged, "flips": self.flips, "frozen": self.frozen, "flips_at_freeze": self.flips_at_freeze}

    def restore(self, saved: dict) -> None:
        self.dense.load_state_dict(saved["dense"])
        self.ema.module.load_state_dict(saved["ema"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.logged, self.frozen = self.here(saved["logged"]), self.here(saved["frozen"])
        self.flips, self.flips_at_freeze = saved["flips"], saved["flips_at_freeze"]

    def here(self, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """A checkpoint may be of another device."""
        return masks and {name: mask.to(self.device) for name, mask in masks.items()}

    def student(self, curve: list[tuple[int, float]]) -> Student:
        """The EMA under its frozen masks, once all steps are done; in the memory order of a file."""
        if self.frozen is None:
            self.freeze(self.settings.steps)
        frozen = {name: mask.contiguous() for name, mask in self.frozen.items()}
        weights = {name: (tensor.masked_fill(~frozen[name], 0) if name in frozen else tensor.clone()).contiguous()
                   for name, tensor in self.ema.module.state_dict().items()}
        rows = [(*row, rate) for row, rate in zip(curve, self.flips, strict=True)]
        return Student(weights, frozen, rows, self.flips_at_freeze)


@torch.no_grad()
def step_preconditioned(optimiser: torch.optim.AdamW, t: int, t0: int) -> None:
    """AdamW's step number t with the variance that step t0 left (STEP, arXiv 2302.01172, algorithm 1, second phase)."""
    for group in optimiser.param_groups:
        (beta1, beta2), lr = group["betas"], group["lr"]
        for weight in (w for w in group["params"] if w.grad is not None):
            state = optimiser.state[weight]
            weight.mul_(1 - lr * group["weight_decay"])
            state["exp_avg"].lerp_(weight.grad, 1 - beta1)
            scale = (state["exp_avg_sq"] / (1 - beta2**t0)).sqrt_().add_(group["eps"])
            weight.addcdiv_(state["exp_avg"], scale, value=-lr / (1 - beta1**t))


def train(teacher: Denoiser, masks: Mapping[str, Tensor], grain: str | Mapping[str, str], method: str, images: Images,
          settings: Settings, checkpoint: Checkpoint, label: str = "distill",
          start: Mapping[str, Tensor] = MappingProxyType({})) -> Student:
    """Train a student that starts as the teacher under `masks`, on the device of the teacher, which stays as it is.

    masks: parameter name -> bool of its shape; they say how much of each parameter stays. grain: of all masks, or of each by
    parameter name. method: one of METHODS, see tasks/distill/masking.py; `dense` ignores the masks. start: parameters that
    training starts from instead of the teacher's.
    The same arguments give the same student, to the bit, also when killed and resumed on the way.
    """
    transfer = Transfer(teacher, masks, grain, method, images, settings, start)
    curve = optimise(transfer.step, transfer.state, transfer.restore, settings.steps, checkpoint, label, settings.log_every)
    return transfer.student(curve)
