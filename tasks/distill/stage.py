"""Train the masked students from the dense teacher, one per grain, with one loop; on a GPU where torch sees one.

Reads: data (train.npy, train_labels.npy unless bank_share is 1; holdout.npy, holdout_labels.npy), pretrain_load (teacher/,
bank.npy, bank_labels.npy; few_steps/, students to start from), mask_search (masks.safetensors, weights.safetensors),
solver_learn (pairs, solvers to start from).
Writes: student_<grain>.safetensors (EMA weights in dense shape, masks applied), masks_<grain>.safetensors (uint8, frozen),
curve.csv (grain, step, loss, flip_rate); <grain> is 2_4 or unit. Of few-step students (few_steps.py), students.json with the
rows of each, student_<name>.safetensors, few_curve.csv and few_held.csv. Report, per
grain: error to the teacher's predictions on the holdout, one-shot and trained, kept share of the masked weights, MACs against
dense, last flip rate and that of the freeze; per few-step student its loss on held noises, at the start and trained.
Left out: quality of samples (fid judges the package); the dense model trained as long (the sparsity study has it); attention
maps of the teacher as targets.
"""

import copy
import csv
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.core import denoiser as denoisers
from tasks.core.artifacts import Inputs, Report, write_json
from tasks.core.calibration import Calibration, noised, predictions, relative_error
from tasks.core.cost import kept_share, layer_costs
from tasks.core.denoiser import Denoiser
from tasks.core.pairs import Pairs
from tasks.core.params import check_choice, check_range
from tasks.core.sparsity import kept_shares, mask_density
from tasks.data.features import load_feature_net
from tasks.distill.few_steps import FewSteps, beginning_of, entry, grain_name, name_of, train_student
from tasks.distill.images import Images
from tasks.distill.settings import METHODS, Settings, check_method
from tasks.distill.train import Student, train, with_model
from tasks.runtime.masks import apply_masks, remove_masks

INPUTS = ("data", "pretrain_load", "mask_search", "solver_learn")
GRAINS = ("2:4", "unit")
STARTS = ("made_up", "teacher")


@dataclass(frozen=True, kw_only=True)
class Params(Settings):
    start: str    # made_up | teacher: the weights that training starts from
    method: str   # of tasks/distill/masking.py; students ship masks, so not `dense`
    holdout: int  # images on which predictions are compared with the teacher's
    few_steps: FewSteps

    def __post_init__(self):
        super().__post_init__()
        check_choice("distill.start", self.start, STARTS)
        check_choice("distill.method", self.method, tuple(method for method in METHODS if method != "dense"))
        check_method(self.method, self)
        check_range("distill.holdout", self.holdout, 1, 10**6)


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = denoisers.load(inputs["pretrain_load"] / "teacher")
    teacher.model.to(device)
    images = pool(teacher, inputs, params.bank_share)
    held = calibration(teacher, inputs["data"], params).to(device)
    settings = training_settings(params, teacher)
    rows, numbers, starts = [], {}, {}
    for grain in grains_of(inputs["mask_search"] / "masks.safetensors"):
        masks, name = read_tensors(inputs["mask_search"] / "masks.safetensors", grain), grain.replace(":", "_")
        masks = {parameter: mask.bool() for parameter, mask in masks.items()}
        start = read_tensors(inputs["mask_search"] / "weights.safetensors", grain) if params.start == "made_up" else {}
        student = train(teacher, masks, grain, params.method, images, settings, inputs.checkpoint(f"distill_{name}"),
                        f"distill {grain}", start)
        save_file(student.weights, out / f"student_{name}.safetensors")
        save_file({key: mask.to(torch.uint8) for key, mask in student.masks.items()}, out / f"masks_{name}.safetensors")
        starts[grain] = student
        rows += [(grain, *row) for row in student.curve]
        numbers[grain] = judge(teacher, grain, masks, student, held)
    with open(out / "curve.csv", "w", newline="") as file:
        csv.writer(file).writerows([("grain", "step", "loss", "flip_rate"), *rows])
    return Report(numbers | {"few_steps": few_step_students(params, teacher, starts, inputs, out)})


def few_step_students(params: Params, teacher: Denoiser, starts: Mapping[str, Student], inputs: Inputs, out: Path) -> dict:
    """Train and write them. starts: grain -> the student for any list whose weights and masks a few-step student starts from.
    -> what the report says of each, by name."""
    few, net = params.few_steps, load_feature_net(inputs["data"], "search").to(next(teacher.model.parameters()).device)
    pairs, entries, numbers, rows = Pairs.read(inputs["solver_learn"]), [], {}, {"curve": [], "held": []}
    for nfe in few.evaluations:
        for grain in map(grain_name, few.grains):
            if grain != "dense" and grain not in starts:
                continue  # mask_search said that this network has none
            name, masks = name_of(nfe, grain), starts[grain].masks if grain != "dense" else {}
            weights = starts[grain].weights if grain != "dense" else {}
            beginning = beginning_of(teacher, nfe, grain, weights, inputs, few, params.seed)
            learned = train_student(teacher, nfe, grain, beginning, masks, pairs, net, few, params.bf16, params.seed, inputs)
            save_file(learned.weights, out / f"student_{name}.safetensors")
            file = f"masks_{grain.replace(':', '_')}.safetensors" if masks else None
            entries.append(entry(name, nfe, grain, file, learned.solver.rows()))
            numbers[name] = {"start": beginning.origin, "start_loss": learned.start_loss, "loss": learned.loss,
                             "at": learned.at}
            for kind, found in rows.items():
                found += [(name, *row) for row in getattr(learned, kind)]
    write_json(out / "students.json", entries)
    for kind, found in rows.items():
        with open(out / f"few_{kind}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("student", "step", "loss"), *found])
    return numbers


def grains_of(path: Path) -> list[str]:
    """Those of GRAINS that mask_search found masks of: a network may have no units that can go, which is said there."""
    with safe_open(path, framework="pt") as file:
        held = {key.partition("/")[0] for key in file.keys()}  # noqa: SIM118
    return [grain for grain in GRAINS if grain in held]


def read_tensors(path: Path, grain: str) -> dict[str, Tensor]:
    """Parameter name -> tensor, of one grain of a file of mask_search."""
    found = {key.removeprefix(f"{grain}/"): value for key, value in load_file(path).items() if key.startswith(f"{grain}/")}
    if not found:
        raise ValueError(f"{path}: holds nothing of grain {grain!r}")
    return found


def read_images(folder: Path, name: str, labelled: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 (N, C, H, W), and int64 (N,) labels where the model wants them."""
    return np.load(folder / f"{name}.npy"), np.load(folder / f"{name}_labels.npy") if labelled else None


def pool(teacher: Denoiser, inputs: Inputs, bank_share: float) -> Images:
    """The real training images, then the teacher's samples; without real ones, unread, where bank_share is 1."""
    labelled = teacher.num_classes > 0
    bank, bank_labels = read_images(inputs["pretrain_load"], "bank", labelled)
    if bank_share == 1:
        return Images(pixels=torch.from_numpy(bank), labels=torch.from_numpy(bank_labels) if labelled else None, real=0)
    real, real_labels = read_images(inputs["data"], "train", labelled)
    labels = torch.from_numpy(np.concatenate([real_labels, bank_labels])) if labelled else None
    return Images(pixels=torch.from_numpy(np.concatenate([real, bank])), labels=labels, real=len(real))


def calibration(teacher: Denoiser, data: Path, params: Params) -> Calibration:
    images, labels = read_images(data, "holdout", teacher.num_classes > 0)
    return noised(teacher.schedule, images, labels, params.holdout, torch.Generator().manual_seed(params.seed))


def training_settings(params: Params, teacher: Denoiser) -> Settings:
    settings = Settings(**{field.name: getattr(params, field.name) for field in dataclasses.fields(Settings)})
    return settings if teacher.has_null_label else dataclasses.replace(settings, label_dropout=0.0)


def judge(teacher: Denoiser, grain: str, one_shot: dict[str, Tensor], student: Student, held: Calibration) -> dict:
    """Relative error of the prediction with the masks on the teacher and after training, and what the masks leave."""
    reference = predictions(teacher, held)
    apply_masks(teacher.model, one_shot)
    untrained = relative_error(predictions(teacher, held), reference)
    remove_masks(teacher.model)
    trained = with_model(teacher, copy.deepcopy(teacher.model))
    trained.model.load_state_dict(student.weights)
    kept = kept_shares(teacher.model, grain, student.masks)
    return {"error_one_shot": untrained, "error_trained": relative_error(predictions(trained, held), reference),
            "density": mask_density(student.masks), "macs_share": kept_share(layer_costs(teacher), kept, "macs"),
            "flip_rate_last": student.curve[-1][2] if student.curve else 0.0, "flip_rate_freeze": student.flips_at_freeze}
