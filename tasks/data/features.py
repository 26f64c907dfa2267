"""Two small feature nets, trained on the data's own train split: one guides the search, the other judges what is reported,
unless a pretrained net does (tasks/data/efficientnet.py).

With labels they learn the classes; without, by which multiple of 90 degrees an image was turned (Gidaris et al.,
arXiv 1803.07728). Their 64 penultimate features carry FID, KID, precision, recall and fidelity.
"""

import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from tasks.core.artifacts import hash_file, read_json
from tasks.core.checkpoint import Checkpoint
from tasks.core.quality import Gaussian
from tasks.core.training import optimise, step_generator, warmup_cosine
from tasks.data.efficientnet import EfficientNetLite0

FEATURES = 64
WEIGHT_DECAY = 0.05
NETS = {"search": {"trunk": "plain", "width": 24}, "report": {"trunk": "residual", "width": 20}}


def conv(inside: int, outside: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outside), nn.ReLU())


class Residual(nn.Module):
    """relu(x + conv(conv(x))) (He et al., arXiv 1512.03385)."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(conv(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)).relu()


def plain_trunk(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(conv(channels, width, 5, 2), conv(width, 2 * width), nn.MaxPool2d(2), conv(2 * width, 2 * width))


def residual_trunk(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(conv(channels, width, 5, 2), Residual(width), conv(width, 2 * width, 3, 2), Residual(2 * width))


TRUNKS = {"plain": plain_trunk, "residual": residual_trunk}


class FeatureNet(nn.Module):
    """NCHW fp32 in [-1, 1], any H and W of 4 or more -> features (N, 64), logits (N, classes)."""

    def __init__(self, trunk: str, width: int, channels: int, classes: int):
        super().__init__()
        self.trunk = TRUNKS[trunk](channels, width)
        # normalised features: distances are in units of the train split's own spread, whatever the net
        self.embed = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18 * width, FEATURES, bias=False),
                                   nn.BatchNorm1d(FEATURES, affine=False))
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.embed(self.trunk(x))
        return embedded, self.head(embedded.relu())


def augment(images: Tensor, rng: torch.Generator, turn: float = 12.0, zoom: float = 0.12, shear: float = 0.15,
            shift: float = 0.08) -> Tensor:
    """A random affine map of each image. images: (N, C, H, W); turn in degrees, shift as a share of the side.

    Beyond its border an image goes on as the border does.
    """
    n = len(images)
    angle, wide, high, lean, right, down = (torch.rand(6, n, generator=rng) * 2 - 1).unbind(0)
    angle, wide, high = angle * math.radians(turn), 1 + zoom * wide, 1 + zoom * high
    cos, sin = angle.cos(), angle.sin()
    rows = [wide * cos, -high * sin + shear * lean, 2 * shift * right, wide * sin, high * cos, 2 * shift * down]
    grid = affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def quarter_turns(images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """images: (N, C, S, S) -> each turned by 0, 90, 180 or 270 degrees, and which, (N,) int64."""
    turns = torch.randint(4, (len(images),), generator=rng)
    return torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(images, turns, strict=True)]), turns


def draw_batch(images: Tensor, labels: Tensor | None, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The augmented batch of a step and its targets: epochs are permutations, the last incomplete batch is left out."""
    epoch, place = divmod(step, len(images) // batch)
    chosen = torch.randperm(len(images), generator=step_generator(2 * seed, epoch))[place * batch:][:batch]
    rng = step_generator(2 * seed + 1, step)
    x, y = quarter_turns(images[chosen], rng) if labels is None else (images[chosen], labels[chosen])
    return augment(x, rng), y


def train_feature_net(config: dict, images: Tensor, labels: Tensor | None, *, epochs: int, batch: int, lr: float, seed: int,
                      checkpoint: Checkpoint, label: str) -> FeatureNet:
    """config: arguments of FeatureNet; images: (N, C, H, W) fp32 in [-1, 1]; labels: (N,) int64 or None for quarter turns."""
    with torch.random.fork_rng(devices=[]):  # modules draw their initial weights from the global generator only
        torch.manual_seed(seed)
        net = FeatureNet(**config).to(memory_format=torch.channels_last)  # a third faster here
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    batch = min(batch, len(images))
    per_epoch = len(images) // batch

    def step(i: int) -> float:
        x, y = draw_batch(images, labels, batch, seed, i)
        loss = cross_entropy(net(x.contiguous(memory_format=torch.channels_last))[1], y)
        for group in optimiser.param_groups:
            group["lr"] = lr * warmup_cosine(i, epochs * per_epoch, per_epoch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    def state() -> dict:
        return {"net": net.state_dict(), "optimiser": optimiser.state_dict()}

    def restore(saved: dict) -> None:
        net.load_state_dict(saved["net"])
        optimiser.load_state_dict(saved["optimiser"])

    optimise(step, state, restore, epochs * per_epoch, checkpoint, label)
    # as it will be loaded again: another memory format takes other kernels, which move the last bits
    return net.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def save_feature_net(net: nn.Module, folder: Path, which: str) -> None:
    """Weights to features_<which>.safetensors; the config belongs into data.json, under feature_nets."""
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, folder / f"features_{which}.safetensors")


def build_feature_net(config: dict) -> nn.Module:
    """config: arguments of FeatureNet, or {"pretrained": "efficientnet_lite0", "classes"}."""
    return EfficientNetLite0(config["classes"]) if "pretrained" in config else FeatureNet(**config)


def load_feature_net(folder: str | Path, which: str) -> nn.Module:
    """which: search | report; folder: the artifact of the stage data. -> net(x) = features (N, D), logits (N, classes).

    Raises ValueError naming the file when it does not hold what data.json says.
    """
    config = read_json(Path(folder) / "data.json")["feature_nets"][which]
    net, path = build_feature_net(config), Path(folder) / f"features_{which}.safetensors"
    try:
        net.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: does not hold {config}: {str(error).splitlines()[0]}") from error
    return net.eval().requires_grad_(False)


def describe_judge(folder: str | Path) -> str:
    """For a protocol: which net the reported numbers are judged by. folder: the artifact of the stage data."""
    name = read_json(Path(folder) / "data.json")["feature_nets"]["report"].get("pretrained")
    return f"{name}, trained on ImageNet" if name else "report, trained on the train split"


def load_reference(folder: str | Path, which: str) -> Gaussian:
    """The holdout's statistics on a feature net; which: search | report | inception, folder: the artifact of the stage data."""
    return Gaussian(*(np.load(Path(folder) / f"reference_{which}_{part}.npy") for part in ("mu", "sigma")))


def load_labels(folder: str | Path, part: str) -> np.ndarray | None:
    """(N,) int64, None without classes; part: train | holdout, folder: the artifact of the stage data."""
    path = Path(folder) / f"{part}_labels.npy"
    return np.load(path) if path.exists() else None


class Inception(nn.Module):
    """A user's own TorchScript file as a feature net: NCHW in [-1, 1] -> (features (N, D),).

    The script takes uint8 RGB of any size and `return_features=True`, as the published Inception-v3 of FID does in the form
    that StyleGAN3 distributes (N, 2048). TorchScript is code: it is read only from a file that data.inception names.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        try:
            self.script = torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"data.inception: {path} is not TorchScript: {str(error).splitlines()[0]}") from error

    def forward(self, x: Tensor) -> tuple[Tensor]:
        pixels = ((x + 1) * 127.5).round().to(torch.uint8)
        return (self.script(pixels.expand(-1, 3, -1, -1), return_features=True),)


def load_inception(folder: str | Path) -> Inception | None:
    """folder: the artifact of the stage data. None unless data.inception named a file; ValueError when it has changed since."""
    named = read_json(Path(folder) / "data.json")["inception"]
    if named is None:
        return None
    if not Path(named["path"]).is_file() or hash_file(Path(named["path"])) != named["blake2b"]:
        raise ValueError(f"data.inception: {named['path']} is gone or has changed; blake2b was {named['blake2b']}")
    return Inception(named["path"])
