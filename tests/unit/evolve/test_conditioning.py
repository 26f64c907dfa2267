"""What timestep and label decide is computed once, and images are the same bit for bit."""

from dataclasses import replace

import pytest
import torch

from tasks.core.denoiser import build
from tasks.core.recipe import Recipe
from tasks.core.sampler import sample_in_chunks
from tasks.evolve.conditioning import remembered
from tasks.evolve.fitness import live
from tasks.evolve.prefix import Predictions
from tasks.pretrain_load.architectures import SCHEDULE, dit, unet
from tasks.runtime.precision import calibrate_ranges


@pytest.fixture(params=["dit", "unet"])
def denoiser(request):
    torch.manual_seed(0)
    which = {"dit": ("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=2, heads=2, patch=2)),
             "unet": ("UNet2DModel", unet(8, 1, width=8))}
    made = build(*which[request.param], SCHEDULE)
    for parameter in made.model.parameters():  # adaLN-Zero begins as the identity: without this no timestep would matter
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    made.model.eval().requires_grad_(False)
    return made


def images(denoiser, recipe, ranges, parts=(), store=None):
    def chunks(predict):
        return torch.cat([torch.from_numpy(chunk) for chunk in sample_in_chunks(
            predict, denoiser.schedule, recipe, denoiser.sample_shape, 7, 3, denoiser.num_classes, chunk=4)])

    with live(denoiser, recipe, ranges) as predict:
        if store is None:
            return chunks(predict)
        with remembered(predict, denoiser.model, parts, "teacher", recipe.precision, store) as predict:
            return chunks(predict)


def test_images_are_the_same_and_only_what_is_new_is_computed(denoiser):
    labels = torch.arange(32) % 4 if denoiser.num_classes else None
    x, t = torch.randn(32, *denoiser.sample_shape), torch.randint(0, 1000, (32,))
    ranges, parts = calibrate_ranges(denoiser.model, [(x, t, labels)]), denoiser.conditioning()
    low = dict.fromkeys(ranges, "w4a5")
    embedder = next(layers[0] for layers in parts.values())
    base = Recipe(timesteps=(900, 600, 300), precision=low)
    store, sizes = Predictions(1 << 20), []
    elsewhere = {layer: "w8a8" for layer in ("proj_out_2", "conv_in") if layer in ranges}
    recipes = (base, replace(base, timesteps=(900, 300)), replace(base, precision=low | elsewhere),
               replace(base, timesteps=(900, 500)), replace(base, precision=low | {embedder: "w8a8"}))
    for recipe in recipes:
        assert torch.equal(images(denoiser, recipe, ranges, parts, store), images(denoiser, recipe, ranges)), recipe
        sizes.append(len(store.kept))
    touched = sum(embedder in layers for layers in parts.values())
    assert sizes == [3 * len(parts)] * 3 + [4 * len(parts), 4 * len(parts) + 3 * touched], "labels of both chunks are the same"


def test_every_layer_that_decides_is_named_and_nothing_is_left(denoiser):
    """A module's output moves with each of its layers' weights, and with no other layer's."""
    x, labels = torch.randn(2, *denoiser.sample_shape), torch.tensor([0, 3]) if denoiser.num_classes else None

    def outputs():
        found = {}
        modules = {name: denoiser.model.get_submodule(name) for name in parts}
        hooks = [module.register_forward_hook(lambda *args, name=name: found.update({name: args[2]}))
                 for name, module in modules.items()]
        denoiser(x, torch.tensor([500, 500]), labels)
        for hook in hooks:
            hook.remove()
        return found

    parts, layers = denoiser.conditioning(), denoiser.prunable_layers()
    before = outputs()
    for name, layer in layers.items():
        kept = layer.weight.data
        layer.weight.data = kept + 0.1
        moved = {part for part, out in outputs().items() if not torch.equal(out, before[part])}
        layer.weight.data = kept
        assert moved == {part for part, deciding in parts.items() if name in deciding}, name
    with remembered(denoiser, denoiser.model, parts, "teacher", {}, Predictions(0)):
        assert all("forward" in vars(denoiser.model.get_submodule(name)) for name in parts)
    assert not any("forward" in vars(denoiser.model.get_submodule(name)) for name in parts)
