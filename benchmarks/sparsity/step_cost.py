"""What a step of sparse training costs against a dense one, on both shipped teachers.

`python -m benchmarks.sparsity.step_cost` takes a few minutes and replaces its own rows (metrics step_*) in results.csv. A dense
step is forward, backward, AdamW and EMA of the same model, without teacher or masks. The variants take turns, step by step, and
each is divided by the dense step of its own round, so what else the machine does meanwhile weighs on all alike.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from benchmarks import results
from tasks.core import denoiser as denoisers
from tasks.core.denoiser import Denoiser
from tasks.core.memory import keep_freed_memory
from tasks.core.params import read_params, stage_params
from tasks.core.sparsity import grain_mask
from tasks.distill import stage
from tasks.distill.images import Images
from tasks.distill.settings import Settings
from tasks.distill.train import Transfer

RESULTS = Path(__file__).parent / "results.csv"
TEACHERS = Path("tasks/pretrain_load/teachers")
VARIANTS = {  # name -> method, and what differs from params.yaml
    "dense": ("dense", {"data": 1.0, "lam": 0.0, "features": 0.0}),
    "dense_taught": ("dense", {"features": 0.0}),
    "fixed": ("fixed", {"features": 0.0}),
    "ste": ("ste", {"features": 0.0}),
    "sr_ste": ("sr_ste", {"features": 0.0}),
    "sr_ste_decoupled": ("sr_ste", {"features": 0.0, "decay": "decoupled"}),
    "ours": ("fixed", {}),
}


def two_four(teacher: Denoiser) -> dict[str, Tensor]:
    """2:4 masks of every layer that takes them: more than the pipeline covers, so no less work."""
    return {f"{name}.weight": grain_mask(layer.weight.abs(), "2:4") for name, layer in teacher.prunable_layers().items()
            if layer.weight.shape[1] % 4 == 0}


def noise_images(teacher: Denoiser, n: int) -> Images:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, *teacher.sample_shape), generator=rng, dtype=torch.uint8)
    labels = torch.arange(n) % teacher.num_classes if teacher.num_classes else None
    return Images(pixels=pixels, labels=labels, real=n // 2)


def transfers(teacher: Denoiser, settings: Settings) -> dict[str, Transfer]:
    masks, images = two_four(teacher), noise_images(teacher, 4 * settings.batch)
    return {name: Transfer(teacher, masks, "2:4", method, images, replace(settings, **changes))
            for name, (method, changes) in VARIANTS.items()}


def timed(transfer: Transfer, i: int) -> tuple[float, float]:
    """-> s of step i, s of recomputing its masks once more."""
    started = time.perf_counter()
    transfer.step(i)
    stepped = time.perf_counter()
    transfer.masks_at(i)
    return stepped - started, time.perf_counter() - stepped


def measure(teacher: Denoiser, settings: Settings, repeats: int, warm: int = 3) -> dict[str, list[tuple[float, float]]]:
    """Variant -> (s of a step, s of its masks) of each round."""
    keep_freed_memory()  # as `optimise` does
    running = transfers(teacher, settings)
    rounds = [{name: timed(transfer, i) for name, transfer in running.items()} for i in range(warm + repeats)]
    return {name: [times[name] for times in rounds[warm:]] for name in running}


def numbers(times: list[tuple[float, float]], dense: list[tuple[float, float]]) -> dict[str, float]:
    """Medians, and the quartiles of the ratio. The ratio leaves the recomputation of masks out, as its bar does."""
    ratios = [(step - masks) / base for (step, masks), (base, _) in zip(times, dense, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {"step_ms": 1e3 * median(step for step, _ in times), "step_masks_ms": 1e3 * median(masks for _, masks in times),
            "step_ratio": median(ratios), "step_ratio_q25": low, "step_ratio_q75": high,
            "step_ratio_with_masks": median(step / base for (step, _), (base, _) in zip(times, dense, strict=True))}


def protocol(settings: Settings, repeats: int) -> str:
    return (f"{results.machine()}; batch {settings.batch}; {'bf16 autocast' if settings.bf16 else 'fp32'}; "
            f"2:4 in every layer that takes it; {repeats} interleaved rounds")


def study(names: Iterable[str], repeats: int) -> list[dict]:
    params = stage_params(stage, read_params(scale="full"))
    rows = []
    for name in names:
        teacher = denoisers.load(TEACHERS / name)
        settings = stage.training_settings(params, teacher)
        times = measure(teacher, settings, repeats)
        rows += [{"teacher": name, "variant": variant, "seed": settings.seed, "metric": metric, "value": round(value, 4),
                  "protocol": protocol(settings, repeats)}
                 for variant in times for metric, value in numbers(times[variant], times["dense"]).items()]
    return rows


def write(rows: list[dict], path: Path = RESULTS) -> None:
    """Whole or not at all; rows of other metrics and teachers stay."""
    teachers = {row["teacher"] for row in rows}
    results.replace(path, lambda row: row["metric"].startswith("step_") and row["teacher"] in teachers, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="rounds that count, 2..; 3 more come before them")
    parser.add_argument("--teachers", nargs="+", default=["mnist_dit", "mnist_unet"])
    given = parser.parse_args()
    try:
        found = study(given.teachers, given.repeats)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write(found)
    for row in found:
        print(f"{row['teacher']:12} {row['variant']:18} {row['metric']:24} {row['value']}")
