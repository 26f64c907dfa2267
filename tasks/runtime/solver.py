"""ODE solvers with their coefficients precomputed per timestep list: one fused update a step, no scheduler objects in the loop.

Shipped inside packages. Both solvers are written on the data prediction x0 (DPM-Solver++, arXiv 2211.01095, eq. 9 and alg. 2):

    x_next = a x + b x0 + c x0_previous

Order 1 is DDIM with eta 0 (arXiv 2010.02502, eq. 12); order 2 is DPM-Solver++(2M) in its midpoint form. They equal diffusers'
`DDIMScheduler` (with `use_clipped_model_output`) and `DPMSolverMultistepScheduler`; a test holds that.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SOLVERS = ("ddim", "dpm2m")

# predict(x, t, labels, step): NCHW, (N,) int64, (N,) int64 or None, index of the step -> NCHW, what the network predicts
Predict = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


@dataclass(frozen=True)
class SolverStep:
    t: int
    p: float  # x0 = p x + q prediction
    q: float
    a: float  # x_next = a x + b x0 + c x0_previous
    b: float
    c: float


def alphas_cumprod(scheduler_config: dict) -> Tensor:
    """(T,) fp64."""
    return _alphas_cumprod(json.dumps(dict(scheduler_config), sort_keys=True))


@functools.lru_cache(maxsize=16)
def _alphas_cumprod(config: str) -> Tensor:
    """Building a scheduler takes as long as some evaluations of a small network: once a config."""
    from diffusers import DDIMScheduler
    return DDIMScheduler.from_config(json.loads(config)).alphas_cumprod.double()


def data_prediction(alpha: float, sigma: float, prediction_type: str) -> tuple[float, float]:
    """p and q of x0 = p x + q prediction."""
    return {"epsilon": (1 / alpha, -sigma / alpha), "v_prediction": (alpha, -sigma), "sample": (0.0, 1.0)}[prediction_type]


def solver_steps(scheduler_config: dict, timesteps: Sequence[int], solver: str) -> list[SolverStep]:
    """The coefficients of every step of a strictly decreasing timestep list; the last step lands on x0.

    solver: ddim | dpm2m. The first and the last step of dpm2m are of order 1 (there is no history; sigma ends at 0).
    """
    bars = alphas_cumprod(scheduler_config)[list(timesteps)]
    alpha = [*bars.sqrt().tolist(), 1.0]
    sigma = [*(1 - bars).sqrt().tolist(), 0.0]
    lam = [*(0.5 * (bars / (1 - bars)).log()).tolist(), float("inf")]
    kind = scheduler_config.get("prediction_type", "epsilon")
    steps = []
    for i, t in enumerate(timesteps):
        a = sigma[i + 1] / sigma[i]
        b, c = alpha[i + 1] - alpha[i] * a, 0.0
        if solver == "dpm2m" and 0 < i < len(timesteps) - 1:
            r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            b, c = b * (1 + 0.5 / r), -b * 0.5 / r
        steps.append(SolverStep(int(t), *data_prediction(alpha[i], sigma[i], kind), a, b, c))
    return steps


def advance(step: SolverStep, x: Tensor, prediction: Tensor, previous: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """x and the prediction at step.t, the x0 of the step before -> x at the next timestep, x0."""
    x0 = (step.p * x).add_(prediction, alpha=step.q)
    if clip is not None:
        x0.clamp_(-clip, clip)
    following = (step.a * x).add_(x0, alpha=step.b)
    return following.add_(previous, alpha=step.c) if step.c else following, x0


def integrate(predict: Predict, steps: Sequence[SolverStep], noise: Tensor, labels: Tensor | None,
              clip: float | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, x before it, x0 predicted in it); the last x0 is the sample. clip: bound of |x0|, None for latents."""
    x, x0 = noise, torch.zeros_like(noise)
    times = torch.tensor([s.t for s in steps], device=x.device)[:, None].repeat(1, len(x))
    for i, (s, t) in enumerate(zip(steps, times, strict=True)):
        following, x0 = advance(s, x, predict(x, t, labels, i), x0, clip)
        yield i, x, x0
        x = following


def clip_bound(scheduler_config: dict) -> float | None:
    """Pixel models clip x0 as their scheduler says (diffusers' default: 1.0); latent models set `clip_sample: false`."""
    return float(scheduler_config.get("clip_sample_range", 1.0)) if scheduler_config.get("clip_sample", True) else None


def with_guidance(predict: Predict, scale: float, null_label: int) -> Predict:
    """Classifier-free guidance (arXiv 2207.12598), both halves in one batch; scale 1 costs nothing."""
    if scale == 1.0:
        return predict

    def guided(x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        if labels is None:
            raise ValueError(f"guidance_scale: {scale} needs class labels; this model has none")
        both = torch.cat([labels, torch.full_like(labels, null_label)])
        conditional, unconditional = predict(torch.cat([x, x]), torch.cat([t, t]), both, step).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guided
