"""Few-step students where the teacher is on a GPU: `pytest -m gpu tests/gpu`."""

import pytest
import torch

from tasks.core.checkpoint import Checkpoint
from tasks.core.learned import LearnedSolver, opened, opening_images
from tasks.core.sampler import spaced_timesteps
from tasks.core.unroll import train_along
from tasks.runtime.solver import solver_steps
from tests.unit.core.test_learned import HOW, Net, denoiser, pairs

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_student_is_trained_there(tmp_path):
    there, here = denoiser(), denoiser()
    there.model.to("cuda")
    (images, spread), (wanted, same) = (opening_images(one, 4, 1) for one in (there, here))
    torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-3)
    assert spread == pytest.approx(same, rel=1e-2)
    steps = solver_steps(there.schedule.config, spaced_timesteps(there.schedule, 3), "dpm2m")
    some, held = pairs(there).split(4)
    found = train_along(there, LearnedSolver(there.schedule, opened(there.schedule, steps, images)), some, held,
                        Net().requires_grad_(False).to("cuda"), HOW, Checkpoint(tmp_path, "key"), "test")
    assert found.loss <= found.start_loss and {weight.device.type for weight in found.weights.values()} == {"cpu"}
    assert len(found.solver.rows()) == 2
