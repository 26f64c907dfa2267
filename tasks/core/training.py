"""What every training loop of the pipeline shares: EMA, warm-up and cosine, stratified timesteps, resume."""

import contextlib
import copy
import math
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tasks.core.checkpoint import Checkpoint
from tasks.core.memory import keep_freed_memory
from tasks.core.progress import track


class Ema:
    """Exponential moving average of a module's parameters; early steps average over what there is."""

    def __init__(self, module: torch.nn.Module, decay: float):
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, now in zip(self.module.parameters(), module.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear from 0 over `warmup` steps, then a cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def stratified_timesteps(n: int, upper: int, rng: torch.Generator) -> torch.Tensor:
    """n timesteps in [0, upper), evenly spread with one random offset: the variance of the loss falls, its mean does not
    (VDM, arXiv 2107.00630, appendix I.1). -> (n,) int64, shuffled."""
    u = (torch.rand(1, generator=rng) + torch.arange(n) / n) % 1
    t = (u * upper).long()
    return t[torch.randperm(n, generator=rng)]


def draw_batch(images: torch.Tensor, labels: torch.Tensor | None, batch: int, null_label: int, label_dropout: float,
               rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> (batch, C, H, W) in [-1, 1] and (batch,) labels, some replaced by the null label (classifier-free guidance)."""
    index = torch.randint(len(images), (batch,), generator=rng)
    if labels is None:
        return images[index], None
    dropped = torch.rand(batch, generator=rng) < label_dropout
    return images[index], labels[index].masked_fill(dropped, null_label)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one step as a function of (seed, step), so a resumed run draws what an undisturbed one does."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class AttentionInFp32(TorchFunctionMode):
    """Attention leaves autocast."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value, *rest = args
        with torch.autocast(query.device.type, enabled=False):
            return function(query.float(), key.float(), value.float(), *rest, **(kwargs or {})).to(query.dtype)


@contextlib.contextmanager
def mixed_precision(device: torch.device | str, bf16: bool):
    """bf16 autocast. On a CPU attention stays in fp32: the flash kernel's backward is far slower in bf16 (torch 2.13), and the
    MATH kernel is slower than either in fp32."""
    device = torch.device(device)
    attention = AttentionInFp32() if bf16 and device.type == "cpu" else contextlib.nullcontext()
    with attention, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        yield


def optimise(step: Callable[[int], float], state: Callable[[], dict], restore: Callable[[dict], None], steps: int,
             checkpoint: Checkpoint, label: str, log_every: int = 50) -> list[tuple[int, float]]:
    """Run `step(i) -> loss` for every i not yet done and keep the checkpoint. -> curve of (step, mean loss since the last).

    state / restore: what the loop's owner needs back after a kill; the curve travels along.
    """
    keep_freed_memory()
    saved = checkpoint.load()
    curve, start, losses = [], 0, []
    if saved:
        restore(saved["state"])
        curve, start, losses = [tuple(row) for row in saved["curve"]], saved["step"], saved["losses"]
        print(f"{label}: resuming at step {start} of {steps}", flush=True)
    for i in track(range(start, steps), steps, label, done=start):
        losses.append(step(i))
        if (i + 1) % log_every == 0 or i + 1 == steps:
            curve.append((i + 1, sum(losses) / len(losses)))
            losses = []
        checkpoint.save_if_due(lambda: {"state": state(), "curve": curve, "step": i + 1, "losses": losses})  # noqa: B023
    if start < steps:  # what follows may be long, and be killed
        checkpoint.save({"state": state(), "curve": curve, "step": steps, "losses": []})
    return curve
