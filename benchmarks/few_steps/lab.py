"""What all arms share: a teacher, its images that few steps are learned from, and the judge of samples."""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import results
from benchmarks.holdout import judge_unseen
from benchmarks.results import made
from benchmarks.sparsity.lab import Bootstrap
from examples.emoji import make as emoji
from tasks.core import denoiser as denoisers
from tasks.core import quality
from tasks.core.artifacts import Inputs, digest, read_json, write_json
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.pairs import Pairs, sample_kept
from tasks.core.params import read_params, stage_params
from tasks.core.progress import track
from tasks.core.quality import Difference
from tasks.core.recipe import Recipe
from tasks.core.sampler import labels_for, sample_in_chunks
from tasks.core.unroll import Learned
from tasks.data import stage as data_stage
from tasks.data.features import load_feature_net, load_labels, load_reference
from tasks.distill import stage as distill_stage
from tasks.fid.measure import Judge
from tasks.package.variants import uniform_precision
from tasks.pretrain_load.stage import TEACHERS as SHIPPED
from tasks.runtime.graph import live_graph
from tasks.runtime.precision import apply_precision
from tasks.runtime.solver import Predict, SolverStep
from tasks.solver_learn import stage as solver_stage

PRECISION = "bf16"     # of networks that are not in integers; the time stays in fp32
BATCH = 25             # images of a network evaluation while samples are drawn
JUDGED = 31_337  # seed of the noise of what is judged
EMOJI = "emoji"        # teachers whose name begins so were trained on the artwork of examples/emoji
COLOUR = {"source": "folder", "side": emoji.SIDE, "channels": 3, "holdout": 720, "judge": "efficientnet_lite0"}
COLOUR_SAMPLES = 2000  # at most: there are 720 real ones, and features have 320 dimensions


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """scale: of params.yaml, for what is not named here."""

    scale: str
    samples: int          # of what is judged
    fewer: int            # of a classical solver that is clearly beaten by them
    noises: int           # that the teacher makes images of
    held: int             # of these, only judged on
    solver_steps: int     # of training a solver
    solver_batch: int
    student_noises: int   # of a student that is trained from the teacher on
    student_steps: int
    adapt_steps: int      # of few_4 under masks
    adapt_batch: int
    minutes: float        # of CPU that each loss has
    loss_samples: int     # judged of each
    resamples: int        # of the bootstrap


FULL = Sizes(scale="full", samples=10_000, fewer=1000, noises=8192, held=512, solver_steps=150, solver_batch=32,
             student_noises=24_576, student_steps=2700, adapt_steps=300, adapt_batch=32, minutes=6.0, loss_samples=10_000,
             resamples=400)
FEW = Sizes(scale="quick", samples=60, fewer=40, noises=48, held=16, solver_steps=2, solver_batch=4,
            student_noises=48, student_steps=2, adapt_steps=2, adapt_batch=4, minutes=0.05, loss_samples=60, resamples=50)


@dataclass(frozen=True, kw_only=True)
class Lab:
    name: str
    folder: Path
    data: Path
    teacher: Denoiser
    judge: Judge
    sizes: Sizes

    @cached_property
    def how(self) -> solver_stage.Params:
        """Of a learned solver. A look at the held noises costs as much as two steps."""
        sizes, params = self.sizes, stage_params(solver_stage, read_params(scale=self.sizes.scale))
        return replace(params, evaluations=(1,), noises=sizes.noises, held=sizes.held, steps=sizes.solver_steps,
                       batch=sizes.solver_batch, ema_decay=0.95, judge_every=50)

    @cached_property
    def distill(self) -> distill_stage.Params:
        return stage_params(distill_stage, read_params(scale=self.sizes.scale))

    @cached_property
    def search_net(self) -> nn.Module:
        """The net that all training sees; the judge's is another one."""
        return load_feature_net(self.data, "search")

    @cached_property
    def dense(self) -> Predict:
        """The teacher, for any solver and timesteps."""
        return any_step(self.teacher)

    @cached_property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(self.judge, self.strata, self.sizes.resamples)

    def strata(self, n: int) -> np.ndarray | None:
        """Labels (n,) of samples 0 .. n - 1; None from a teacher without classes."""
        labels = labels_for(range(n), self.teacher.num_classes)
        return None if labels is None else labels.numpy()

    def pairs(self, noises: int | None = None) -> Pairs:
        """noises: as many as a learned solver has, or another number, which is of other noise."""
        n, seed = noises or self.sizes.noises, self.how.seed + (noises is not None)
        recipe = self.how.teacher.recipe(self.teacher.schedule)
        name = f"{n}-{seed}-{recipe.solver}-{recipe.nfe}"
        images = results.kept(self.folder / "pairs" / f"{name}.npy", lambda: sample_kept(
            self.teacher, recipe, n, seed, self.checkpoint(f"pairs-{name}"), f"{self.name} images to learn from"))
        return Pairs(images, seed, self.teacher.num_classes)

    def checkpoint(self, name: str, key: object = None) -> Checkpoint:
        """key: what the work depends on beside its name."""
        return Checkpoint(self.folder / "checkpoints" / name, digest(key)[:8])

    def features(self, name: str, recipe: Recipe, n: int, denoiser: Denoiser | None = None, noise: int = JUDGED) -> np.ndarray:
        """(n, D) of the judge's net, of samples 0 .. n - 1, kept. denoiser: if it is not the teacher; its own precision is live
        where the recipe has one, else PRECISION is taken."""
        key = digest([recipe.to_json(), noise, n])[:8]
        return results.kept_features(self.folder, f"{name}-{key}", lambda: self.drawn(name, recipe, n, denoiser, noise))

    def drawn(self, name: str, recipe: Recipe, n: int, denoiser: Denoiser | None, noise: int) -> np.ndarray:
        teacher = self.teacher
        predict = (self.dense if denoiser is None else live_graph(denoiser, recipe, BATCH) if recipe.precision
                   else any_step(denoiser))
        chunks = sample_in_chunks(predict, teacher.schedule, recipe, teacher.sample_shape, n, noise, teacher.num_classes, BATCH)
        return np.concatenate([quality.features(self.judge.net, chunk)
                               for chunk in track(chunks, -(-n // BATCH), f"{self.name} {name}")])

    def difference(self, found: np.ndarray, base: np.ndarray) -> Difference:
        """Relative FID increase of features over those of the same noise, as many as both have."""
        n = min(len(found), len(base))
        (fid, fids), (fid_base, fids_base) = (self.bootstrap.fids(features[:n]) for features in (found, base))
        return quality.relative_difference(fid, fid_base, fids, fids_base)


def any_step(denoiser: Denoiser) -> Predict:
    """A dense network in PRECISION through OpenVINO, whatever the timesteps are."""
    lower, precision = copy.deepcopy(denoiser.model), uniform_precision(denoiser.prunable_layers(), PRECISION)
    apply_precision(lower, precision, {})
    predict = live_graph(Denoiser(lower, denoiser.schedule), Recipe(timesteps=(0,), precision=precision), BATCH)
    return lambda x, t, labels, step: predict(x, t, labels, 0)


def open_lab(name: str, work: Path, sizes: Sizes) -> Lab:
    """name: of a shipped teacher, a folder in tasks/pretrain_load/teachers."""
    teacher, (data, mnist) = denoisers.load(SHIPPED / name), data_of(name, work, sizes)
    net = load_feature_net(data, "report")
    judge = judge_unseen(net, "judges", teacher.sample_shape) if mnist else Judge.of(
        net, np.load(data / "holdout.npy"), load_labels(data, "holdout"), load_reference(data, "report"))
    if not mnist:
        sizes = replace(sizes, **{name: min(COLOUR_SAMPLES, getattr(sizes, name)) for name in ("samples", "loss_samples")})
    return Lab(name=name, folder=work / name, data=data, teacher=teacher, judge=judge, sizes=sizes)


def data_of(name: str, work: Path, sizes: Sizes) -> tuple[Path, bool]:
    """The artifact of the stage data, made once, and whether it is of MNIST, which has digits that nothing was trained on."""
    params = stage_params(data_stage, read_params(scale=sizes.scale))
    if not name.startswith(EMOJI):
        return made(work / "data", lambda out: data_stage.run(params, Inputs({}, "data"), out)), True
    pictures = made(work / "pictures", lambda out: emoji.main(out / EMOJI, out)) / EMOJI
    params = replace(params, path=str(pictures), **COLOUR)
    return made(work / f"data_{EMOJI}", lambda out: data_stage.run(params, Inputs({}, "data_emoji"), out)), False


# ---- what was learned, kept ----

def write_learned(found: Learned, folder: Path, weights: bool, **more: object) -> None:
    """weights: of the network as well as the solver. more: that is said of it."""
    rows = [row.to_json() for row in found.solver.rows()]
    write_json(folder / "learned.json", {"rows": rows, "loss": found.loss, "start_loss": found.start_loss, "at": found.at,
                                         "held": found.held, **more})
    if weights:
        save_file(found.weights, folder / "weights.safetensors")


def read_rows(folder: Path) -> tuple[SolverStep, ...]:
    return tuple(map(SolverStep.from_json, read_json(folder / "learned.json")["rows"]))


def read_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "weights.safetensors")
