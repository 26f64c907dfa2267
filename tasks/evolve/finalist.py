"""The search has its caches from a table that serves any list; its finalist's plan learns weights for its own list."""

from collections.abc import Mapping
from dataclasses import replace

from tasks.cache_learn.forecast import Reference, fit, train
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for


def with_learned_weights(recipe: Recipe, denoiser: Denoiser, learn: Mapping, first: int, seed: int,
                         checkpoint: Checkpoint) -> Recipe:
    """The recipe, its cache plan with weights learned on the denoiser's uncached run in fp32.

    learn: `learn` of cache_learn's grid.json, how that stage learned. first, seed: of the noises.
    """
    how = dict(learn)
    images = range(first, first + how.pop("images"))
    reference = Reference.of(denoiser, Recipe(**recipe.sampling), recipe.cache.sublayers,
                             initial_noise(denoiser.sample_shape, images, seed), labels_for(images, denoiser.num_classes))
    plan, _ = train(fit(recipe.cache, reference)[0], reference, **how, checkpoint=checkpoint)
    return replace(recipe, cache=plan)
