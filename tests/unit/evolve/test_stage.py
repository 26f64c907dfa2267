"""The whole stage on a tiny random DiT: what it writes, that it repeats itself, and that a killed search pays nothing twice."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tasks.core.artifacts import Inputs, read_json, write_json
from tasks.core.cluster import Cluster, ClusterParams
from tasks.core.denoiser import build, save
from tasks.core.params import Goal
from tasks.core.recipe import Recipe
from tasks.data.features import FeatureNet, save_feature_net
from tasks.evolve import fitness, stage
from tasks.evolve.fitness import Protocol
from tasks.evolve.lab import EvaluationLog
from tasks.evolve.search import Strategy

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
          "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_type": "ada_norm_zero",
          "norm_elementwise_affine": False}
SCHEDULE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
SERIAL = ClusterParams(address=None, workers=1, cpus_per_worker=1, gpus_per_worker=0.0, max_attempts=2, max_object_mb=64,
                       storage_uri=None, connect_timeout_s=20.0, start_timeout_s=300.0)
PARAMS = stage.Params(
    goal=Goal(target="latency", max_quality_loss=0.05, min_speedup=8.0, max_bitops=0.05, max_size=5000),
    evaluations=16, single_evaluations=6, lookahead=4, timeout_s=60.0, steps=(2, 10), grouping="quadratic",
    solvers=("ddim", "dpm2m"), cache_budgets=(0.0, 0.3), max_masks=3, dense_steps=50, backend="openvino", batch=8,
    distance_per_loss=60.0, seed=0,
    protocol=Protocol(images=4, seed=1, chunk=4, calibration_steps=4, calibration_images=4),
    strategy=Strategy(population=8, top=4, random=0.3, crossover=0.2, mutation=0.2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The artifacts of every upstream stage, as small as they get."""
    root = tmp_path_factory.mktemp("artifacts")
    folder = {name: root / name for name in stage.INPUTS}
    for path in folder.values():
        path.mkdir()
    torch.manual_seed(0)
    teacher = build("DiTTransformer2DModel", CONFIG, SCHEDULE)
    save(teacher, folder["pretrain_load"] / "teacher")
    net = {"trunk": "plain", "width": 4, "channels": 1, "classes": 3}
    save_feature_net(FeatureNet(**net), folder["data"], "search")
    write_json(folder["data"] / "data.json", {"feature_nets": {"search": net}})
    write_profile(folder["profile"], list(teacher.prunable_layers()))
    write_json(folder["mask_search"] / "choice.json", {"chosen": "unit"})
    write_student(folder["distill"], teacher)
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


def write_errors(folder, sublayers) -> None:
    grid = list(range(99, -1, -10))
    gap = np.subtract.outer(np.arange(10), np.arange(10)).T.astype(float)
    errors = np.where(gap >= 0, 0.01 * gap, np.nan)[None] * np.arange(1, len(sublayers) + 1)[:, None, None]
    np.save(folder / "errors.npy", errors)
    write_json(folder / "grid.json", {"timesteps": grid, "sublayers": sublayers})
    write_json(folder / "plan.json", {"timesteps": [99, 74, 49, 24]})


def run(params, folders, out, workers: int = 1):
    out.mkdir(parents=True)
    cluster = Cluster(replace(SERIAL, workers=workers))
    try:
        return stage.run(params, Inputs(folders, "key", cluster), out)
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def first(folders, tmp_path_factory):
    """One run: its working directory, its output folder, its report."""
    room = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        report = run(PARAMS, folders, room / "out")
    return room, report


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_writes_what_package_reads(first):
    room, report = first
    best = Recipe.from_json(read_json(room / "out" / "recipe.json"))
    single = {k: Recipe.from_json(v) for k, v in read_json(room / "out" / "single.json").items()}
    assert (best.sparsity is None) == (report.numbers["best"]["weights"] == "teacher")
    assert single["timesteps"].nfe == best.nfe and not single["timesteps"].precision
    assert single["precision"].timesteps == (99, 74, 49, 24) and single["precision"].sparsity is None
    assert set(contents(room / "out")) == {"recipe.json", "single.json", "pareto.csv", "evaluations.jsonl"}


def test_every_evaluation_is_within_the_bound_and_the_best_is_the_nearest(first):
    room, report = first
    rows = [json.loads(line) for line in (room / "out" / "evaluations.jsonl").read_text().splitlines()]
    assert len(rows) == 16 == report.numbers["evaluations"] and report.numbers["failed"] == 0
    assert all(row["cost"] <= 1 / 8 for row in rows)
    grains = [row["recipe"]["sparsity"] for row in rows]
    assert None in grains, "the dense weights compete"
    assert all(g["density"]["transformer_blocks.0.ff.net.0.proj"] == 0.5 for g in grains if g) and any(grains)
    assert report.numbers["best"]["distance"] == min(row["distance"] for row in rows)
    assert sorted(rows, key=lambda row: row["cost"]) == rows
    volumes = [volume for _, volume in report.numbers["hypervolume"]]
    assert volumes == sorted(volumes) and volumes[-1] > 0


def test_repeats_itself_and_pays_nothing_twice(first, folders, tmp_path, monkeypatch):
    """The second run finds the first one's log, less its last lines, as after a kill: only those are evaluated again."""
    room, report = first
    monkeypatch.chdir(tmp_path)
    (log,) = (room / "runs" / "evolve").iterdir()
    lines = log.read_text().splitlines(keepends=True)
    (tmp_path / "runs" / "evolve").mkdir(parents=True)
    (tmp_path / "runs" / "evolve" / log.name).write_text("".join(lines[:-3]) + lines[-3][:20])
    sampled = []
    monkeypatch.setattr(fitness, "sample_in_chunks", counted(fitness.sample_in_chunks, sampled))
    assert run(PARAMS, folders, tmp_path / "out") == report
    assert contents(tmp_path / "out") == contents(room / "out") and len(sampled) == 3
    assert sorted((tmp_path / "runs" / "evolve" / log.name).read_text().splitlines()) == sorted(line.strip() for line in lines)


def counted(function, calls: list):
    def wrapper(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)
    return wrapper


def test_other_seed_other_search(first, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(first[0])  # the log is shared: evaluations of equal recipes are found there
    report = run(replace(PARAMS, seed=1), folders, tmp_path / "out")
    assert contents(tmp_path / "out")["evaluations.jsonl"] != contents(first[0] / "out")["evaluations.jsonl"]
    assert report.numbers["evaluations"] == 16


@pytest.mark.parametrize("target", ["bitops", "size"])
def test_other_targets_search_bits(folders, tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    params = replace(PARAMS, goal=replace(PARAMS.goal, target=target, max_bitops=0.02, max_size=8000), evaluations=6,
                     single_evaluations=2)
    report = run(params, folders, tmp_path / "out")
    precision = Recipe.from_json(read_json(tmp_path / "out" / "recipe.json")).precision
    assert all(token[0] == "w" for token in precision.values()) and len(precision) > 10
    assert report.numbers["best"]["cost"] <= report.numbers["goal"]["bound"]


def test_goal_out_of_reach_is_one_line_with_the_nearest(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = replace(PARAMS, goal=replace(PARAMS.goal, min_speedup=5000.0))
    with pytest.raises(ValueError, match=r"goal.min_speedup: 5000.0 is out of reach; .* feasible is \d+.* with 2 steps"):
        run(params, folders, tmp_path / "out")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_workers_write_the_same_files(first, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(PARAMS, folders, tmp_path / "out", workers=2) == first[1]
    assert contents(tmp_path / "out") == contents(first[0] / "out")


def test_a_torn_last_line_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "log.jsonl"
    log = EvaluationLog(path)
    log.add("a", 1.5)
    log.add("b", [[0.1, 0.2]])
    path.write_bytes(path.read_bytes()[:-4])
    again = EvaluationLog(path)
    assert again.known == {"a": 1.5}
    again.add("c", 2.5)
    assert EvaluationLog(path).known == {"a": 1.5, "c": 2.5}


@pytest.mark.parametrize("key, value", [("steps", (5, 3)), ("cache_budgets", (0.5, 0.2)), ("solvers", ("euler",)),
                                        ("evaluations", 0)])
def test_params_name_the_bad_value(key, value):
    with pytest.raises(ValueError, match=key):
        replace(PARAMS, **{key: value})
