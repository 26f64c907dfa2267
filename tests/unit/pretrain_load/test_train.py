"""Training from scratch: it learns, and a resumed run is the undisturbed one to the bit."""

import pytest
import torch

from tasks.core.checkpoint import Checkpoint
from tasks.core.training import draw_batch, stratified_timesteps, warmup_cosine
from tasks.pretrain_load.stage import build
from tasks.pretrain_load.train import optimisers, train

HOW = {"batch": 8, "lr": 3e-3, "muon_lr": 0.0, "warmup": 5, "weight_decay": 0.0, "ema_decay": 0.99,
       "label_dropout": 0.1, "bf16": False, "seed": 1}
SHAPE = {"architecture": "dit", "width": 16, "depth": 1, "heads": 2, "patch": 4}


def tiny():
    torch.manual_seed(0)
    return build(SHAPE, 8, 1, 2)


@pytest.fixture
def images():
    """Two classes: all dark, all bright."""
    labels = torch.arange(16) % 2
    return (labels * 2.0 - 1).view(-1, 1, 1, 1).expand(16, 1, 8, 8).clone(), labels


class Killed(Exception):
    pass


class KilledAt(Checkpoint):
    """Dies, as a process would, just after the checkpoint of one step."""

    def save(self, state):
        super().save(state)
        if state["step"] == 20:
            raise Killed


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_a_resumed_run_equals_an_undisturbed_one(images, tmp_path, muon_lr):
    how = HOW | {"muon_lr": muon_lr}
    undisturbed, curve = train(tiny(), *images, steps=40, **how, checkpoint=Checkpoint(tmp_path / "a", "k" * 16, every_s=1e9))
    with pytest.raises(Killed):
        train(tiny(), *images, steps=40, **how, checkpoint=KilledAt(tmp_path / "b", "k" * 16, every_s=0))
    resumed, again = train(tiny(), *images, steps=40, **how, checkpoint=Checkpoint(tmp_path / "b", "k" * 16, every_s=1e9))
    assert curve == again
    for (name, one), two in zip(undisturbed.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_it_learns(images, tmp_path):
    _, curve = train(tiny(), *images, steps=150, **HOW, checkpoint=Checkpoint(tmp_path, "k" * 16, every_s=1e9))
    assert curve[-1][1] < 0.6  # the velocity has unit variance here: a network that says nothing scores 1


def test_muon_trains_the_matrices_of_attentions_and_feed_forwards_and_adamw_the_rest():
    model = tiny().model
    adamw, muon = optimisers(model, 1e-3, 0.02, 0.0)
    block = model.transformer_blocks[0]
    linears = [layer for part in (block.attn1, block.ff) for layer in part.modules() if isinstance(layer, torch.nn.Linear)]
    wanted, total = {id(layer.weight) for layer in linears}, {id(value) for value in model.parameters()}
    by_muon, by_adamw = ({id(value) for value in one.param_groups[0]["params"]} for one in (muon, adamw))
    assert by_muon == wanted and len(wanted) == 6 and by_adamw == total - wanted
    assert len(optimisers(model, 1e-3, 0.0, 0.0)) == 1


def test_a_truncated_checkpoint_starts_afresh(tmp_path, capsys):
    checkpoint = Checkpoint(tmp_path, "k" * 16)
    checkpoint.save({"step": 3})
    assert checkpoint.load() == {"step": 3}
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:50])
    assert checkpoint.load() is None and "starting afresh" in capsys.readouterr().out


def test_another_key_does_not_see_the_checkpoint(tmp_path):
    Checkpoint(tmp_path, "a" * 16).save({"step": 3})
    assert Checkpoint(tmp_path, "b" * 16).load() is None


def test_adaln_zero_starts_as_a_constant_zero():
    denoiser = tiny()
    assert denoiser(torch.randn(2, 1, 8, 8), torch.tensor([1, 500]), torch.tensor([0, 1])).abs().max() == 0


def test_labels_are_dropped_to_the_null_label():
    x, y = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    _, labels = draw_batch(x, y, 4000, 2, 0.25, torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == {0, 2} and 0.22 < (labels == 2).float().mean() < 0.28
    assert draw_batch(x, None, 4, 0, 0.25, torch.Generator().manual_seed(0))[1] is None


def test_timesteps_are_stratified():
    t = stratified_timesteps(100, 1000, torch.Generator().manual_seed(0))
    assert sorted((t // 10).tolist()) == list(range(100))


def test_warmup_then_cosine_by_hand():
    assert [warmup_cosine(i, 110, 10) for i in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert warmup_cosine(110, 110, 10) == pytest.approx(0.0)


@pytest.mark.parametrize("shape, classes, message", [
    (SHAPE | {"patch": 3}, 2, "patch: 3 does not divide the image size 8"),
    (SHAPE | {"heads": 3}, 2, "heads: 3 does not divide the width 16"),
    (SHAPE, 0, "dit needs labelled data"),
])
def test_an_impossible_shape_is_refused(shape, classes, message):
    with pytest.raises(ValueError, match=message):
        build(shape, 8, 1, classes)
