"""Training along whole trajectories: the gradient of a loss of the final image, through every evaluation and solver row.

What is trained is a solver (`LearnedSolver`), the weights of a network, or both; they learn to give the teacher's images from
the teacher's noises (GAS, arXiv 2510.17699; the weights as in Diffusion2GAN, arXiv 2405.05967, which learns such pairs, too).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.learned import LearnedSolver
from tasks.core.pairs import Pairs
from tasks.core.params import check_range
from tasks.core.recipe import Recipe
from tasks.core.sampler import sample
from tasks.core.schedule import Schedule
from tasks.core.training import mixed_precision, optimise, step_generator, warmup_cosine
from tasks.runtime.solver import Clip, Predict, clip_bound, limited

HELD_BATCH = 64      # images that are judged at a time
NUMBERS = "numbers"  # in the path of a network's parameters that are no weights: few, of size one; they learn as a solver's do


# ---- one trajectory with its gradient ----

def unroll(predict: Predict, solver: LearnedSolver, noise: Tensor, labels: Tensor | None, clip: Clip,
           recompute: bool = False) -> Tensor:
    """The sample, differentiable in all that predict and solver compute with. It equals `integrate` of the solver's rows.

    recompute: for the gradient, compute every evaluation but the last again, so that memory holds the activations of one at a
    time. Only for a predict that keeps nothing from step to step.
    """
    told, (opening, *rows) = (values.float() for values in solver.table())
    x, known = noise, []
    if solver.opened:
        images = solver.images.half().float()  # as the rows keep them
        x0 = images[labels] if labels is not None and len(images) > 1 else images[:1].expand_as(noise)
        x, known = opening[0] * noise + opening[1] * x0, [x0]
    for i, (t, (p, q, a, *b)) in enumerate(zip(told, rows, strict=True)):
        given = x, t.expand(len(x)), labels, i
        again = recompute and i + 1 < len(rows)
        prediction = (checkpoint(predict, *given, use_reentrant=False) if again else predict(*given)).float()
        known.insert(0, bounded(p * x + q * prediction, clip))
        x = sum((weight * x0 for weight, x0 in zip(b, known, strict=False)), a * x)
    return x


def bounded(x0: Tensor, clip: Clip) -> Tensor:
    """`limited`, which may work in place."""
    return x0.clamp(-clip, clip) if isinstance(clip, float) else limited(x0, clip)


def predicting(denoiser: Denoiser, bf16: bool) -> Predict:
    def predict(x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        with mixed_precision(x.device, bf16):
            return denoiser(x, t, labels)

    return predict


# ---- the loss of an image ----

@dataclass(frozen=True, kw_only=True)
class Weights:
    """Of the parts of `PictureLoss`; that of the feature net's last layer is 1."""

    maps: float     # of its inner layers
    pixels: float
    moments: float  # of mean and covariance over the batch


class PictureLoss(nn.Module):
    """How far images are from the teacher's of the same noises, seen by a feature net.

    Squared differences alone are least for the mean of what may be, which is blurred: its features vary less than the
    teacher's. So mean and covariance over the batch count as well; over pairs, chance moves both sides alike.
    net: with `trunk`, an nn.Sequential, and `embed`, as `tasks/data/features.py` has it; it is not trained.
    """

    def __init__(self, net: nn.Module, weights: Weights):
        super().__init__()
        self.net, self.weights = net, weights

    def maps(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        found = []
        for layer in self.net.trunk:
            images = layer(images)
            found += [] if isinstance(layer, nn.MaxPool2d) else [images]
        return found, self.net.embed(images)

    def forward(self, images: Tensor, wanted: Tensor) -> Tensor:
        """Both (N, C, H, W) in [-1, 1] -> ()."""
        maps, features = self.maps(images)
        with torch.no_grad():
            wanted_maps, wanted_features = self.maps(wanted)
        loss = (features - wanted_features).square().mean()
        relative = [(a - b).square().mean() / b.square().mean().clamp(min=1e-6) for a, b in zip(maps, wanted_maps, strict=True)]
        loss = loss + self.weights.maps * sum(relative) / len(relative)
        loss = loss + self.weights.pixels * (images - wanted).square().mean()
        return loss + self.weights.moments * moments_apart(features, wanted_features)


def moments_apart(x: Tensor, y: Tensor) -> Tensor:
    """Squared differences of the means (four times) and of the covariances, by dimension. x, y: (N, D), paired."""
    if len(x) < 2:
        return x.new_zeros(())
    a, b = x - x.mean(0), y - y.mean(0)
    covariances = (a.T @ a - b.T @ b) / (len(x) - 1)
    return (4 * (x.mean(0) - y.mean(0)).square().sum() + covariances.square().sum()) / x.shape[1]


@torch.inference_mode()
def judge_samples(predict: Predict, schedule: Schedule, recipe: Recipe, held: Pairs, loss: PictureLoss) -> float:
    """The loss of a recipe's samples, made as any consumer makes them."""
    samples, images = [], []
    for first in range(0, len(held), HELD_BATCH):
        noise, labels, wanted = held.take(range(first, min(first + HELD_BATCH, len(held))))
        samples.append(sample(predict, schedule, recipe, noise, labels))
        images.append(wanted)
    return loss(torch.cat(samples), torch.cat(images)).item()


# ---- training ----

def is_number(name: str) -> bool:
    return NUMBERS in name.split(".")


@dataclass(frozen=True, kw_only=True)
class How:
    steps: int          # 0: the start is judged and kept
    batch: int
    lr: float           # of the weights; 0: they stay
    images_lr: float    # of the opening's images
    solver_lr: float    # of the solver's numbers; 0: they stay
    warmup: int         # steps; then a cosine to 0
    ema_decay: float
    judge_every: int    # steps between two looks at the held pairs
    bf16: bool
    seed: int           # of the batches
    loss: Weights
    recompute: bool = False  # see `unroll`; without effect where a cache is live


def check_training(where: str, params: Any) -> None:
    """What every block of params.yaml that trains along trajectories has. where: its key. Raises ValueError."""
    rates = [name for name in ("lr", "solver_lr") if hasattr(params, name)]
    for name, low, high in (("steps", 0, 10**7), ("batch", 2, 4096), *((rate, 0, 1) for rate in rates), ("warmup", 0, 10**6),
                            ("ema_decay", 0, 1), ("judge_every", 1, 10**6), ("held", 1, 10**6)):
        check_range(f"{where}.{name}", getattr(params, name), low, high)
    for name, weight in asdict(params.loss).items():
        check_range(f"{where}.loss.{name}", weight, 0, 1e6)
    if not any(getattr(params, rate) for rate in rates):
        raise ValueError(f"{where}.{rates[0]}: 0{' and solver_lr: 0' if len(rates) > 1 else ''}: nothing would learn; steps: 0 "
                         "keeps the start")


@dataclass(frozen=True)
class Learned:
    """Of the EMA that did best on the held pairs, or the start."""

    solver: LearnedSolver
    weights: dict[str, Tensor]        # state dict of the network
    loss: float                       # on the held pairs
    start_loss: float
    at: int                           # step that it is of; 0: the start was not beaten and is kept
    curve: list[tuple[int, float]]    # step, mean training loss since the last row
    held: list[tuple[int, float]]     # step, loss on the held pairs

    @property
    def kept_start(self) -> bool:
        return self.at == 0


class Training:
    """One training along trajectories: `step(0)`, `step(1)`, ... in order; `state` and `restore` carry it over a kill."""

    def __init__(self, denoiser: Denoiser, solver: LearnedSolver, pairs: Pairs, held: Pairs, net: nn.Module, how: How,
                 masks: Mapping[str, Tensor], wrapped: Callable[[Denoiser], Predict] | None):
        self.pairs, self.held_pairs, self.how = pairs, held, how
        self.loss, self.clip = PictureLoss(net, how.loss), clip_bound(denoiser.schedule.config)
        self.recompute = how.recompute and wrapped is None
        self.predict_of = wrapped or (lambda one: predicting(one, how.bf16))
        self.device = next(denoiser.model.parameters()).device
        for name, value in denoiser.model.named_parameters():
            value.requires_grad_((how.solver_lr if is_number(name) else how.lr) > 0)
        self.live = nn.ModuleDict({"network": denoiser.model, "solver": solver.to(self.device)})
        self.denoiser, self.solver = denoiser, solver
        self.masks = {name: mask.to(self.device, torch.bool) for name, mask in masks.items()}
        self.trained = {name: value for name, value in self.live.named_parameters() if value.requires_grad}
        self.mean = {name: value.detach().clone() for name, value in self.trained.items()}
        self.best, self.held, self.at = dict(self.mean), [], 0
        self.predict = self.predict_of(denoiser)
        self.optimiser = torch.optim.AdamW(self.groups(), betas=(0.9, 0.99), weight_decay=0.0)
        self.rates = [group["lr"] for group in self.optimiser.param_groups]

    def groups(self) -> list[dict]:
        parts = {True: [], False: []}
        for name, value in self.live["network"].named_parameters():
            parts[is_number(name)].append(value)
        groups = [(self.solver.numbers(), self.how.solver_lr), ([self.solver.images], self.how.images_lr),
                  (parts[True], self.how.solver_lr), (parts[False], self.how.lr)]
        return [{"params": params, "lr": rate} for params, rate in groups if rate > 0 and params and params[0] is not None]

    def step(self, i: int) -> float:
        if not self.held:
            self.judge(0)
        rng = step_generator(self.how.seed, i)
        noise, labels, wanted = self.here(self.pairs.take(torch.randint(len(self.pairs), (self.how.batch,), generator=rng)))
        loss = self.loss(unroll(self.predict, self.solver, noise, labels, self.clip, self.recompute), wanted)
        loss.backward()
        factor = warmup_cosine(i, self.how.steps, min(self.how.warmup, self.how.steps // 5))
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.after(i)
        return loss.item()

    @torch.no_grad()
    def after(self, i: int) -> None:
        for name, mask in self.masks.items():
            self.live["network"].get_parameter(name).mul_(mask)
        decay = min(self.how.ema_decay, (1 + i) / (10 + i))
        for name, value in self.trained.items():
            self.mean[name].lerp_(value, 1 - decay)
        if (i + 1) % self.how.judge_every == 0 or i + 1 == self.how.steps:
            self.judge(i + 1)

    def judge(self, done: int) -> None:
        """Of the EMA's weights, on the held pairs."""
        live = {name: value.detach().clone() for name, value in self.trained.items()}
        self.write(self.mean)
        self.held.append((done, self.held_loss()))
        if self.held[-1][1] <= min(loss for _, loss in self.held):
            self.best, self.at = {name: value.clone() for name, value in self.mean.items()}, done
        self.write(live)

    @torch.no_grad()
    def held_loss(self) -> float:
        samples, images = [], []
        for i in range(0, len(self.held_pairs), HELD_BATCH):
            noise, labels, wanted = self.here(self.held_pairs.take(range(i, min(i + HELD_BATCH, len(self.held_pairs)))))
            samples.append(unroll(self.predict, self.solver, noise, labels, self.clip))
            images.append(wanted)
        return self.loss(torch.cat(samples), torch.cat(images)).item()

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.trained[name].copy_(value)

    def here(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [tensor if tensor is None else tensor.to(self.device) for tensor in tensors]

    # ---- before, between and after ----

    def state(self) -> dict:
        return {"live": {name: value.detach().clone() for name, value in self.trained.items()}, "mean": self.mean,
                "best": self.best, "at": self.at, "held": self.held, "optimiser": self.optimiser.state_dict()}

    def restore(self, saved: dict) -> None:
        self.write(saved["live"])
        self.mean, self.best = ({k: v.to(self.device) for k, v in saved[name].items()} for name in ("mean", "best"))
        self.at, self.held = saved["at"], [tuple(row) for row in saved["held"]]
        self.optimiser.load_state_dict(saved["optimiser"])

    def learned(self, curve: list[tuple[int, float]]) -> Learned:
        if not self.held:
            self.judge(0)
        self.write(self.best)
        found = dict(self.held)
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in self.live["network"].state_dict().items()}
        return Learned(self.solver, weights, found[self.at], found[0], self.at, curve, self.held)


def train_along(denoiser: Denoiser, solver: LearnedSolver, pairs: Pairs, held: Pairs, net: nn.Module, how: How,
                checkpoint: Checkpoint, label: str, masks: Mapping[str, Tensor] | None = None,
                wrapped: Callable[[Denoiser], Predict] | None = None, log_every: int = 50) -> Learned:
    """Train `solver`, and the weights of `denoiser` where how.lr is above 0, in place, on the device that they are on.

    net: the feature net of the loss, on that device. masks: parameter name -> bool; what they prune stays zero, as it is at
    the start. wrapped: of the denoiser what the solver calls, where more than the network is live (a cache, precisions).
    The same arguments give the same result to the bit, also when killed and resumed on the way. Never worse on the held pairs
    than the start, which is kept otherwise.
    """
    training = Training(denoiser, solver, pairs, held, net, how, masks or {}, wrapped)
    curve = optimise(training.step, training.state, training.restore, how.steps, checkpoint, label, log_every)
    lost = next((step for step, loss in curve if not math.isfinite(loss)), None)
    if lost is not None:
        print(f"{label}: the loss was no number by step {lost}: rates too high? What did best before is kept", flush=True)
    return training.learned(curve)
