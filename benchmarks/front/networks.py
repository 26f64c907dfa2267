"""Weights that points have in place of the teacher's: pruned, and trained shortly for it; made once, kept in the work folder.

`teacher_units`, `few_4_units`: a share of every feed-forward's units (of a UNet: resnet's channels) cut out, the others made up
for it by least squares, then trained: the teacher's by its predictions on its own samples, the student's along its whole
trajectory. `torch_pruning`, `modelopt`: what these packages make of the teacher.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.front.lab import Lab
from benchmarks.front.points import STUDENT
from benchmarks.results import made
from benchmarks.sparsity.arms import COMMON, TAUGHT
from tasks.core.artifacts import digest, read_json, write_json
from tasks.core.calibration import noised
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.params import read_params, stage_params
from tasks.distill import stage as distill_stage
from tasks.distill.few_steps import FewSteps, train_student
from tasks.distill.images import Images
from tasks.distill.settings import Settings
from tasks.distill.train import train
from tasks.mask_search.grams import input_statistics
from tasks.mask_search.masks import unit_masks
from tasks.mask_search.saliency import made_up
from tasks.runtime.masks import hidden_units, shrink_units
from tasks.runtime.solver import SolverStep

UNITS = 0.75      # kept share of every block's units
MULTIPLE = 8      # units that go together, as in params.yaml
STATES = 512      # noised samples that least squares see
BATCH = 32        # images of a training step
EMA = 0.98        # of training as short as this
SEED = 0


def denoiser_of(lab: Lab, weights: str) -> Denoiser:
    """A network in eval mode, its shapes as it ships."""
    if ("network", weights) not in lab.kept:
        lab.kept["network", weights] = NETWORKS[weights](lab)
    return lab.kept["network", weights]


def rows_of(lab: Lab, weights: str) -> list[SolverStep]:
    """Those that the student's weights were trained with."""
    if weights == STUDENT:
        return list(lab.student.rows)
    folder = pruned_student(lab)
    return [SolverStep.from_json(row) for row in read_json(folder / "rows.json")]


def teacher(lab: Lab) -> Denoiser:
    return lab.teacher


def student(lab: Lab) -> Denoiser:
    return with_weights(lab.teacher, lab.student.weights)


def with_weights(base: Denoiser, weights: Mapping[str, Tensor]) -> Denoiser:
    model = copy.deepcopy(base.model)
    model.load_state_dict(weights)
    return Denoiser(model.eval().requires_grad_(False), base.schedule)


# ---- masks ----

def masks_of(lab: Lab, network: Denoiser) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> masks by parameter name; weights that make up for what they take, by least squares."""
    calibration = noised(lab.teacher.schedule, lab.pairs.images, lab.strata(len(lab.pairs)), STATES,
                         torch.Generator().manual_seed(SEED))
    blocks = [units.block for units in hidden_units(network.model) if not units.products]
    masks = unit_masks(network.model, dict.fromkeys(blocks, UNITS), MULTIPLE)
    read = [name.removesuffix(".weight") for name, mask in masks.items() if name.endswith(".weight") and mask.ndim > 1]
    return masks, made_up(network.model, masks, input_statistics(network, calibration, read))


def pruned_teacher(lab: Lab) -> Denoiser:
    how, labels = settings(lab, **TAUGHT, bank_share=1.0), lab.strata(len(lab.pairs))
    images = Images(pixels=torch.from_numpy(lab.pairs.images), labels=None if labels is None else torch.from_numpy(labels),
                    real=0)

    def learn(out: Path) -> None:
        masks, start = masks_of(lab, lab.teacher)
        found = train(lab.teacher, masks, "unit", "fixed", images, how, Checkpoint(lab.folder / "checkpoints", "teacher_units"),
                      f"{lab.name} teacher_units", start)
        save(out, found.weights, found.masks)

    return shrunk(lab, made(lab.folder / "networks" / "teacher_units", learn))


def pruned_student(lab: Lab) -> Path:
    """The folder of its weights, masks and rows."""
    few = stage_params(distill_stage, read_params(scale="quick")).few_steps
    how: FewSteps = replace(few, steps=lab.sizes.network_steps, batch=BATCH, held=min(few.held, len(lab.pairs) // 4))

    def learn(out: Path) -> None:
        masks, start = masks_of(lab, denoiser_of(lab, STUDENT))
        beginning = replace(lab.student, weights={**lab.student.weights, **start})
        inputs = lab.inputs(digest([lab.name, how.steps, how.batch, len(lab.pairs)]))
        found = train_student(lab.teacher, len(beginning.rows), "unit", beginning, masks, lab.pairs, lab.search_net, how, True,
                              SEED, inputs)
        save(out, found.weights, masks)
        write_json(out / "rows.json", [row.to_json() for row in found.solver.rows()])
        write_json(out / "losses.json", {"start": found.start_loss, "held": found.loss, "at": found.at})

    return made(lab.folder / "networks" / f"{STUDENT}_units", learn)


def save(out: Path, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    save_file(dict(weights), out / "weights.safetensors")
    save_file({name: mask.to(torch.uint8).contiguous() for name, mask in masks.items()}, out / "masks.safetensors")


def shrunk(lab: Lab, folder: Path) -> Denoiser:
    network = with_weights(lab.teacher, load_file(folder / "weights.safetensors"))
    shrink_units(network.model, {name: mask.bool() for name, mask in load_file(folder / "masks.safetensors").items()})
    return Denoiser(network.model.eval().requires_grad_(False), lab.teacher.schedule)


# ---- what packages make of the teacher ----

def torch_pruned(lab: Lab) -> Denoiser:
    """As many units go as in ours, by Torch-Pruning's dependency graph and weight magnitude; then the teacher's own training
    goes on for a while, which is what its examples do."""
    from benchmarks.front.peers import cut_by_torch_pruning
    from tasks.pretrain_load.train import train as pretrain
    network = cut_by_torch_pruning(Denoiser(copy.deepcopy(lab.teacher.model), lab.teacher.schedule), 1 - UNITS)

    def learn(out: Path) -> None:
        images = torch.from_numpy(np.load(lab.data / "train.npy")).float() / 127.5 - 1
        network.model.requires_grad_(True)
        model, _ = pretrain(network, images, train_labels(lab), steps=lab.sizes.network_steps, batch=BATCH, lr=3e-4,
                            warmup=lab.sizes.network_steps // 10, weight_decay=0.01, ema_decay=EMA,
                            label_dropout=0.1 if lab.teacher.has_null_label else 0.0, bf16=True, seed=SEED,
                            checkpoint=Checkpoint(lab.folder / "checkpoints", "torch_pruning"))
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, out / "weights.safetensors")

    folder = made(lab.folder / "networks" / "torch_pruning", learn)
    return with_weights(network, load_file(folder / "weights.safetensors"))


def modelopt_masked(lab: Lab) -> Denoiser:
    """ModelOpt's 2:4 masks, then training under them on the data, which its documentation asks for after a mask."""
    from benchmarks.front.peers import masked_by_modelopt

    def learn(out: Path) -> None:
        start = masked_by_modelopt(lab.teacher).model.state_dict()
        masks = {f"{name}.weight": start[f"{name}.weight"] != 0 for name in lab.teacher.prunable_layers()}
        how = settings(lab, data=1.0, lam=0.0, lr=3e-4, bank_share=0.0)
        images = Images(pixels=torch.from_numpy(np.load(lab.data / "train.npy")), labels=train_labels(lab),
                        real=len(np.load(lab.data / "train.npy", mmap_mode="r")))
        found = train(lab.teacher, masks, "2:4", "fixed", images, how, Checkpoint(lab.folder / "checkpoints", "modelopt"),
                      f"{lab.name} modelopt", start)
        save(out, found.weights, found.masks)

    return with_weights(lab.teacher, load_file(made(lab.folder / "networks" / "modelopt", learn) / "weights.safetensors"))


def settings(lab: Lab, **changes: float) -> Settings:
    """As the study of sparsity trains, with fewer steps of smaller batches."""
    dropout = {} if lab.teacher.has_null_label else {"label_dropout": 0.0}
    return Settings(**{**COMMON, **dropout, "batch": BATCH, "steps": lab.sizes.network_steps, "ema_decay": EMA,
                       "warmup": lab.sizes.network_steps // 10, "log_every": 50, "seed": SEED, **changes})


def train_labels(lab: Lab) -> Tensor | None:
    return torch.from_numpy(np.load(lab.data / "train_labels.npy")) if lab.teacher.num_classes else None


NETWORKS: dict[str, Callable[[Lab], Denoiser]] = {
    "teacher": teacher, "teacher_units": pruned_teacher, STUDENT: student,
    f"{STUDENT}_units": lambda lab: shrunk(lab, pruned_student(lab)),
    "torch_pruning": torch_pruned, "modelopt": modelopt_masked}
