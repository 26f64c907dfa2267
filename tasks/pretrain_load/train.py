"""Train a denoiser from scratch: velocity prediction (Salimans & Ho, arXiv 2202.00512) on a DDPM noise schedule.

AdamW, or Muon (arXiv 2502.16982) for the matrices inside of attentions and feed-forwards, which orthogonalises their momentum:
on a small DiT 900 of its steps reach what takes AdamW 2,200.
"""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.training import Ema, draw_batch, mixed_precision, optimise, step_generator, stratified_timesteps, warmup_cosine


def zero_init(model: torch.nn.Module) -> None:
    """adaLN-Zero: every block starts as the identity (DiT, arXiv 2212.09748, section 3.2). diffusers leaves this out."""
    for name, layer in model.named_modules():
        if name.endswith(("norm1.linear", "proj_out_1", "proj_out_2")):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)


def optimisers(model: torch.nn.Module, lr: float, muon_lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW; where muon_lr is above 0, Muon for the matrices of a DiT's attentions and feed-forwards."""
    parts = {True: [], False: []}
    for name, value in model.named_parameters():
        parts[muon_lr > 0 and value.ndim == 2 and bool({"attn1", "ff"} & set(name.split(".")))].append(value)
    rest = torch.optim.AdamW(parts[False], lr=lr, weight_decay=weight_decay, fused=True)
    return [rest, torch.optim.Muon(parts[True], lr=muon_lr, weight_decay=weight_decay)] if parts[True] else [rest]


def train(denoiser: Denoiser, images: Tensor, labels: Tensor | None, *, steps: int, batch: int, lr: float, muon_lr: float,
          warmup: int, weight_decay: float, ema_decay: float, label_dropout: float, bf16: bool, seed: int,
          checkpoint: Checkpoint) -> tuple[torch.nn.Module, list[tuple[int, float]]]:
    """images: (N, C, H, W) fp32 in [-1, 1]; labels: (N,) int64 or None. -> EMA model, curve of (step, loss)."""
    model = denoiser.model.eval()  # diffusers drops labels per block in train mode; draw_batch does it once per sample
    ema = Ema(model, ema_decay)
    found = optimisers(model, lr, muon_lr, weight_decay)
    rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in found]

    def step(i: int) -> float:
        rng = step_generator(seed, i)
        x0, y = draw_batch(images, labels, batch, denoiser.null_label, label_dropout, rng)
        t = stratified_timesteps(batch, denoiser.schedule.steps, rng)
        noise = torch.randn(x0.shape, generator=rng)
        with mixed_precision("cpu", bf16):
            predicted = denoiser(denoiser.schedule.add_noise(x0, noise, t), t, y)
        loss = mse_loss(predicted.float(), denoiser.schedule.target(x0, noise, t))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, highest in zip(found, rates, strict=True):
            for group, rate in zip(optimiser.param_groups, highest, strict=True):
                group["lr"] = rate * warmup_cosine(i, steps, warmup)
            optimiser.step()
            optimiser.zero_grad()
        ema.update(model, i)
        return loss.item()

    def state() -> dict:
        return {"model": model.state_dict(), "ema": ema.module.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in found]}

    def restore(saved: dict) -> None:
        model.load_state_dict(saved["model"])
        ema.module.load_state_dict(saved["ema"])
        for optimiser, state_dict in zip(found, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state_dict)

    curve = optimise(step, state, restore, steps, checkpoint, "pretrain")
    return ema.module, curve
