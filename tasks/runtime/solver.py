"""ODE solvers as rows of coefficients, one row a step: no scheduler objects in the loop.

Shipped inside packages. Every solver is written on the data prediction x0 of this step (DPM-Solver++, arXiv 2211.01095, eq. 9)
and of those before it, one of them on the prediction, too:

    x_next = a x + b[0] x0 + b[1] x0_previous + b[2] x0_before_that + ... + d prediction

`ddim`: order 1, DDIM with eta 0 (arXiv 2010.02502, eq. 12), whose noise is what x and the clipped x0 leave; it ends at x0.
`dpm2m`: order 2, DPM-Solver++(2M) in its midpoint form; it ends at x0.
`ddim_diffusers`: DDIM with eta 0 as diffusers' DDIMPipeline has it: the noise is what the network predicted, whether x0 was
clipped or not, and it ends where the scheduler's config says, `set_alpha_to_one` and spacing "leading" included.
`learned`: no formula; a recipe carries its rows, whose times may lie between timesteps.

They equal diffusers' `DDIMScheduler` with `use_clipped_model_output`, `DPMSolverMultistepScheduler` and `DDIMScheduler` as it
is, on lists where that one goes to the next timestep of its list; a test holds that.
"""

import functools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SOLVERS = ("ddim", "dpm2m")                      # that have a formula and that compressed models are sampled by
KNOWN = (*SOLVERS, "learned", "ddim_diffusers")  # of a recipe; the last one is the dense model's
NO_SIGNAL = 2.0**-24  # alpha^2 that DPM-Solver calculates with instead of 0, as in diffusers: its log-SNR is finite

# predict(x, t, labels, step): NCHW, (N,) fp32, (N,) int64 or None, index of the step -> NCHW, what the network predicts
Predict = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


@dataclass(frozen=True)
class SolverStep:
    t: float              # that the network is told; whole for a solver with a formula
    p: float              # x0 = p x + q prediction
    q: float
    a: float              # x_next = a x + b[0] x0 + b[1] x0_previous + ... + d prediction
    b: tuple[float, ...]  # of this step's x0 and as many before it as count
    d: float = 0.0        # of ddim_diffusers alone

    @property
    def gain(self) -> float:
        """Derivative of x_next with respect to the prediction, where x0 is not clipped."""
        return self.b[0] * self.q + self.d

    @classmethod
    def from_json(cls, row: Mapping) -> "SolverStep":
        return cls(t=float(row["t"]), p=row["p"], q=row["q"], a=row["a"], b=tuple(row["b"]))

    def to_json(self) -> dict:
        return {"t": self.t, "p": self.p, "q": self.q, "a": self.a, "b": self.b}


def recipe_steps(scheduler_config: dict, recipe: Any) -> list[SolverStep]:
    """The rows that a recipe is sampled by. recipe: a `Recipe`, or `recipe.json` as read."""
    said = recipe.get if isinstance(recipe, Mapping) else functools.partial(getattr, recipe)
    rows = said("rows", None)
    if rows is None:
        return solver_steps(scheduler_config, said("timesteps"), said("solver"))
    return [row if isinstance(row, SolverStep) else SolverStep.from_json(row) for row in rows]


def alphas_cumprod(scheduler_config: dict) -> Tensor:
    """(T,) fp64."""
    return _alphas_cumprod(json.dumps(dict(scheduler_config), sort_keys=True))


@functools.lru_cache(maxsize=16)
def _alphas_cumprod(config: str) -> Tensor:
    """Building a scheduler takes as long as some evaluations of a small network: once a config."""
    from diffusers import DDIMScheduler
    return DDIMScheduler.from_config(json.loads(config)).alphas_cumprod.double()


def data_prediction(alpha: float, sigma: float, prediction_type: str) -> tuple[float, float]:
    """p and q of x0 = p x + q prediction. Raises ValueError where alpha is 0 and the prediction is the noise."""
    if prediction_type == "epsilon":
        if alpha == 0:
            raise ValueError("prediction_type: epsilon at a timestep without signal (alpha 0) says nothing of x0")
        return 1 / alpha, -sigma / alpha
    return {"v_prediction": (alpha, -sigma), "sample": (0.0, 1.0)}[prediction_type]


def noise_prediction(alpha: float, sigma: float, prediction_type: str) -> tuple[float, float]:
    """u and w of the noise = u x + w prediction; sigma above 0."""
    return {"epsilon": (0.0, 1.0), "v_prediction": (sigma, alpha), "sample": (1 / sigma, -alpha / sigma)}[prediction_type]


def solver_steps(scheduler_config: dict, timesteps: Sequence[int], solver: str) -> list[SolverStep]:
    """The coefficients of every step of a strictly decreasing timestep list. scheduler_config: a DDIMScheduler's.

    solver: one of KNOWN. The first and the last step of dpm2m are of order 1 (there is no history; sigma ends at 0).
    """
    bars = torch.cat([alphas_cumprod(scheduler_config)[list(timesteps)], final_bar(scheduler_config, timesteps, solver)[None]])
    if solver == "dpm2m" and bars[0] == 0:
        bars[0] = min(NO_SIGNAL, bars[1].item() / 2)  # below the next one, which may be less than diffusers' constant
    levels = [(bar**0.5, (1 - bar) ** 0.5) for bar in bars.tolist()]  # alpha and sigma
    lam = (0.5 * (bars / (1 - bars)).log()).tolist()
    kind = scheduler_config.get("prediction_type", "epsilon")
    steps = []
    for i, t in enumerate(timesteps):
        if solver == "ddim_diffusers":
            factors = as_predicted(*levels[i], *levels[i + 1], kind)
        else:
            factors = derived(*levels[i], *levels[i + 1])
        if solver == "dpm2m" and i > 0 and levels[i + 1][1] > 0:
            factors = second_order(*factors, *lam[i - 1 : i + 2])
        steps.append(SolverStep(float(t), *data_prediction(*levels[i], kind), *factors))
    return steps


def final_bar(scheduler_config: dict, timesteps: Sequence[int], solver: str) -> Tensor:
    """alpha^2 of what the last step ends at; 1 is x0 itself.

    Of `ddim_diffusers`, which with the spacing "leading" goes T // N timesteps on from the last one, and that may still be one.
    """
    bars, one = alphas_cumprod(scheduler_config), torch.tensor(1.0, dtype=torch.float64)
    if solver != "ddim_diffusers":
        return one
    beyond = timesteps[-1] - len(bars) // len(timesteps)
    if scheduler_config.get("timestep_spacing", "leading") == "leading" and beyond >= 0:
        return bars[beyond]
    return one if scheduler_config.get("set_alpha_to_one", True) else bars[0]


def derived(alpha: float, sigma: float, next_alpha: float, next_sigma: float) -> tuple[float, tuple[float]]:
    """a and b of a step whose noise is (x - alpha x0) / sigma."""
    a = next_sigma / sigma if next_sigma else 0.0
    return a, (next_alpha - alpha * a,)


def as_predicted(alpha: float, sigma: float, next_alpha: float, next_sigma: float,
                 prediction_type: str) -> tuple[float, tuple[float], float]:
    """a, b, d of a step whose noise is what the network says."""
    u, w = noise_prediction(alpha, sigma, prediction_type) if next_sigma else (0.0, 0.0)
    return next_sigma * u, (next_alpha,), next_sigma * w


def second_order(a: float, b: tuple[float], before: float, now: float, after: float) -> tuple[float, tuple[float, float]]:
    """a and b of DPM-Solver++(2M); a, b: of order 1; before, now, after: half log-SNRs of the last step, of this
    one and of the next."""
    r = (now - before) / (after - now)
    return a, (b[0] * (1 + 0.5 / r), -b[0] * 0.5 / r)


@dataclass(frozen=True)
class Thresholding:
    """Dynamic thresholding (Imagen, arXiv 2205.11487): x0 of a sample is cut at a quantile s of its |x0| and divided by s.

    It equals the `thresholding` of diffusers' schedulers: s is between 1 and `most`.
    """

    ratio: float  # which quantile
    most: float

    def __call__(self, x0: Tensor) -> Tensor:
        s = torch.quantile(x0.flatten(1).abs(), self.ratio, dim=1).clamp(min=1, max=self.most)
        s = s.view(-1, *[1] * (x0.dim() - 1))
        return x0.clamp(-s, s) / s


Clip = float | Thresholding | None  # bound of |x0|; None for latents


def limited(x0: Tensor, clip: Clip) -> Tensor:
    """x0 as its scheduler lets it be; a fixed bound is applied in place."""
    if clip is None:
        return x0
    return clip(x0) if isinstance(clip, Thresholding) else x0.clamp_(-clip, clip)


def advance(step: SolverStep, x: Tensor, prediction: Tensor, earlier: Iterable[Tensor], clip: Clip) -> tuple[Tensor, Tensor]:
    """x and the prediction at step.t, the x0 of the steps before, last first -> x at the next timestep, x0."""
    x0 = limited((step.p * x).add_(prediction, alpha=step.q), clip)
    following = (step.a * x).add_(x0, alpha=step.b[0])
    for term, factor in (*zip(earlier, step.b[1:], strict=False), (prediction, step.d)):
        if factor:
            following.add_(term, alpha=factor)
    return following, x0


def remembered(steps: Sequence[SolverStep]) -> deque:
    """For the x0 of the steps before, last first: it holds as many as some step reads."""
    return deque(maxlen=max(len(step.b) for step in steps) - 1)


def integrate(predict: Predict, steps: Sequence[SolverStep], noise: Tensor, labels: Tensor | None,
              clip: Clip) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, x before it, x0 predicted in it); with the last step, instead of x0, the sample: x after it."""
    x, earlier = noise, remembered(steps)
    times = torch.tensor([s.t for s in steps], dtype=torch.float32, device=x.device)[:, None].repeat(1, len(x))
    for i, (s, t) in enumerate(zip(steps, times, strict=True)):
        following, x0 = advance(s, x, predict(x, t, labels, i), earlier, clip)
        yield i, x, x0 if i + 1 < len(steps) else following
        x = following
        earlier.appendleft(x0)


def clip_bound(scheduler_config: dict) -> Clip:
    """Pixel models clip x0 as their scheduler says (diffusers' default: 1.0); latent models set `clip_sample: false`."""
    config = scheduler_config
    if config.get("thresholding", False):
        return Thresholding(config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0))
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", True) else None


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
