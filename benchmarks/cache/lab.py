"""What all arms share: a shipped teacher, the judge of its samples, the error table and routers that our plans come from."""

import dataclasses
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.cache.arms import NFES
from benchmarks.cache.work import Meter
from benchmarks.holdout import judge_unseen
from benchmarks.results import kept_features, made
from tasks.cache_learn import stage as cache_stage
from tasks.cache_learn.router import train_router
from tasks.cache_learn.table import ReuseTable
from tasks.core import denoiser as denoisers
from tasks.core.artifacts import Inputs, digest, read_json, write_json
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.params import read_params, stage_params
from tasks.core.progress import track
from tasks.core.quality import features, paired_distance
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import labels_for, network, sample_in_chunks, spaced_timesteps
from tasks.data import stage as data_stage
from tasks.data.features import load_feature_net, load_labels, load_reference
from tasks.fid.measure import Judge
from tasks.pretrain_load.stage import TEACHERS as SHIPPED
from tasks.runtime.solver import Predict

BATCH = 8        # images of an evaluation, judged and timed alike: some packages decide for a whole batch at once
NOISE = 31_337   # seed of the noise of what is judged: the same for every arm, so arms are compared in pairs
UNIT = (50, 100)  # steps of the uncached DDIM run whose distance is the unit of fidelity


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is small in a trial run. scale: of params.yaml's cache_learn, which our tables and routers are made with."""

    pairs: int        # samples of every cell, judged in pairs with the uncached run's
    further: int      # the same, others, of cells that these leave open
    unseen: int       # the same, others again, of plans for lists that the table never saw
    finalists: int    # samples of cells whose quality is claimed
    timed_s: float    # seconds of timing of one arm under one setting, all its strengths together
    repeats: int      # of each of its trajectories, at least
    scale: str
    nfes: tuple[int, ...]


FULL = Sizes(pairs=100, further=400, unseen=1000, finalists=10_000, timed_s=15, repeats=5, scale="full", nfes=NFES)
FEW = Sizes(pairs=16, further=16, unseen=16, finalists=40, timed_s=1, repeats=2, scale="quick", nfes=NFES[:1])


@dataclass(frozen=True, kw_only=True)
class Lab:
    name: str
    folder: Path
    data: Path
    teacher: Denoiser
    judge: Judge
    sizes: Sizes

    @cached_property
    def meter(self) -> Meter:
        return Meter(self.teacher)

    @cached_property
    def learn(self) -> cache_stage.Params:
        return stage_params(cache_stage, read_params(scale=self.sizes.scale))

    @cached_property
    def sublayers(self) -> list[str]:
        return cache_stage.units_of(self.teacher, "sublayer")

    def table(self, unit: str) -> ReuseTable:
        """unit: trunk | sublayer."""
        how = dataclasses.replace(self.learn, unit=unit)
        key = digest([getattr(how, name) for name in ("unit", "grid", "error_samples", "max_gap", "seed")])[:8]
        folder = made(self.folder / "tables" / f"{unit}-{key}", lambda out: cache_stage.reuse_table(
            self.teacher, how, lambda name: Checkpoint(self.folder / "checkpoints" / name, key)).write(out))
        return ReuseTable.read(folder)

    def beta(self, nfe: int) -> Tensor:
        """The router's (pairs, S) for the uniform list of `nfe` steps."""
        key = digest(asdict(self.learn.router))[:8]
        checkpoint = Checkpoint(self.folder / "checkpoints", f"router-{nfe}-{key}")
        return torch.from_numpy(kept_features(self.folder, f"router-{nfe}-{key}",
                                              lambda: trained_router(self, nfe, checkpoint).numpy()))

    def refined(self, recipe: Recipe, budget: float, unit: str, learned: bool) -> CachePlan:
        """Kept, as cells of several parts share it; its noises are not those of what is judged."""
        how = planning(self, budget, unit, learned)
        key = digest([recipe.to_json(), {name: value for name, value in asdict(how).items() if name != "router"}])
        path = self.folder / "plans" / f"{recipe.solver}{recipe.nfe}-{budget:g}-{key[:8]}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(refined_plan(self, recipe, how, key)))
        return CachePlan.from_json(read_json(path))

    def uncached(self, solver: str, nfe: int, samples: range) -> np.ndarray:
        """(len(samples), 64) features of the uncached run."""
        recipe = uniform(self.teacher, solver, nfe)
        return kept_features(self.folder, f"uncached-{solver}{nfe}-{span(samples)}", lambda: sampled_features(
            self, network(self.teacher), recipe, samples, f"{self.name} {solver}{nfe}/uncached"))

    @cached_property
    def unit(self) -> float:
        return paired_distance(*(self.uncached("ddim", steps, first_pairs(self.sizes)) for steps in UNIT))

    @cached_property
    def finalists_judge(self) -> Judge:
        """By digits that nothing was trained on."""
        return judge_unseen(self.judge.net, "judges", self.teacher.sample_shape)

    def strata(self, n: int) -> np.ndarray | None:
        """Labels (n,) of samples 0 .. n - 1; None from a teacher without classes."""
        labels = labels_for(range(n), self.teacher.num_classes)
        return None if labels is None else labels.numpy()


def open_lab(name: str, work: Path, sizes: Sizes) -> Lab:
    """name: of a shipped teacher, a folder in tasks/pretrain_load/teachers."""
    params = stage_params(data_stage, read_params(scale=sizes.scale))
    data = made(work / "data", lambda out: data_stage.run(params, Inputs({}, "data"), out))
    judge = Judge.of(load_feature_net(data, "report"), np.load(data / "holdout.npy"), load_labels(data, "holdout"),
                     load_reference(data, "report"))
    return Lab(name=name, folder=work / name, data=data, teacher=denoisers.load(SHIPPED / name), judge=judge, sizes=sizes)


def uniform(denoiser: Denoiser, solver: str, nfe: int) -> Recipe:
    return Recipe(timesteps=spaced_timesteps(denoiser.schedule, nfe), solver=solver)


def first_pairs(sizes: Sizes) -> range:
    """The samples by which every cell is judged."""
    return range(sizes.pairs)


def further_pairs(sizes: Sizes) -> range:
    """Others, from the next whole batch on."""
    first = -(-sizes.pairs // BATCH) * BATCH
    return range(first, first + sizes.further)


def unseen_pairs(sizes: Sizes) -> range:
    """The next ones."""
    first = further_pairs(sizes).stop
    return range(first, first + sizes.unseen)


def span(samples: range) -> str:
    """In names of files."""
    return f"{samples.start}-{samples.stop}" if samples.start else f"{samples.stop}"


def sampled_features(lab: Lab, predict: Predict, recipe: Recipe, samples: range, label: str) -> np.ndarray:
    """(len(samples), 64) of the report net."""
    teacher, n = lab.teacher, len(samples)
    chunks = sample_in_chunks(predict, teacher.schedule, recipe, teacher.sample_shape, n, NOISE, teacher.num_classes, BATCH,
                              samples.start)
    return np.concatenate([features(lab.judge.net, chunk) for chunk in track(chunks, -(-n // BATCH), label)])


def planning(lab: Lab, budget: float, unit: str, learned: bool) -> cache_stage.Params:
    """As cache_learn plans for its base list; or, not learned, the best of what it proposes, weights fitted in one run."""
    how = dataclasses.replace(lab.learn, budget=budget, unit=unit)
    if learned:
        return how
    return dataclasses.replace(how, refine=dataclasses.replace(how.refine, tries=0),
                               weights=dataclasses.replace(how.weights, steps=0))


def refined_plan(lab: Lab, recipe: Recipe, how: cache_stage.Params, key: str) -> CachePlan:
    table = lab.table(how.unit)
    reference = cache_stage.reference_of(lab.teacher, recipe, table.sublayers, how)
    return cache_stage.refined_plan(table, reference, how, lambda name: Checkpoint(lab.folder / "checkpoints" / name, key))[0]


def trained_router(lab: Lab, nfe: int, checkpoint: Checkpoint) -> Tensor:
    how = lab.learn.router
    images = torch.from_numpy(np.load(lab.data / "train.npy")).float() / 127.5 - 1
    labels = load_labels(lab.data, "train") if lab.teacher.num_classes else None
    beta, _ = train_router(
        lab.teacher, lab.sublayers, images, None if labels is None else torch.from_numpy(labels),
        spaced_timesteps(lab.teacher.schedule, nfe), steps=how.steps, batch=how.batch, lr=how.lr, lam=how.lam,
        reduction=how.reduction, label_dropout=how.label_dropout if lab.teacher.has_null_label else 0.0, seed=lab.learn.seed,
        checkpoint=checkpoint)
    return beta
