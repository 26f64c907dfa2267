"""The dense teacher: from a diffusers folder (the shipped ones are such), from the hub, or trained here from scratch.

Reads: data (train split, report net, reference statistics).
Writes: teacher/ (a diffusers folder, fp32), few_steps/ where students ship beside it, bank.npy and bank_labels.npy (its own
samples, as its own DDIMPipeline makes them), curve.csv when it was trained; report: how it samples, class accuracy, FID,
precision and recall of the bank and of as many real images, whether such a teacher is worth compressing, parameters.
Left out: pipelines with a VAE or a text encoder, which are refused; weights that are not safetensors.
"""

import csv
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from tasks.core import denoiser as denoisers
from tasks.core import shipped
from tasks.core.agreement import Data
from tasks.core.artifacts import Inputs, Report, read_json
from tasks.core.denoiser import Denoiser
from tasks.core.model_folder import CONFIG, INDEX, NotFound, read_folder
from tasks.core.pairs import sample_kept
from tasks.core.params import check_choice, check_range
from tasks.core.quality import Gaussian, evenly, features, features_and_logits, fid, fid_name, precision_recall
from tasks.core.sampler import dense_recipe, labels_for
from tasks.core.teacher import doubt
from tasks.data.features import load_feature_net, load_labels
from tasks.pretrain_load import architectures
from tasks.pretrain_load.preflight import architecture, fitted, inspected, planned
from tasks.pretrain_load.train import train, zero_init

INPUTS = ("data",)
NEIGHBOURS = 3  # of improved precision and recall
TEACHERS = Path("tasks/pretrain_load/teachers")


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    """What training from scratch needs; the model card of a shipped teacher quotes them."""

    architecture: str     # dit | unet
    width: int
    depth: int            # DiT blocks
    heads: int
    patch: int            # pixels a side of a DiT token
    steps: int
    batch: int
    lr: float
    muon_lr: float        # of the matrices of attentions and feed-forwards, by Muon; 0: AdamW trains them, too
    warmup: int           # steps
    weight_decay: float
    ema_decay: float
    label_dropout: float
    bf16: bool

    def __post_init__(self):
        check_choice("train.architecture", self.architecture, ("dit", "unet"))
        for name, low, high in (("width", 8, 8192), ("depth", 1, 100), ("heads", 1, 128), ("patch", 1, 64), ("steps", 1, 10**8),
                                ("batch", 1, 65536), ("lr", 0, 1), ("muon_lr", 0, 1), ("warmup", 1, 10**6),
                                ("weight_decay", 0, 10), ("ema_decay", 0, 1), ("label_dropout", 0, 1)):
            check_range(f"train.{name}", getattr(self, name), low, high)
        if self.architecture == "unet" and self.muon_lr:
            raise ValueError(f"pretrain_load.train.muon_lr: {self.muon_lr}; Muon trains matrices of a dit, a unet takes 0")


@dataclass(frozen=True, kw_only=True)
class Params:
    source: str           # folder | hub | train
    path: str             # a diffusers folder
    repo_id: str | None   # a hub id, with its revision
    revision: str | None
    bank: int             # samples of the teacher's own
    bank_steps: int
    seed: int
    train: TrainParams

    def __post_init__(self):
        check_choice("pretrain_load.source", self.source, ("folder", "hub", "train"))
        check_range("pretrain_load.bank", self.bank, 1, 10**6)
        check_range("pretrain_load.bank_steps", self.bank_steps, 1, 1000)
        if self.source == "folder" and not any(Path(self.path, name).exists() for name in (INDEX, CONFIG)):
            shipped = ", ".join(sorted(str(p.parent) for p in TEACHERS.glob("*/model_index.json")))
            raise ValueError(f"pretrain_load.path: {self.path} holds no {INDEX}, nor {CONFIG}; expected a diffusers folder, "
                             f"such as {shipped}")
        if self.source == "hub" and not (self.repo_id and self.revision):
            raise ValueError(f"pretrain_load.revision: {self.revision}; source hub needs repo_id and revision: models must not "
                             "change unseen")
        if self.source == "hub" and not re.fullmatch(r"[0-9a-f]{7,40}", self.revision):
            raise ValueError(f"pretrain_load.revision: {self.revision!r} is not a commit (7 to 40 hex digits); a branch or tag "
                             "can be moved")
        if self.source == "hub" and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo_id):
            raise ValueError(f"pretrain_load.repo_id: {self.repo_id!r} is not owner/name")


def preflight(params: Params, known: dict) -> Denoiser | None:
    """The teacher without its weights; None where it is still to be fetched."""
    if params.source == "train":
        return planned(asdict(params.train), known["data"])
    try:
        folder = params.path if params.source == "folder" else snapshot(params, ("*.json",), offline=True)
        teacher = fitted(inspected(folder, known["data"]).denoiser, known["data"].num_classes)
    except NotFound:
        if params.source == "hub":  # not in the cache, or not whole
            return None
        raise
    for name in shipped.students(Path(folder)):
        shipped.check_student(Path(folder), name, teacher)
    return teacher


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    """`source` decides where the teacher comes from; what follows is the same for all."""
    teacher, curve = obtain(params, inputs)
    print(f"pretrain_load: dense samples by {teacher.schedule.dense_sampling}", flush=True)
    denoisers.save(teacher, out / "teacher")
    if params.source == "folder" and Path(params.path, shipped.FOLDER).is_dir():
        shutil.copytree(Path(params.path, shipped.FOLDER), out / shipped.FOLDER)
    if curve:
        with open(out / "curve.csv", "w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *curve])
    recipe = dense_recipe(teacher.schedule, params.bank_steps)
    bank = sample_kept(teacher, recipe, params.bank, params.seed, inputs.checkpoint("bank", every_s=10), "bank")
    np.save(out / "bank.npy", bank)
    labels = labels_for(range(len(bank)), teacher.num_classes)
    if labels is not None:
        np.save(out / "bank_labels.npy", labels.numpy())
    numbers = judge(bank, labels, inputs["data"])
    if why := doubt(numbers):
        print(f"pretrain_load: {why}", flush=True)
    size = sum(p.numel() for p in teacher.model.parameters())
    return Report({"parameters": size, "sampling": teacher.schedule.dense_sampling, **numbers,
                   "worth_compressing": why is None})


def obtain(params: Params, inputs: Inputs) -> tuple[Denoiser, list[tuple[int, float]]]:
    """-> the teacher and, when it was trained here, its curve of (step, loss)."""
    if params.source == "train":
        return train_from_scratch(params, inputs)
    data = read_json(inputs["data"] / "data.json")
    folder = params.path if params.source == "folder" else fetched(params)
    found = inspected(folder, Data(side=data["size"], channels=data["channels"], num_classes=data["num_classes"],
                                   images=data["train"] + data["holdout"]))
    return fitted(denoisers.read_weights(found), data["num_classes"]), []


def fetched(params: Params) -> Path:
    """The hub's snapshot: its configs, and once they say that it is a network on pixels, that network's weights."""
    folder = snapshot(params, ("*.json",))
    place = read_folder(folder).weights.relative_to(folder)
    return snapshot(params, ("*.json", (place / "*.safetensors").as_posix()))


def snapshot(params: Params, patterns: tuple[str, ...], offline: bool = False) -> Path:
    """offline: as it lies in the cache. Raises ValueError with the key, NotFound where there is nothing."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(params.repo_id, revision=params.revision, allow_patterns=list(patterns),
                                      local_files_only=offline))
    except OSError as error:  # of the network, of the hub, of a repository or a revision that is not there
        raise NotFound(f"pretrain_load.repo_id: {params.repo_id} at {params.revision} cannot be fetched: "
                       f"{' '.join(str(error).split())}") from error


def train_from_scratch(params: Params, inputs: Inputs) -> tuple[Denoiser, list[tuple[int, float]]]:
    how = asdict(params.train)
    images = torch.from_numpy(np.load(inputs["data"] / "train.npy")).float() / 127.5 - 1
    path = inputs["data"] / "train_labels.npy"
    labels = torch.from_numpy(np.load(path)) if path.exists() else None
    shape = {name: how.pop(name) for name in ("architecture", "width", "depth", "heads", "patch")}
    with torch.random.fork_rng():
        torch.manual_seed(params.seed)  # diffusers initialises from torch's global generator; fork_rng puts it back
        denoiser = build(shape, images.shape[2], images.shape[1], 0 if labels is None else int(labels.max()) + 1)
    labels = labels if denoiser.num_classes else None
    denoiser.model, curve = train(denoiser, images, labels, **how, seed=params.seed, checkpoint=inputs.checkpoint("pretrain"))
    return denoiser, curve


def build(shape: dict, size: int, channels: int, num_classes: int) -> Denoiser:
    """A randomly initialised reference architecture; `shape` is TrainParams' first five fields."""
    denoiser = denoisers.build(*architecture(shape, size, channels, num_classes), architectures.SCHEDULE)
    if denoiser.architecture == "dit":
        zero_init(denoiser.model)
    return denoiser


def judge(bank: np.ndarray, labels: torch.Tensor | None, data: Path) -> dict:
    """On the report net: FID to the holdout, precision and recall of the bank and of as many real training images; agreement
    with the labels. Precision and recall need more images than neighbours."""
    net = load_feature_net(data, "report")
    reference = Gaussian(*(np.load(data / f"reference_report_{part}.npy") for part in ("mu", "sigma")))
    train_images = np.load(data / "train.npy")
    real = train_images[evenly(len(train_images), len(bank), load_labels(data, "train"))]
    found, logits = features_and_logits(net, bank)
    name, ours = fid_name(len(bank)), features(net, real)
    numbers = {name: fid(found, reference), f"{name}_real": fid(ours, reference)}
    holdout = features(net, np.load(data / "holdout.npy"))
    if min(map(len, (found, ours, holdout))) > NEIGHBOURS:
        for suffix, rows in (("", found), ("_real", ours)):
            precision, recall = precision_recall(rows, holdout, NEIGHBOURS)
            numbers |= {f"precision{suffix}": precision, f"recall{suffix}": recall}
    if labels is not None:
        numbers["class_accuracy"] = float((logits.argmax(1) == labels.numpy()).mean())
    return numbers
