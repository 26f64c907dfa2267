"""The pipeline that a package ships: a compressed model in plain diffusers, without this repository.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipe(class_labels=[3, 7], generator=torch.Generator().manual_seed(0)).images

Imports only torch, diffusers and its sibling, which diffusers copies along with it. The network, its masks, cache and
precision are the component in `denoiser/` (`packed.py`). Two packages written by different versions belong in two processes:
diffusers keeps the sibling modules of the first one.
"""

import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .solver import KNOWN, clip_bound, guided_steps, integrate, recipe_steps, with_guidance


class CompressedPipeline(DiffusionPipeline):
    """Samples as the package's recipe says: its solver, timesteps, cache plan and bit-widths are part of the model.

    denoiser: a `PackedDenoiser`. scheduler: kept for its config (noise schedule, prediction type, clipping); its own steps
    are not used, the solver's coefficients are precomputed from it.
    """

    def __init__(self, denoiser: torch.nn.Module, scheduler):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        denoiser.check_recipe(KNOWN, scheduler.config)

    @property
    def recipe(self) -> dict:
        """`recipe.json` as read."""
        return self.denoiser.recipe

    @torch.inference_mode()
    def __call__(self, batch_size: int | None = None, class_labels: list[int] | torch.Tensor | None = None,
                 generator: torch.Generator | list[torch.Generator] | None = None, guidance_scale: float = 1.0,
                 noise: torch.Tensor | None = None, output_type: str = "pil", return_dict: bool = True):
        """Sample images.

        batch_size: defaults to the number of labels, of noise images, or 1. class_labels: one a sample; a conditional
        model without labels draws unconditional samples. noise: (N, C, H, W) standard normal, drawn from `generator` if
        None. output_type: pil | np (NHWC in [0, 1]) | pt (NCHW in [0, 1]) | latent (NCHW as the solver leaves it, [-1, 1]).
        Raises ValueError for labels outside the model's classes, for sizes that disagree, for a recipe that means nothing and
        for images that are not finite, which would be black.
        """
        device = self._execution_device
        count = agreed_count(batch_size, class_labels, noise)
        labels = self.denoiser.labels(class_labels, count, device)
        if noise is None:
            noise = randn_tensor((count, *self.denoiser.sample_shape), generator=generator, device=device)
        config = dict(self.scheduler.config)
        self.denoiser.check_recipe(KNOWN, config)
        clip = clip_bound(config)
        steps = guided_steps(recipe_steps(config, self.recipe), guidance_scale, clip)
        null_label = 0 if guidance_scale == 1.0 else self.denoiser.null_label
        predict = with_guidance(self.denoiser, guidance_scale, null_label)
        with self.progress_bar(total=len(steps)) as bar:
            for _, _, state in integrate(predict, steps, noise.to(device), labels, clip):
                bar.update()
                image = state
        if not image.isfinite().all():
            raise ValueError(f"{self.denoiser.source}: an image is not finite: some number or weight is too large")
        images = self.image_processor.postprocess(image, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | Path, **unsupported) -> None:
        """Copy the package's files: its weights are frozen, so what is saved is what was opened.

        Raises ValueError for any of diffusers' options (another dtype, shards, pickle): they would need another package.
        """
        if unsupported:
            raise ValueError(f"save_pretrained: {', '.join(sorted(unsupported))} not supported; a package is copied as it is")
        shutil.copytree(self.name_or_path, save_directory, dirs_exist_ok=True, copy_function=copy_aside)


def copy_aside(source: str, target: str) -> str:
    """A copy that is renamed into place: whoever reads the old file, a compiled graph among them, goes on reading it."""
    partial = f"{target}.partial"
    shutil.copy2(source, partial)
    return shutil.move(partial, target)


def agreed_count(batch_size: int | None, labels: list[int] | torch.Tensor | None, noise: torch.Tensor | None) -> int:
    """The number of samples that every given argument speaks of; 1 if none does."""
    counts = {"batch_size": batch_size, "class_labels": labels if labels is None else len(labels),
              "noise": noise if noise is None else len(noise)}
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"sizes disagree: {', '.join(f'{name} {count}' for name, count in given.items())}")
    return next(iter(given.values()), 1)
