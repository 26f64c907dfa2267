"""What all arms of the study share: data, feature net, a teacher and its own samples. Made once, kept below runs/sparsity."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.holdout import judge_unseen
from benchmarks.results import made
from tasks.core import denoiser as denoisers
from tasks.core import quality
from tasks.core.artifacts import Inputs, digest
from tasks.core.calibration import Calibration, noised
from tasks.core.denoiser import Denoiser
from tasks.core.params import read_params, stage_params
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.sampler import labels_for, sample_in_chunks, spaced_timesteps
from tasks.data import stage as data_stage
from tasks.data.features import load_feature_net
from tasks.distill.images import Images
from tasks.distill.stage import pool, read_images
from tasks.fid.measure import Judge
from tasks.pretrain_load import stage as pretrain_stage
from tasks.runtime.graph import live_graph
from tasks.runtime.solver import Predict

BANK = 5000         # samples of the teacher's own, for training without data
HELD = 1000         # holdout images on which predictions are compared
CALIBRATION = 512   # samples of the teacher's own, for saliency and sensitivity
BOTH = 0.5          # any share between 0 and 1 reads both kinds of images; the arms say how they are mixed
BATCH = 100         # images of a network evaluation while sampling
RESAMPLES = 1000    # of a bootstrap
TOGETHER = 500      # of them on another device than a CPU
NOISE = 31_337      # the noise that samples start from is of seed NOISE + training seed: of all arms alike, so they are pairs
CALIBRATION_NOISE = 77_777  # of all images that something is chosen by; none that is judged starts from it


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What speed is measured on."""

    name: str
    teacher: Denoiser  # on the device where arms are trained and sampled


@dataclass(frozen=True, kw_only=True)
class Lab(Bench):
    """What quality is measured with. calibration: where the teacher is."""

    folder: Path
    images: Images             # real ones and the teacher's own
    held: Calibration          # holdout images, noised
    calibration: Calibration   # of the teacher's own samples, noised
    judge: Judge

    @functools.cached_property
    def bootstrap(self) -> "Bootstrap":
        return Bootstrap(self.judge, self.strata)

    def strata(self, n: int) -> np.ndarray | None:
        """Labels (n,) of samples 0 .. n - 1; None from a teacher without classes."""
        labels = labels_for(range(n), self.teacher.num_classes)
        return None if labels is None else labels.numpy()


class Bootstrap:
    """The same resamples of samples and of the digits that judge them for all arms, so those of one arm are computed once."""

    def __init__(self, judge: Judge, strata: Callable[[int], np.ndarray | None], resamples: int = RESAMPLES) -> None:
        """strata: n -> labels of samples 0 .. n - 1."""
        self.judge, self.strata, self.resamples = judge, strata, resamples
        self.drawn: dict[int, tuple[np.ndarray, quality.Gaussian]] = {}
        self.found: dict[bytes, tuple[float, np.ndarray]] = {}

    def fids(self, features: np.ndarray) -> tuple[float, np.ndarray]:
        """(n, D) -> their FID, and (resamples,) those of the resamples."""
        n, name = len(features), hashlib.sha256(features.tobytes()).digest()
        if n not in self.drawn:
            self.drawn[n] = self.draw(n)
        if name not in self.found:
            counts, reference = self.drawn[n]
            self.found[name] = quality.fid(features, self.judge.reference), quality.bootstrap_fid(features, reference, counts)
        return self.found[name]

    def draw(self, n: int) -> tuple[np.ndarray, quality.Gaussian]:
        """How often each resample has each of n samples, and the digits of each."""
        rng = np.random.default_rng(0)
        counts = quality.resample_counts(n, self.resamples, rng, quality.strata_of(self.strata(n)))
        drawn = quality.resample_counts(len(self.judge.features), self.resamples, rng, quality.strata_of(self.judge.labels))
        return counts, quality.resampled(self.judge.features, drawn)


def open_lab(name: str, work: Path, device: str = "cpu") -> Lab:
    """name: of a shipped teacher, a folder in tasks/pretrain_load/teachers."""
    params = read_params(scale="full")
    data = made(work / "data", lambda out: data_stage.run(stage_params(data_stage, params), Inputs({}, "data"), out))
    how = dataclasses.replace(stage_params(pretrain_stage, params), source="folder", path=str(pretrain_stage.TEACHERS / name),
                              bank=BANK)
    folder = work / name
    inputs = Inputs({"data": data}, digest([name, BANK]))
    inputs.folders["pretrain_load"] = made(folder / "teacher", lambda out: pretrain_stage.run(how, inputs, out))
    teacher = denoisers.load(inputs["pretrain_load"] / "teacher")
    labelled = teacher.num_classes > 0
    held, bank = (noised(teacher.schedule, *read_images(inputs[stage], part, labelled), n, torch.Generator().manual_seed(0))
                  for stage, part, n in (("data", "holdout", HELD), ("pretrain_load", "bank", CALIBRATION)))
    teacher.model.to(device)
    torch.backends.cudnn.allow_tf32 = False  # samples are drawn in fp32 on every device
    return Lab(name=name, folder=folder, teacher=teacher, images=pool(teacher, inputs, BOTH), held=held.to(device),
               calibration=bank.to(device),
               judge=judge_unseen(load_feature_net(data, "report"), "judges", teacher.sample_shape))


def moved(labels: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if labels is None else labels.to(device)


def device_of(denoiser: Denoiser) -> torch.device:
    return next(denoiser.model.parameters()).device


def live(denoiser: Denoiser) -> Predict:
    """The live network, wherever it is, for a solver on the CPU: of a seed the noise is the same for all devices."""
    device = device_of(denoiser)
    return lambda x, t, labels, step: denoiser(x.to(device), t.to(device), moved(labels, device)).cpu()


def sample_features(lab: Lab, denoiser: Denoiser, recipe: Recipe, n: int, seed: int, label: str) -> np.ndarray:
    """(n, 64) of the report net, of samples 0 .. n - 1: on a CPU through OpenVINO, elsewhere by the live network.
    denoiser: with the recipe's precision live. seed: of the training."""
    on_cpu = device_of(denoiser).type == "cpu"
    batch = BATCH if on_cpu else TOGETHER
    predict = live_graph(denoiser, recipe, BATCH) if on_cpu else live(denoiser)
    chunks = sample_in_chunks(predict, denoiser.schedule, recipe, denoiser.sample_shape, n, NOISE + seed, denoiser.num_classes,
                              batch)
    return np.concatenate([quality.features(lab.judge.net, chunk) for chunk in track(chunks, -(-n // batch), label)])


def uniform(lab: Lab, steps: int) -> Recipe:
    """DDIM on a uniform list."""
    return Recipe(timesteps=spaced_timesteps(lab.teacher.schedule, steps))
