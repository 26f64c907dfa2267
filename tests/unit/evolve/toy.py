"""The artifacts of every stage upstream of evolve, as small as they get, and a run of the stage on them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tasks.core.artifacts import Inputs, Report, write_json
from tasks.core.cluster import Cluster, ClusterParams
from tasks.core.denoiser import build, save
from tasks.core.params import Goal
from tasks.data.features import FeatureNet, save_feature_net
from tasks.evolve import stage
from tasks.evolve.finals import Finals
from tasks.evolve.fitness import Protocol
from tasks.evolve.promote import Promotion
from tasks.evolve.search import Strategy
from tasks.runtime.solver import solver_steps

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
          "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_type": "ada_norm_zero",
          "norm_elementwise_affine": False}
SCHEDULE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction",
            "timestep_spacing": "trailing", "clip_sample": False}  # unclipped: dense steps as DDIM candidates do
SERIAL = ClusterParams(address=None, workers=1, cpus_per_worker=1, gpus_per_worker=0.0, max_attempts=2, max_object_mb=64,
                       storage_uri=None, connect_timeout_s=20.0, start_timeout_s=300.0)
PARAMS = stage.Params(
    goal=Goal(target="latency", max_quality_loss=0.05, min_speedup=8.0, max_bitops=0.05, max_size=5000),
    evaluations=16, single_evaluations=6, lookahead=4, timeout_s=60.0, steps=(2, 10), grouping="quadratic",
    solvers=("ddim", "dpm2m"), cache_budgets=(0.0, 0.3), cache_masks=(2, 3), dense_steps=50, edge_bits=3,
    rounding_steps=0, backend="openvino", batch=8,
    distance_per_loss=60.0, proxy="paired", seed=0,
    finals=Finals(images=0, finalists=4, resamples=20, seed=5),
    protocol=Protocol(images=4, seed=1, chunk=4, calibration_steps=4, calibration_images=4, prefix_mb=8),
    promotion=Promotion(images=0, z=2.0), strategy=Strategy(population=8, top=4, random=0.3, crossover=0.2, mutation=0.2))


def artifacts(root: Path) -> dict[str, Path]:
    folder = {name: root / name for name in (*stage.INPUTS, "solver_learn")}
    for path in folder.values():
        path.mkdir(parents=True)
    torch.manual_seed(0)
    teacher = build("DiTTransformer2DModel", CONFIG, SCHEDULE)
    save(teacher, folder["pretrain_load"] / "teacher")
    np.save(folder["data"] / "train.npy", np.random.default_rng(1).integers(0, 256, (100, 1, 8, 8), np.uint8))
    np.save(folder["pretrain_load"] / "bank.npy", np.random.default_rng(0).integers(0, 256, (100, 1, 8, 8), np.uint8))
    net = {"trunk": "plain", "width": 4, "channels": 1, "classes": 3}
    save_feature_net(FeatureNet(**net), folder["data"], "search")
    write_json(folder["data"] / "data.json", {"feature_nets": {"search": net}})
    write_profile(folder["profile"], list(teacher.prunable_layers()))
    write_json(folder["mask_search"] / "choice.json", {"chosen": "unit"})
    write_student(folder["distill"], teacher)
    write_few_steps(folder["distill"], teacher)
    solvers = {"3": own_steps(95, 60, 25), "5": own_steps(95, 75, 55, 35, 15)}
    write_json(folder["solver_learn"] / "solvers.json", {"dense": solvers})
    write_errors(folder["cache_learn"], [s.name for s in teacher.sublayers()])
    return folder


def write_profile(folder, layers) -> None:
    times = {"fp32": 80, "bf16": 50, "int8": 30}
    rows = [f"{name},linear,openvino,{token},dense,1.0,8,{us}" for name in layers for token, us in times.items()]
    (folder / "layers.csv").write_text("\n".join(["layer,kind,backend,precision,grain,density,batch,time_us", *rows]) + "\n")
    wholes = [f"openvino,{token},8,{us * len(layers) + 100},0.1" for token, us in times.items()]
    (folder / "model.csv").write_text("\n".join(["backend,precision,batch,time_us,spread", *wholes]) + "\n")


def write_student(folder, teacher) -> None:
    """Half of the hidden units of block 0 are gone."""
    name = "transformer_blocks.0.ff.net.0.proj"
    state = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    mask = torch.ones_like(state[f"{name}.weight"], dtype=torch.bool)
    mask[::2] = False
    reader = "transformer_blocks.0.ff.net.2.weight"
    masks = {f"{name}.weight": mask, f"{name}.bias": mask[:, 0].clone(),
             reader: mask[:, 0].expand_as(state[reader]).clone()}
    for key, kept in masks.items():
        state[key] *= kept
    save_file(state, folder / "student_unit.safetensors")
    save_file({k: m.to(torch.uint8) for k, m in masks.items()}, folder / "masks_unit.safetensors")


def write_few_steps(folder, teacher) -> None:
    """A dense student of two evaluations, and one of four whose units are those of the other student."""
    torch.manual_seed(1)
    state = {k: v + 0.01 * torch.randn(v.shape) for k, v in teacher.model.state_dict().items()}
    save_file(state, folder / "student_few_2.safetensors")
    save_file(load_file(folder / "student_unit.safetensors"), folder / "student_few_4.safetensors")
    write_json(folder / "students.json", [
        {"name": "few_2", "file": "student_few_2.safetensors", "masks": None, "grain": None, "nfe": 2, **own_steps(97.5, 40)},
        {"name": "few_4", "file": "student_few_4.safetensors", "masks": "masks_unit.safetensors", "grain": "unit", "nfe": 4,
         **own_steps(98, 70, 40, 12.25)}])


def own_steps(*times: float) -> dict:
    """timesteps and rows of a solver whose times lie between timesteps: DPM-Solver++'s rows with other times."""
    timesteps = [round(t) for t in times]
    rows = zip(solver_steps(SCHEDULE, timesteps, "dpm2m"), times, strict=True)
    return {"timesteps": timesteps, "rows": [replace(row, t=float(t)).to_json() for row, t in rows]}


def write_errors(folder, sublayers) -> None:
    grid = list(range(99, -1, -10))
    gap = np.subtract.outer(np.arange(10), np.arange(10)).T.astype(float)
    errors = np.where(gap >= 0, 0.01 * gap, np.nan)[None] * np.arange(1, len(sublayers) + 1)[:, None, None]
    np.save(folder / "errors.npy", errors)
    np.save(folder / "products.npy", np.exp(-gap**2 / 50)[None].repeat(len(sublayers), axis=0))
    write_json(folder / "grid.json", {"timesteps": grid, "sublayers": sublayers, "growth": [1.0] * 10, "forecast": "none"})
    write_json(folder / "plan.json", {"timesteps": [99, 74, 49, 24]})


def run(params: stage.Params, folders: dict[str, Path], out: Path, workers: int = 1) -> Report:
    out.mkdir(parents=True)
    cluster = Cluster(replace(SERIAL, workers=workers))
    try:
        return stage.run(params, Inputs(folders, "key", cluster), out)
    finally:
        cluster.close()
