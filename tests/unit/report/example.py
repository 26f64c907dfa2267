"""What ten stages leave behind, made up but of the right shape: every number is arithmetic that a test can redo."""

import csv
import json

import numpy as np

from tasks.core.artifacts import Inputs, write_json
from tasks.core.params import Goal
from tasks.core.recipe import CachePlan, Recipe
from tasks.report.results import VARIANTS
from tasks.report.stage import INPUTS, Params

# NFE, FID, loss bound, fidelity, images/s in OpenVINO at batch 32, bytes
NUMBERS = {
    "dense": (50, 5.40, None, 0.0, 60.0, 9_400_000),
    "few_steps_ddim": (8, 9.10, 0.79, 4.1, 372.0, 9_400_000),
    "few_steps_dpm": (8, 8.60, 0.70, 3.7, 371.0, 9_400_000),
    "sparse": (20, 7.90, 0.55, 3.2, 150.0, 5_600_000),
    "sparse_distilled": (20, 5.70, 0.10, 2.0, 150.0, 5_600_000),
    "cache": (20, 5.60, 0.08, 1.1, 231.0, 9_400_000),
    "precision": (20, 5.45, 0.04, 0.4, 395.0, 2_700_000),
    "timesteps": (10, 5.52, 0.06, 1.4, 300.0, 9_400_000),
    "dull_best": (13, 5.60, 0.09, 1.2, 610.0, 2_500_000),
    "compressed": (9, 5.50, 0.045, 1.3, 840.0, 2_600_000),
}
REAL = 5.0  # FID of as many real images
LAYERS = [f"transformer_blocks.{i}.{name}" for i in range(6)
          for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")]
SUBLAYERS = tuple(f"transformer_blocks.{i}.{name}" for i in range(6) for name in ("attn1", "ff"))
GOAL = Goal(target="latency", max_quality_loss=0.05, min_speedup=8.0, max_bitops=None, max_size=None)
PARAMS = Params(goal=GOAL, backend="openvino", batch=32, images=40, columns=8)


def fid_report(numbers=NUMBERS):
    report = {name: {"fid_1k": fid, "kid": fid / 1000, "precision": 0.9, "recall": 0.8, "fidelity": fidelity, "nfe": nfe,
                     "solver": "ddim", "class_accuracy": 0.97, "loss": fid / numbers["dense"][1] - 1, "loss_upper95": bound,
                     "loss_p_holm": 0.01 if bound is not None and bound <= 0.05 else 0.5, "fid_sd": 0.2,
                     "loss_above_real": (fid - numbers["dense"][1]) / (numbers["dense"][1] - REAL)}
              for name, (nfe, fid, bound, fidelity, *_) in numbers.items()}
    report["dense"] = {k: v for k, v in report["dense"].items() if not k.startswith("loss")} | {"fid_real": REAL}
    report["compressed"] |= {"loss_to_dull_best_upper95": 0.03, "fidelity_same_solver": 0.4, "memorised": 0.002}
    report["dull_best"] |= {"point": "dpm2m_uniform_14_int8", "as_good_as_compressed": True}
    return report | {"protocol": {"samples": 1000, "seed": 1, "feature net": "report"}}


def dull_rows():
    """The grid as fid/dull.csv holds it."""
    return [{"name": f"{solver}_uniform_{steps}_{precision}", "precision": precision, "images_per_s": 3000 * factor / steps,
             "kid_above": 1.6 / steps**1.6 + shift - 0.03, "best": (solver, steps, precision) == ("dpm2m", 14, "int8")}
            for solver, shift in (("ddim", 0.013), ("dpm2m", 0.01)) for steps in (5, 7, 10, 14, 20, 30, 50)
            for precision, factor in (("fp32", 1.0), ("bf16", 1.8), ("int8", 2.6))] + [{"name": "compressed", "kid_above": 0.0}]


def benchmark_reports(numbers=NUMBERS):
    costs = {name: {"macs": nfe * 20_000_000, "bitops": nfe * 20_000_000 * 64, "size_bytes": size}
             for name, (nfe, *_, size) in numbers.items()}
    timings = {name: {"openvino": {**timed(speed, 32), **timed(speed / 2, 1), "peak_memory_bytes": 90_000_000},
                      "eager": {**timed(speed / 3, 32), **timed(speed / 8, 1)}} for name, (*_, speed, _) in numbers.items()}
    for name, (*_, speed, _) in numbers.items():
        timings[name]["openvino"]["b32"] |= between("speedup", speed / numbers["dense"][-2])
    timings["compressed"]["openvino"]["b32"] |= between("over_dull_best", numbers["compressed"][-2] / numbers["dull_best"][-2])
    machine = {"cpu": "Example CPU", "cores": 2, "flags": ["avx2"], "gpus": []}
    return costs, timings | {"machine": machine, "protocol": {"threads": 2, "warmup": 1, "min_repeats": 3, "max_repeats": 9}}


def timed(images_per_s, batch):
    return {f"b{batch}": {"images_per_s": images_per_s, "latency_ms_p50": 1e3 * batch / images_per_s, "spread": 0.02,
                           "repeats": 9}}


def between(name, ratio):
    return {f"{name}_low": 0.96 * ratio, f"{name}_high": 1.04 * ratio}


def digits(n, noise, rng):
    """uint8 (n, 1, 28, 28), real digits enlarged."""
    from sklearn.datasets import load_digits
    small = load_digits().images[:n].repeat(3, axis=1).repeat(3, axis=2)
    grey = np.pad(small * 15.9 + noise * rng.normal(size=small.shape), ((0, 0), (2, 2), (2, 2)))
    return grey.clip(0, 255).astype(np.uint8)[:, None]


def write_package(folder):
    rng = np.random.default_rng(0)
    steps = tuple(range(940, -1, -110))
    compute = rng.random((len(steps), len(SUBLAYERS))) < 0.6
    compute[0] = True
    plan = CachePlan(sublayers=SUBLAYERS, compute=tuple(tuple(map(bool, row)) for row in compute))
    precision = {name: ("w8a8", "bf16", "w8a8")[i % 3] for i, name in enumerate(LAYERS)}
    recipes = {"compressed": Recipe(timesteps=steps, cache=plan, precision=precision,
                                    sparsity={"grain": "unit", "density": {n: 0.7 for n in LAYERS if "ff" in n}}),
               "cache": Recipe(timesteps=steps, cache=plan),
               "dull_int8": Recipe(timesteps=steps, precision=dict.fromkeys(LAYERS, "w8a8"))}
    for name, recipe in recipes.items():
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "recipe.json", recipe.to_json())


def write_search(folder):
    """Six candidates: the last one failed, the third one is beaten, the nearest one ships."""
    folder.mkdir()
    recipes = [Recipe(timesteps=tuple(range(900, 0, -900 // steps)), precision={LAYERS[0]: token}) for steps, token in
               ((5, "w8a8"), (6, "bf16"), (9, "w8a8"), (10, "w8a8"), (15, "fp32"), (18, "bf16"))]
    rows = [{"asked": 5 - k, "cost": 0.02 * recipe.nfe, "distance": 20 / recipe.nfe + 4 * (k == 2) if k < 5 else None,
             "weights": "teacher", "recipe": recipe.to_json()}
            for k, recipe in enumerate(recipes)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "recipe.json", recipes[4].to_json())


def search_report():
    """The nearest ships, for nothing holds the quality; a dull point is as near."""
    best, dull = ({"nfe": nfe, "solver": solver, "weights": weights, "cost": 0.3, "distance": distance}
                  for nfe, solver, weights, distance in ((15, "ddim", "student_unit", 1.5), (14, "dpm2m", "teacher", 1.25)))
    return {"hypervolume": [[3, 0.2], [6, 0.5]], "best": best, "goal": {"tolerated_distance": 0.55},
            "choice": {"rule": "nearest", "proxy": "paired", "nearest": best, "cheapest": None},
            "dull": {"ahead": False, "nearest_at_its_cost": dull, "cheapest_as_near": dull}}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def curve(delay):
    return [{"step": step, "loss": 0.04 + 0.2 / (step + delay)} for step in range(0, 300, 5)]


def write_tree(folder):
    """Artifacts, reports and run records below `folder`. -> the report stage's inputs."""
    reports, runs, artifacts = (folder / name for name in ("reports", "runs", "artifacts"))
    for made in (reports, runs, artifacts / "fid" / "samples"):
        made.mkdir(parents=True)
    costs, timings = benchmark_reports()
    teacher = {"parameters": 2_100_000, "class_accuracy": 0.962, "fid_1k": 5.4, "fid_1k_real": 3.7}
    for name, report in {"fid": fid_report(), "benchmark": costs, "benchmark.timings": timings, "data": {"train": 4000},
                         "evolve": search_report(),
                         "pretrain_load": teacher}.items():
        write_json(reports / f"{name}.json", report)
    for i, stage in enumerate(INPUTS):
        newest = stage == "fid"  # run again after the others
        record = {"started": 100.0 * newest + i, "commit": "89abcdef" if newest else "01234567", "wall_s": 7.0 * (i + 1)}
        write_json(runs / f"{stage}.json", record | {"torch": "2.13", "python": "3.11"})
    for i, name in enumerate(VARIANTS):
        np.save(artifacts / "fid" / "samples" / f"{name}.npy", digits(40, 3.0 * i, np.random.default_rng(i)))
    write_package(artifacts / "package")
    write_search(artifacts / "evolve")
    (artifacts / "finish").mkdir()
    write_json(artifacts / "finish" / "weights.json", {"name": "student_unit", "file": "student_unit.safetensors",
                                                       "grain": "unit", "masks": "masks_unit.safetensors", "finished": True})
    (artifacts / "mask_search").mkdir()
    plans = {name: {"cost": 0.81, "error": {"predicted": error, "measured": error}}
             for name, error in (("unit", 0.05), ("mixed", 0.04))}
    write_json(artifacts / "mask_search" / "choice.json", {"chosen": "unit", "why": "latency: 2:4 1.000, unit 0.810",
                                                           "plans": plans, "budget": {"counted": "us of 8 images on openvino"}})
    write_rows(artifacts / "fid" / "dull.csv", dull_rows())
    write_rows(artifacts / "distill" / "curve.csv",
               [{"grain": grain, **row} for grain, delay in (("2:4", 5), ("unit", 8)) for row in curve(delay)])
    write_rows(artifacts / "cache_learn" / "curve.csv", curve(5))
    return Inputs({stage: artifacts / stage for stage in INPUTS}, "key")
