"""SIGKILL in the middle of distillation: the next run goes on from the checkpoint and ends where an undisturbed one does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import build
from tasks.distill.images import Images
from tasks.distill.settings import Settings
from tasks.distill.train import Student, train
from tests.unit.distill.toy import two_four

KEY, STEPS = "distill-kill-test", 200
SETTINGS = Settings(steps=STEPS, batch=4, accumulate=1, lr=1e-3, warmup=10, weight_decay=0.01, ema_decay=0.99, sr_ste=2e-4,
                    decay="gradient", prune_at=(0.5,), freeze_at=1.0, precondition=0.0, data=1.0, lam=0.1, features=0.0,
                    bank_share=0.0, label_dropout=0.1, bf16=False, log_every=30, seed=0)
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 1,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_elementwise_affine": False,
       "norm_type": "ada_norm_zero"}


def job(folder: Path) -> Student:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = build("DiTTransformer2DModel", DIT, {"num_train_timesteps": 50})
        pixels = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    teacher.model.eval().requires_grad_(False)
    masks = two_four({name: layer for name, layer in teacher.prunable_layers().items() if ".ff." in name})
    images = Images(pixels=pixels, labels=torch.arange(16) % 3, real=16)
    return train(teacher, masks, "2:4", "sr_ste", images, SETTINGS, Checkpoint(folder, KEY, every_s=0.1))


def killed_after_first_checkpoint(folder: Path) -> int:
    """-> the step of the checkpoint that a killed process left."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, __file__, str(folder)], env=environment, stdout=subprocess.DEVNULL)
    checkpoint = Checkpoint(folder, KEY)
    deadline = time.monotonic() + 120
    while not checkpoint.path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return checkpoint.load()["step"]


def test_killed_and_resumed_equals_undisturbed(tmp_path):
    assert 0 < killed_after_first_checkpoint(tmp_path / "killed") < STEPS
    resumed, undisturbed = job(tmp_path / "killed"), job(tmp_path / "undisturbed")
    assert resumed.curve == undisturbed.curve
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in undisturbed.weights.items())
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in undisturbed.masks.items())


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the tests run
    job(Path(sys.argv[1]))
