"""The feature nets: shapes, augmentation, determinism, and files that do not fit."""

import json

import numpy as np
import pytest
import torch

from tasks.core.artifacts import hash_file
from tasks.core.checkpoint import Checkpoint
from tasks.core.quality import features
from tasks.data.features import (
    NETS,
    FeatureNet,
    augment,
    draw_batch,
    load_feature_net,
    load_inception,
    quarter_turns,
    save_feature_net,
    train_feature_net,
)

CONFIG = {"trunk": "plain", "width": 4, "channels": 1, "classes": 2}


def bars(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes that no augmentation of 12 degrees confuses: an upright and a lying bar in noise."""
    labels = torch.arange(n) % 2
    images = torch.randn(n, 1, 12, 12, generator=torch.Generator().manual_seed(seed)) * 0.3 - 0.5
    images[labels == 0, :, :, 5:7] = 1
    images[labels == 1, :, 5:7, :] = 1
    return images, labels


@pytest.mark.parametrize("which", NETS)
@pytest.mark.parametrize("size", [8, 28, 33])
def test_64_features_for_any_size(which, size):
    found, logits = FeatureNet(**NETS[which], channels=3, classes=7).eval()(torch.zeros(2, 3, size, size))
    assert found.shape == (2, 64) and logits.shape == (2, 7)


def test_the_two_nets_are_different_architectures():
    assert NETS["search"]["trunk"] != NETS["report"]["trunk"]


def test_augmentation_without_amplitude_is_the_identity():
    images = torch.rand(3, 1, 9, 9)
    same = augment(images, torch.Generator().manual_seed(0), turn=0, zoom=0, shear=0, shift=0)
    assert torch.allclose(same, images, atol=1e-5)


def test_augmentation_moves_every_image_its_own_way_but_keeps_its_range():
    images = torch.rand(1, 1, 28, 28).expand(4, -1, -1, -1)
    moved = augment(images, torch.Generator().manual_seed(0))
    assert not torch.allclose(moved[0], moved[1], atol=1e-2)
    assert moved.min() >= images.min() - 1e-5 and moved.max() <= images.max() + 1e-5


def test_quarter_turns_say_by_how_much():
    images = torch.arange(4.0).view(1, 1, 2, 2).expand(20, -1, -1, -1)
    turned, turns = quarter_turns(images, torch.Generator().manual_seed(0))
    assert set(turns.tolist()) == {0, 1, 2, 3}
    for image, k in zip(turned, turns, strict=True):
        assert torch.equal(torch.rot90(image, -int(k), (1, 2)), images[0])


def test_an_epoch_sees_every_image_once():
    images = torch.arange(12.0).view(12, 1, 1, 1).expand(-1, 1, 8, 8)  # constant images are the same under any affine map
    seen = [draw_batch(images, torch.arange(12), 4, seed=3, step=i) for i in range(3)]
    assert sorted(torch.cat([y for _, y in seen]).tolist()) == list(range(12))
    for x, y in seen:
        assert torch.allclose(x[:, 0, 0, 0], y.float(), atol=1e-4)
    assert not torch.equal(seen[0][1], draw_batch(images, torch.arange(12), 4, seed=3, step=3)[1])  # another epoch


class Stopping(Checkpoint):
    """Ends the work after so many saves, like a signal."""

    def save(self, state):
        super().save(state)
        self.most -= 1
        if not self.most:
            raise KeyboardInterrupt


def test_training_learns_and_repeats_itself_bit_by_bit_even_stopped_half_way(tmp_path):
    images, labels = bars(64, 0)

    def trained(seed: int, name: str, most: int = 10**6) -> FeatureNet:
        checkpoint = Stopping(tmp_path / name, "k" * 16, every_s=0)
        checkpoint.most = most
        return train_feature_net(CONFIG, images, labels, epochs=6, batch=16, lr=5e-3, seed=seed, checkpoint=checkpoint,
                                 label="test")

    first, other = trained(0, "first"), trained(1, "other")
    with pytest.raises(KeyboardInterrupt):
        trained(0, "again", most=10)
    again = trained(0, "again")
    unseen, wanted = bars(40, 1)
    assert (first(unseen)[1].argmax(1) == wanted).float().mean() >= 0.95
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_training_leaves_the_global_generator_alone(tmp_path):
    before = torch.random.get_rng_state()
    train_feature_net(CONFIG, *bars(16, 0), epochs=1, batch=8, lr=1e-3, seed=0,
                      checkpoint=Checkpoint(tmp_path, "k" * 16), label="test")
    assert torch.equal(torch.random.get_rng_state(), before)


def write_data_json(folder, **more) -> None:
    (folder / "data.json").write_text(json.dumps({"feature_nets": {"search": CONFIG}, "inception": None, **more}))


def test_a_saved_net_computes_the_same(tmp_path):
    net = FeatureNet(**CONFIG).eval()
    save_feature_net(net, tmp_path, "search")
    write_data_json(tmp_path)
    images, _ = bars(4, 2)
    assert torch.equal(load_feature_net(tmp_path, "search")(images)[0], net(images)[0])


def test_a_net_of_another_shape_is_refused_with_the_files_name(tmp_path):
    save_feature_net(FeatureNet(**{**CONFIG, "width": 8}), tmp_path, "search")
    write_data_json(tmp_path)
    with pytest.raises(ValueError, match=r"features_search\.safetensors: does not hold"):
        load_feature_net(tmp_path, "search")
    (tmp_path / "features_search.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"features_search\.safetensors"):
        load_feature_net(tmp_path, "search")


class Script(torch.nn.Module):
    """The interface of the published TorchScript Inception."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and x.dtype == torch.uint8
        return x.float().mean((2, 3))


def test_a_named_torchscript_file_gives_features_of_rgb_bytes(tmp_path):
    path = tmp_path / "inception.pt"
    torch.jit.script(Script()).save(str(path))
    write_data_json(tmp_path, inception={"path": str(path), "blake2b": hash_file(path)})
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 4, 4), dtype=np.uint8)
    found = features(load_inception(tmp_path), images)
    assert found == pytest.approx(np.repeat(images.mean((2, 3)), 3, axis=1), rel=1e-6)
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"inception\.pt is gone or has changed"):
        load_inception(tmp_path)


def test_without_a_named_file_there_is_no_inception(tmp_path):
    write_data_json(tmp_path)
    assert load_inception(tmp_path) is None
