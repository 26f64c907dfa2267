"""ODE solvers as rows of coefficients, one row a step: no scheduler objects in the loop.

Shipped inside packages. Every solver is written on the data prediction x0 of this step (DPM-Solver++, arXiv 2211.01095, eq. 9)
and of those before it, one of them on the prediction, too:

    x_next = a x + b[0] x0 + b[1] x0_previous + b[2] x0_before_that + ... + d prediction

`ddim`: order 1, DDIM with eta 0 (arXiv 2010.02502, eq. 12), whose noise is what x and the clipped x0 leave.
`dpm2m`, `dpm3m`: DPM-Solver++(2M) in its midpoint form, and (3M).
`unipc`, `unipc3`: UniPC of order 2 and 3 with B2(h), its corrector included.
`deis`, `deis3`: DEIS in log rho, of order 2 and 3. `ipndm`: iPNDM, of order 4. Their noise is that of `ddim`.
All of these end at x0 but DEIS, which ends at timestep 0, as diffusers' does.
`ddim_diffusers`: DDIM with eta 0 as diffusers' DDIMPipeline has it: the noise is what the network predicted, whether x0 was
clipped or not, and it ends where the scheduler's config says, `set_alpha_to_one` and spacing "leading" included.
`learned`: no formula; a recipe carries its rows, whose times may lie between timesteps. Its first row may have an opening.

They equal diffusers' `DDIMScheduler` with `use_clipped_model_output`, `DPMSolverMultistepScheduler`, `UniPCMultistepScheduler`,
`DEISMultistepScheduler`, `IPNDMScheduler` on our noise levels, and `DDIMScheduler` as it is, on lists where that one goes to
the next timestep of its list; a test holds that (tests/unit/core/test_schedule_matrix.py).
"""

import base64
import functools
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHORT = 15            # steps, of a list from which on diffusers' solvers keep their order up to the last step
NO_SIGNAL = 2.0**-24  # alpha^2 that DPM-Solver calculates with instead of 0, as in diffusers: its log-SNR is finite

# predict(x, t, labels, step): NCHW, (N,) fp32, (N,) int64 or None, index of the step -> NCHW, what the network predicts
Predict = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


@dataclass(frozen=True)
class Opening:
    """The analytic first step: x = a noise + b x0, where x0 is known without an evaluation of the network.

    At the noisiest timestep the network's x0 is the mean image of the label, whatever the noise (AMED-Solver, arXiv 2312.00094,
    section 3.3, takes it for 0). The rows count this x0 among those before their own.
    """

    a: float
    b: float
    shape: tuple[int, int, int, int]  # labels (1 without), C, H, W
    x0: str                           # base64 of little-endian fp16

    @functools.cached_property
    def images(self) -> Tensor:
        """fp32 (labels, C, H, W)."""
        halves = np.frombuffer(base64.b64decode(self.x0), "<f2")
        return torch.from_numpy(halves.astype(np.float32)).view(self.shape)

    def known(self, like: Tensor, labels: Tensor | None) -> Tensor:
        """The x0 of images of such a shape; of no label, the number after the last one, the mean of all labels."""
        images = self.images.to(like.device)
        if labels is None or len(images) == 1:
            return images[:1].expand_as(like)
        return torch.cat([images, images.mean(0, keepdim=True)])[labels]

    def __call__(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """-> x at the first row's time."""
        return (self.a * noise).add_(self.known(noise, labels), alpha=self.b)

    def guided(self, scale: float, clip: "Clip") -> "Opening":
        """With the x0 of guided predictions (`with_guidance`)."""
        mean = self.images.mean(0, keepdim=True)
        return Opening.of(self.a, self.b, limited(mean + scale * (self.images - mean), clip))

    @classmethod
    def of(cls, a: float, b: float, images: Tensor) -> "Opening":
        """images: (labels, C, H, W), kept in fp16."""
        halves = images.detach().cpu().numpy().astype("<f2")
        return cls(a, b, tuple(images.shape), base64.b64encode(halves.tobytes()).decode())

    @classmethod
    def from_json(cls, data: Mapping) -> "Opening":
        return cls(data["a"], data["b"], tuple(data["shape"]), data["x0"])

    def to_json(self) -> dict:
        return {"a": self.a, "b": self.b, "shape": self.shape, "x0": self.x0}


@dataclass(frozen=True)
class SolverStep:
    t: float              # that the network is told; whole for a solver with a formula
    p: float              # x0 = p x + q prediction
    q: float
    a: float              # x_next = a x + b[0] x0 + b[1] x0_previous + ... + d prediction
    b: tuple[float, ...]  # of this step's x0 and as many before it as count
    d: float = 0.0        # of ddim_diffusers alone
    opening: Opening | None = None  # of a learned solver's first row alone

    @property
    def gain(self) -> float:
        """Derivative of x_next with respect to the prediction, where x0 is not clipped."""
        return self.b[0] * self.q + self.d

    @classmethod
    def from_json(cls, row: Mapping) -> "SolverStep":
        opening = row.get("opening")
        return cls(t=float(row["t"]), p=row["p"], q=row["q"], a=row["a"], b=tuple(row["b"]),
                   opening=opening and Opening.from_json(opening))

    def to_json(self) -> dict:
        opening = {"opening": self.opening.to_json()} if self.opening else {}
        return {"t": self.t, "p": self.p, "q": self.q, "a": self.a, "b": self.b, **opening}


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
    """The rows of a solver that has a formula, for a strictly decreasing timestep list. scheduler_config: a DDIMScheduler's."""
    return list(_solver_steps(json.dumps(dict(scheduler_config), sort_keys=True), tuple(timesteps), solver))


@functools.lru_cache(maxsize=64)
def _solver_steps(config: str, timesteps: tuple[int, ...], solver: str) -> tuple[SolverStep, ...]:
    """Of a short list they take as long as an evaluation of a small network: once a list."""
    scheduler_config = json.loads(config)
    kind, path = scheduler_config.get("prediction_type", "epsilon"), Path.of(scheduler_config, timesteps, solver)
    factors = as_predicted(path, kind) if solver == "ddim_diffusers" else FORMULAS[solver](path)
    return tuple(SolverStep(float(t), *data_prediction(path.alpha[i], path.sigma[i], kind), *found)
                 for i, (t, found) in enumerate(zip(timesteps, factors, strict=True)))


@dataclass(frozen=True)
class Path:
    """Levels of signal and noise at every timestep of a list and where its last step ends."""

    alpha: list[float]
    sigma: list[float]
    lam: list[float]    # log(alpha / sigma); infinite where there is no noise

    @classmethod
    def of(cls, scheduler_config: dict, timesteps: Sequence[int], solver: str) -> "Path":
        end = final_bar(scheduler_config, timesteps, solver)
        bars = torch.cat([alphas_cumprod(scheduler_config)[list(timesteps)], end[None]])
        if bars[0] == 0 and not solver.startswith("ddim"):
            bars[0] = min(NO_SIGNAL, bars[1].item() / 2)  # below the next one, which may be less than diffusers' constant
        levels, lam = bars.tolist(), 0.5 * (bars / (1 - bars)).log()
        return cls([bar**0.5 for bar in levels], [(1 - bar) ** 0.5 for bar in levels], lam.tolist())

    @property
    def steps(self) -> int:
        return len(self.alpha) - 1

    def order(self, i: int, most: int) -> int:
        """Of step i: as many x0 as there are so far, and fewer in the last steps of a short list, as diffusers'
        `lower_order_final` has it."""
        return min(most, i + 1, self.steps - i if self.steps < SHORT else most)

    def ratio(self, i: int) -> float:
        """a of step i: what becomes of the noise in x."""
        return self.sigma[i + 1] / self.sigma[i] if self.sigma[i + 1] else 0.0

    def whole(self, i: int) -> float:
        """b of step i where it has a single x0 (DDIM)."""
        return self.alpha[i + 1] - self.alpha[i] * self.ratio(i)


def final_bar(scheduler_config: dict, timesteps: Sequence[int], solver: str) -> Tensor:
    """alpha^2 of what the last step ends at; 1 is x0 itself.

    Of `ddim_diffusers`, which with the spacing "leading" goes T // N timesteps on from the last one, and that may still be one.
    """
    bars, one = alphas_cumprod(scheduler_config), torch.tensor(1.0, dtype=torch.float64)
    if solver.startswith("deis"):
        return bars[0]
    if solver != "ddim_diffusers":
        return one
    beyond = timesteps[-1] - len(bars) // len(timesteps)
    if scheduler_config.get("timestep_spacing", "leading") == "leading" and beyond >= 0:
        return bars[beyond]
    return one if scheduler_config.get("set_alpha_to_one", True) else bars[0]


Factors = Iterator[tuple[float, tuple[float, ...]]]  # a and b of every step


def as_predicted(path: Path, prediction_type: str) -> Iterator[tuple[float, tuple[float], float]]:
    """a, b and d of steps whose noise is what the network says."""
    for i in range(path.steps):
        level = path.sigma[i + 1]
        u, w = noise_prediction(path.alpha[i], path.sigma[i], prediction_type) if level else (0.0, 0.0)
        yield level * u, (path.alpha[i + 1],), level * w


def ddim(path: Path) -> Factors:
    """The noise is (x - alpha x0) / sigma."""
    for i in range(path.steps):
        yield path.ratio(i), (path.whole(i),)


# ---- DPM-Solver++ and UniPC: polynomials of x0 in lambda, the half log-SNR ----

def dpm(path: Path, most: int) -> Factors:
    """DPM-Solver++(2M) in its midpoint form and (3M) of arXiv 2211.01095, as diffusers writes them. It ends at order 1."""
    blends = {1: lambda path, i: (path.whole(i),), 2: second_order, 3: third_order}
    for i in range(path.steps):
        order = path.order(i, most) if i + 1 < path.steps else 1
        yield path.ratio(i), blends[order](path, i)


def second_order(path: Path, i: int) -> tuple[float, float]:
    before, now, after = path.lam[i - 1 : i + 2]
    r, b = (now - before) / (after - now), path.whole(i)
    return b * (1 + 0.5 / r), -b * 0.5 / r


def third_order(path: Path, i: int) -> tuple[float, float, float]:
    gaps = [after - before for before, after in zip(path.lam[i - 2 : i + 1], path.lam[i - 1 : i + 2], strict=True)]
    h, r0, r1 = gaps[2], gaps[1] / gaps[2], gaps[0] / gaps[2]
    decay = math.expm1(-h)
    first, second = path.alpha[i + 1] * (decay / h + 1), path.alpha[i + 1] * ((decay + h) / h**2 - 0.5)
    near = first * (1 + r0 / (r0 + r1)) - second / (r0 + r1)  # of the divided differences D1_0 and D1_1
    far = second / (r0 + r1) - first * r0 / (r0 + r1)
    return path.whole(i) + near / r0, far / r1 - near / r0, -far / r1


def unipc(path: Path, most: int) -> Factors:
    """UniPC with B2(h) and its corrector (arXiv 2302.04867), as diffusers' UniPCMultistepScheduler on the data prediction.

    Once x0 is known at a timestep, the corrector replaces the state there, which the predictor left: both are the same state
    of the timestep before, moved by weighted x0. So the corrected state is x plus weighted x0, and one row holds both.
    """
    before = 1
    for i in range(path.steps):
        order = min(most, i + 1, path.steps - i)
        weights = [path.whole(i) * w for w in unified(path, i, order)]
        if i > 0:
            predicted, corrected = [0.0, *unified(path, i - 1, before)], unified(path, i - 1, before, corrector=True)
            moved = [path.ratio(i) * path.whole(i - 1) * (c - p) for c, p in zip(corrected, predicted, strict=True)]
            weights = [sum(both) for both in itertools.zip_longest(weights, moved, fillvalue=0.0)]
        yield path.ratio(i), tuple(weights)
        before = order


def unified(path: Path, i: int, order: int, corrector: bool = False) -> list[float]:
    """Weights, of sum 1, of the x0 that step i is taken with: of its own timestep and those before it, last first; of the
    corrector, that of the timestep after it comes first."""
    now, after = path.lam[i : i + 2]
    r = [1.0] * corrector + [(lam - now) / (after - now) for lam in reversed(path.lam[i - order + 1 : i])]
    if order == 1 + (not corrector):
        rho = [0.5] * len(r)  # diffusers', and the authors', simplified forms
    else:
        rho = np.linalg.solve(np.vander(r, increasing=True).T, moments(now - after, len(r))) if r else []
    earlier = [float(p / distance) for p, distance in zip(rho, r, strict=True)]
    own = 1 - sum(earlier)
    return [earlier[0], own, *earlier[1:]] if corrector else [own, *earlier]


def moments(hh: float, count: int) -> list[float]:
    """n! phi_(n+1)(hh) hh / B(hh) for n = 1 to count, B(hh) = e^hh - 1 (ibid., eq. 8 and its B2)."""
    found, phi, factorial = [], math.expm1(hh) / hh - 1, 1
    for n in range(1, count + 1):
        found.append(phi * factorial / math.expm1(hh))
        factorial *= n + 1
        phi = phi / hh - 1 / factorial
    return found


# ---- DEIS and iPNDM: polynomials of the noise, which depends on the states before ----

def of_noise(path: Path, weigh: Callable[[Path, int], Sequence[float]]) -> Factors:
    """A solver whose step is x_next = (alpha_next / alpha) x + sum_k w_k noise_k, over this step's noise and those before it.

    weigh(path, i): w, last noise first. The noise of step k is (x_k - alpha_k x0_k) / sigma_k. Seen from step i, it is
    x / sigma_i plus weighted x0 of the steps so far: every step changes x by a known ratio and known weights.
    """
    noises: list[np.ndarray] = []  # last first, each the weights of x0_0, x0_1, ... beside x / sigma
    for i in range(path.steps):
        noises.insert(0, -path.alpha[i] / path.sigma[i] * np.eye(path.steps)[i])
        if i == 0:
            b = np.eye(path.steps)[0] * path.whole(0)  # of order 1 in the form that needs no signal
        else:
            b = sum(w * noise for w, noise in zip(weigh(path, i), noises, strict=False))
        yield path.ratio(i), tuple(b[i::-1].tolist())
        if path.sigma[i + 1]:
            noises = [noise - b / path.sigma[i + 1] for noise in noises]


def deis_weights(path: Path, i: int, most: int) -> list[float]:
    """DEIS in log rho (tAB-DEIS, arXiv 2204.13902), as diffusers' DEISMultistepScheduler: alpha_next times the integral over
    rho = sigma / alpha of each Lagrange polynomial of log rho. With v = log(rho / rho_i), rho = rho_i e^v, the integral of
    e^v f(v) is e^v (f - f' + f'' - ...)."""
    order, v = path.order(i, most), path.lam[i] - path.lam[i + 1]
    nodes = [path.lam[i] - lam for lam in reversed(path.lam[i - order + 1 : i + 1])]
    found = []
    for k, node in enumerate(nodes):
        others = np.array(nodes[:k] + nodes[k + 1:])
        f = np.poly1d(others, r=True) / np.prod(node - others)
        primitive = sum(((-1) ** j * f.deriv(j) for j in range(order)), np.poly1d([0]))
        found.append(path.alpha[i + 1] * path.sigma[i] / path.alpha[i] * (math.exp(v) * primitive(v) - primitive(0)))
    return found


def ipndm_weights(path: Path, i: int) -> list[float]:
    """Adams-Bashforth weights of the last four noises (arXiv 2204.13902, eq. 38), as diffusers' IPNDMScheduler, times what a
    DDIM step makes of the noise."""
    adams = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))[min(i, 3)]
    level = path.sigma[i + 1] - path.alpha[i + 1] / path.alpha[i] * path.sigma[i]
    return [level * w for w in adams]


FORMULAS: dict[str, Callable[[Path], Factors]] = {
    "ddim": ddim,
    "dpm2m": functools.partial(dpm, most=2),
    "dpm3m": functools.partial(dpm, most=3),
    "unipc": functools.partial(unipc, most=2),
    "unipc3": functools.partial(unipc, most=3),
    "deis": functools.partial(of_noise, weigh=functools.partial(deis_weights, most=2)),
    "deis3": functools.partial(of_noise, weigh=functools.partial(deis_weights, most=3)),
    "ipndm": functools.partial(of_noise, weigh=ipndm_weights),
}
SOLVERS = tuple(FORMULAS)                        # that compressed models are sampled by
KNOWN = (*SOLVERS, "learned", "ddim_diffusers")  # of a recipe; the last one is the dense model's


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


def remembered(steps: Sequence[SolverStep], like: Tensor, labels: Tensor | None) -> deque:
    """For the x0 of the steps before, last first: it holds as many as some step reads, now that of the opening, if there is
    one. like: a tensor of the images' shape."""
    earlier, opening = deque(maxlen=max(len(step.b) for step in steps) - 1), steps[0].opening
    if opening is not None:
        earlier.appendleft(opening.known(like, labels))
    return earlier


def begun(steps: Sequence[SolverStep], noise: Tensor, labels: Tensor | None) -> Tensor:
    """x at the first row's time."""
    return noise if steps[0].opening is None else steps[0].opening(noise, labels)


def integrate(predict: Predict, steps: Sequence[SolverStep], noise: Tensor, labels: Tensor | None,
              clip: Clip) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, x before it, x0 predicted in it); with the last step, instead of x0, the sample: x after it."""
    x, earlier = begun(steps, noise, labels), remembered(steps, noise, labels)
    times = torch.tensor([s.t for s in steps], dtype=torch.float32, device=x.device)[:, None].repeat(1, len(x))
    for i, (s, t) in enumerate(zip(steps, times, strict=True)):
        following, x0 = advance(s, x, predict(x, t, labels, i), earlier, clip)
        yield i, x, x0 if i + 1 < len(steps) else following
        x = following
        earlier.appendleft(x0)


def final(predict: Predict, steps: Sequence[SolverStep], noise: Tensor, labels: Tensor | None, clip: Clip) -> Tensor:
    """Where the trajectory ends, NCHW. A network that has a way of its own to run a whole one, `sample`, takes that."""
    whole = getattr(predict, "sample", None)
    if whole is not None:
        return whole(steps, noise, labels, clip)
    # nothing of a step outlives the next one, so the small tensors of all of them stay in the CPU's caches
    [(_, _, images)] = deque(integrate(predict, steps, noise, labels, clip), maxlen=1)
    return images


def clip_bound(scheduler_config: dict) -> Clip:
    """Pixel models clip x0 as their scheduler says (diffusers' default: 1.0); latent models set `clip_sample: false`."""
    config = scheduler_config
    if config.get("thresholding", False):
        return Thresholding(config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0))
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", True) else None


def guided_steps(steps: Sequence[SolverStep], scale: float, clip: Clip) -> list[SolverStep]:
    """The rows that go with `with_guidance`: what an opening knows is guided, too."""
    first, *rest = steps
    if scale == 1.0 or first.opening is None:
        return list(steps)
    return [replace(first, opening=first.opening.guided(scale, clip)), *rest]


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
