"""Which of diffusers' schedulers a teacher may come with, and the noise schedule that is read from its config.

A network is taken if noise was added to its images by betas (variance preserving), as discrete timesteps count them. All that
follows, packages included, reads a config of diffusers' DDIMScheduler: `ddim_config` translates those of other classes. What
is not honoured exactly is refused by name (docs/schedulers.md).
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")  # timestep_spacing, as diffusers' DDIMScheduler has them
TAKEN = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler",
         "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler",
         "UniPCMultistepScheduler", "SASolverScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
         "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
         "RePaintScheduler", "UnCLIPScheduler")
STAND_INS = {"DPMSolverSDEScheduler": "KDPM2DiscreteScheduler"}  # equal options and defaults, without the package torchsde
QUICK = dict.fromkeys(("DPMSolverSDEScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
                      "LMSDiscreteScheduler")  # equal betas, built in a thousandth of the time
FORWARD = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
# Options that place the steps, or end them, in a way that no timestep list of ours does: key -> the value that is taken
PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
         "use_flow_sigmas": False, "use_dynamic_shifting": False, "final_sigmas_type": "zero", "timestep_type": "discrete",
         "lambda_min_clipped": -math.inf, "sigma_min": None, "sigma_max": None, "shift_terminal": None}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2) in discrete time, and what the network predicts."""

    alphas_cumprod: Tensor  # (T,) fp32
    prediction_type: str    # epsilon | v_prediction | sample
    config: dict            # of a diffusers DDIMScheduler; of the teacher's own, as read, if it is one
    origin: str = "DDIMScheduler"  # the class that the config was read of

    @classmethod
    def from_config(cls, config: Mapping, where: str | Path = "scheduler_config.json") -> "Schedule":
        """config: of a scheduler of diffusers, of a DDIMScheduler if it has no `_class_name`. where: what messages call it.

        Raises ValueError with the key, its value and what is taken, for a class or an option that is not honoured.
        """
        from diffusers import DDIMScheduler
        found = ddim_config(config, str(where))
        bars = DDIMScheduler.from_config(found).alphas_cumprod.float()
        kind = found.get("prediction_type", "epsilon")
        check_noise(bars, kind, found, str(where))
        return cls(alphas_cumprod=bars, prediction_type=kind, config=found, origin=config.get("_class_name", "DDIMScheduler"))

    @classmethod
    def read(cls, path: Path, config: Mapping, named: str | None) -> "Schedule":
        """Of the config at `path`; named: the class that `model_index.json` opens it with, if there is one."""
        own = config.get("_class_name") or named
        if own is None:
            raise ValueError(f"{path}: _class_name: missing, and model_index.json names no scheduler; "
                             f"taken: {', '.join(TAKEN)}")
        found = cls.from_config({**config, "_class_name": own}, path)
        if named not in (None, own) and not found.equals(cls.from_config({**config, "_class_name": named}, path)):
            raise ValueError(f"{path}: _class_name: {own!r}, but model_index.json names {named!r}, which reads it as another "
                             "noise schedule")
        return found

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def dense_sampling(self) -> str:
        """How the dense teacher samples, in words."""
        options = parameters_of("DDIMScheduler") | self.config
        clipped = f"clipped to {options['clip_sample_range']:g}" if options["clip_sample"] else "not clipped"
        kept = "thresholded" if options["thresholding"] else clipped
        other = "" if self.origin == "DDIMScheduler" else f", in place of {self.origin}"
        return f"DDIM (eta 0), spacing {options['timestep_spacing']}, x0 {kept}{other}"

    def equals(self, other: "Schedule") -> bool:
        """Whether both sample alike: an option that one of the configs leaves out has DDIM's default."""
        defaults = parameters_of("DDIMScheduler") | {"_class_name": "DDIMScheduler"}
        return torch.equal(self.alphas_cumprod, other.alphas_cumprod) and (defaults | self.config) == (defaults | other.config)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each (N, 1, 1, 1)."""
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.coefficients(t)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to predict."""
        alpha, sigma = self.coefficients(t)
        return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[self.prediction_type]


# ---- from any class to DDIM's ----

def ddim_config(config: Mapping, where: str) -> dict:
    """The config of the DDIMScheduler with the same betas, spacing and clipping: what diffusers' DDIMPipeline makes of it.

    What the config leaves out has its own class's default. Options that the class does not have are DDIM's: x0 is clipped to
    [-1, 1] unless the config says `clip_sample: false`. Keys that no DDIMScheduler has are dropped. Raises ValueError.
    """
    name = config.get("_class_name", "DDIMScheduler")
    if name not in TAKEN:
        raise ValueError(f"{where}: _class_name: {name!r} is not a scheduler whose noise schedule is taken; taken (noise by "
                         f"betas): {', '.join(TAKEN)}")
    own, ddim = parameters_of(name), parameters_of("DDIMScheduler")
    check_options({key: config.get(key, own.get(key, default)) for key, default in ddim.items()}, where)
    check_own(config, name, own, where)
    betas = betas_of(config, name, own, where)
    defaults = {} if name == "DDIMScheduler" else {key: value for key, value in own.items() if key in ddim}
    found = defaults | {key: value for key, value in config.items() if key in ddim}
    return {"_class_name": "DDIMScheduler", **with_betas(found, betas)}


def parameters_of(name: str) -> dict[str, Any]:
    """The options of a scheduler's class and their defaults."""
    import diffusers
    found = inspect.signature(getattr(diffusers, STAND_INS.get(name, name)).__init__).parameters
    return {key: parameter.default for key, parameter in found.items() if parameter.default is not inspect.Parameter.empty}


def betas_of(config: Mapping, name: str, own: Mapping, where: str) -> Tensor:
    """(T,) as the class itself computes them, before they are rescaled to zero terminal SNR."""
    import diffusers
    wanted = {key: config.get(key, own[key]) for key in FORWARD if key in own and key != "rescale_betas_zero_snr"}
    try:
        return getattr(diffusers, QUICK.get(name, name))(**wanted).betas
    except (NotImplementedError, ValueError):
        raise ValueError(f"{where}: beta_schedule: {config.get('beta_schedule')!r} is none that diffusers' {name} computes; "
                         "taken: one that it does, or trained_betas") from None


def with_betas(config: dict, betas: Tensor) -> dict:
    """The config, with `trained_betas` where a DDIMScheduler does not compute these from the other keys."""
    from diffusers import DDIMScheduler
    try:
        same = torch.equal(DDIMScheduler(**{key: config[key] for key in FORWARD[:-1] if key in config}).betas, betas)
    except NotImplementedError:
        same = False
    return config if same else {**config, "trained_betas": betas.tolist()}


# ---- what is refused ----

def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_betas(value: Any) -> bool:
    return value is None or isinstance(value, list) and all(is_number(beta) and 0 <= beta <= 1 for beta in value)


OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": (lambda v: type(v) is int and 4 <= v <= 100_000, "a whole number between 4 and 100000"),
    "beta_start": (lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "beta_end": (lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "beta_schedule": (lambda v: isinstance(v, str), "a name"),
    "trained_betas": (is_betas, "null or a list of numbers between 0 and 1"),
    "rescale_betas_zero_snr": (lambda v: isinstance(v, bool), "true or false"),
    "prediction_type": (lambda v: v in PREDICTIONS, f"one of {', '.join(PREDICTIONS)}"),
    "clip_sample": (lambda v: isinstance(v, bool), "true or false"),
    "clip_sample_range": (lambda v: is_number(v) and v > 0, "a number above 0"),
    "thresholding": (lambda v: isinstance(v, bool), "true or false"),
    "dynamic_thresholding_ratio": (lambda v: is_number(v) and 0 <= v <= 1, "a number between 0 and 1"),
    "sample_max_value": (lambda v: is_number(v) and v > 0, "a number above 0"),
    "set_alpha_to_one": (lambda v: isinstance(v, bool), "true or false"),
    "steps_offset": (lambda v: type(v) is int and v >= 0, "a whole number from 0 to below half of num_train_timesteps"),
    "timestep_spacing": (lambda v: v in SPACINGS, f"one of {', '.join(SPACINGS)}"),
}


def check_options(options: Mapping, where: str) -> None:
    """options: those of a DDIMScheduler, all of them."""
    for key, (taken, words) in OPTIONS.items():
        if not taken(options[key]):
            raise ValueError(f"{where}: {key}: {shown(options[key])} is not {words}")
    betas, steps, offset = (options[key] for key in ("trained_betas", "num_train_timesteps", "steps_offset"))
    if 2 * offset >= steps:
        raise ValueError(f"{where}: steps_offset: {offset} is not below half of num_train_timesteps, {steps}")
    if betas is not None and len(betas) != steps:
        raise ValueError(f"{where}: num_train_timesteps: {steps}, but trained_betas has {len(betas)}")


def check_own(config: Mapping, name: str, own: Mapping, where: str) -> None:
    """Options of the class that no DDIM has, and those that change the noise but that the class does not know."""
    for key, value in PLAIN.items():
        given = config.get(key, value)
        if key in own and given != value and (given or value is not False):
            raise ValueError(f"{where}: {key}: {shown(config[key])} is not honoured; taken: {value}")
    if config.get("predict_epsilon") is False and "prediction_type" not in config:  # of diffusers before 0.10
        raise ValueError(f"{where}: predict_epsilon: False, which diffusers no longer reads; taken: prediction_type: sample")
    for key, value in {"rescale_betas_zero_snr": False, "trained_betas": None, "prediction_type": "epsilon"}.items():
        if key not in own and config.get(key, value) != value:
            raise ValueError(f"{where}: {key}: {shown(config[key])}, an option that {name} does not have; taken: {value}")


def check_noise(bars: Tensor, kind: str, config: Mapping, where: str) -> None:
    """alphas_cumprod falls from 1 or less to 0 or more; at 0 there is no signal, so that no noise can be told from it."""
    key = next((key for key in ("trained_betas", "rescale_betas_zero_snr") if config.get(key)), "beta_schedule")
    value = shown(config.get(key, "linear"))
    rises = (bars[1:] >= bars[:-1]).nonzero()
    if len(rises) or not torch.isfinite(bars).all():
        t = int(rises[0]) + 1 if len(rises) else 0
        raise ValueError(f"{where}: {key}: {value}: alphas_cumprod does not fall at timestep {t} of {len(bars)}; taken: betas "
                         "above 0 that leave some signal")
    if bars[-1] == 0 and kind == "epsilon":
        raise ValueError(f"{where}: {key}: {value} leaves no signal at timestep {len(bars) - 1}, where prediction_type epsilon "
                         "says nothing of the image; taken: v_prediction or sample")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
