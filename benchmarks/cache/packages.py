"""Other people's caches under our sampling loop: theirs is the model call, ours are the solver, the list and the noise.

Every function takes a denoiser of its own to patch, the recipe whose steps it will take, and the package's own settings.
-> predict(x, t, labels, step); step 0 starts a new trajectory. The packages are imported inside: only the opponents'
environment has them all.
"""

import contextlib
import io
import json
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from tasks.core.denoiser import Denoiser
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, sample
from tasks.runtime.solver import Predict

CALIBRATION = range(16)     # samples of MagCache's calibration run
CALIBRATION_SEED = 271_828  # of their noise: other noise than any that is judged


# ---- diffusers' own hooks ----

def hooked(denoiser: Denoiser, config: object) -> Predict:
    """As a diffusers pipeline does it: state reset before a trajectory, every call in a cache context.

    DiTTransformer2DModel and UNet2DModel lack the mixin that has `enable_cache`, so an instance is given it.
    """
    from diffusers.hooks import HookRegistry
    from diffusers.models.cache_utils import CacheMixin
    model = denoiser.model
    model.__class__ = type(type(model).__name__, (type(model), CacheMixin), {})
    model.enable_cache(config)
    registry = HookRegistry.check_if_exists_or_initialize(model)

    def predict(x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        if step == 0:
            registry.reset_stateful_hooks()
        with model.cache_context("only"):
            return denoiser(x, t, labels)

    return predict


def first_block(denoiser: Denoiser, recipe: Recipe, *, threshold: float) -> Predict:
    from diffusers.hooks import FirstBlockCacheConfig
    return hooked(denoiser, FirstBlockCacheConfig(threshold=threshold))


def mag(denoiser: Denoiser, recipe: Recipe, *, threshold: float) -> Predict:
    """MagCache, calibrated for these steps first, as its documentation says: the ratios that a run prints are copied."""
    from diffusers.hooks import MagCacheConfig
    steps, shape = recipe.nfe, denoiser.sample_shape
    calibrating = hooked(denoiser, MagCacheConfig(num_inference_steps=steps, calibrate=True))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        sample(calibrating, denoiser.schedule, recipe, initial_noise(shape, CALIBRATION, CALIBRATION_SEED),
               labels_for(CALIBRATION, denoiser.num_classes))
    ratios = json.loads(said.getvalue().strip().splitlines()[-1])
    denoiser.model.disable_cache()
    return hooked(denoiser, MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=ratios))


def pab(denoiser: Denoiser, recipe: Recipe, **settings) -> Predict:
    """Pyramid Attention Broadcast; its range of timesteps is open at both ends."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig
    now = SimpleNamespace(timestep=None)
    predict = hooked(denoiser, PyramidAttentionBroadcastConfig(
        **settings, spatial_attention_block_identifiers=("block",), current_timestep_callback=lambda: now.timestep))

    def clocked(x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        now.timestep = recipe.timesteps[step]
        return predict(x, t, labels, step)

    return clocked


def taylorseer(denoiser: Denoiser, recipe: Recipe, *, cache_interval: int, max_order: int, sublayers: tuple[str, ...],
               start: float | None = None) -> Predict:
    """sublayers: patterns of their paths; by default it would match none of a DiT's and do nothing. start: share of the steps
    before which nothing is cached; None: the package's default, 3 steps."""
    from diffusers.hooks import TaylorSeerCacheConfig
    later = {} if start is None else {"disable_cache_before_step": round(start * recipe.nfe)}
    return hooked(denoiser, TaylorSeerCacheConfig(cache_interval=cache_interval, max_order=max_order, **later,
                                                  cache_identifiers=list(sublayers), taylor_factors_dtype=torch.float32))


# ---- packages ----

def dbcache(denoiser: Denoiser, recipe: Recipe, *, taylorseer_order: int = 0, **settings) -> Predict:
    """cache-dit's DBCache, with TaylorSeer's forecast of the cached residual where an order is given.

    It counts calls and would notice the next trajectory a step late, one step later each time, so it is told.
    """
    import cache_dit
    calibrator = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=taylorseer_order)}
    cache_dit.enable_cache(denoiser.model, cache_config=cache_dit.DBCacheConfig(**settings, num_inference_steps=recipe.nfe),
                           **(calibrator if taylorseer_order else {}))

    def predict(x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        if step == 0:
            cache_dit.refresh_context(denoiser.model)
        return denoiser(x, t, labels)

    return predict


def deepcache(denoiser: Denoiser, recipe: Recipe, *, cache_interval: int, cache_branch_id: int) -> Predict:
    """DeepCache takes a pipeline, of which it looks at the UNet and the scheduler's list, and one timestep for all images."""
    from DeepCache import DeepCacheSDHelper
    model = denoiser.model
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=model, scheduler=SimpleNamespace(
        timesteps=torch.tensor(recipe.timesteps))))
    helper.set_params(cache_interval=cache_interval, cache_branch_id=cache_branch_id)
    helper.enable()
    return lambda x, t, labels, step: model(x, t[0], return_dict=False)[0][:, : x.shape[1]]


PACKAGES: dict[str, Callable[..., Predict]] = {f.__name__: f for f in (first_block, mag, pab, taylorseer, dbcache, deepcache)}
