"""Models small enough to trace in a second, one of each architecture."""

import pytest
import torch

from tasks.core.denoiser import build
from tasks.pretrain_load.architectures import SCHEDULE, dit, unet


@pytest.fixture(scope="module", params=["dit", "unet"])
def tiny_denoiser(request):
    """With random weights; a test leaves it as it found it."""
    torch.manual_seed(0)
    if request.param == "dit":
        made = build("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=2, heads=2, patch=2), SCHEDULE)
    else:
        made = build("UNet2DModel", unet(8, 1, width=8), SCHEDULE)
    made.model.eval().requires_grad_(False)
    return made


@pytest.fixture(scope="session")
def tiny_states():
    """(denoiser, n, seed) -> x, t, labels."""
    def states(denoiser, n, seed):
        rng = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, denoiser.num_classes, (n,), generator=rng) if denoiser.num_classes else None
        return torch.randn(n, *denoiser.sample_shape, generator=rng), torch.randint(0, 1000, (n,), generator=rng), labels
    return states
