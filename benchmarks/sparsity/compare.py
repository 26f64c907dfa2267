"""What arms are to each other: paired differences of quality, ratios of fidelity, measured speed against removed work."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from benchmarks.sparsity.arms import Arm, key
from benchmarks.sparsity.lab import Lab
from benchmarks.sparsity.queue import SAMPLES
from benchmarks.sparsity.study import network_of, student_of
from tasks.benchmark.measure import Case, interleaved
from tasks.core.quality import Difference, fid_name
from tasks.core.recipe import Recipe
from tasks.fid.measure import losses
from tasks.runtime.graph import live_graph

MARGIN = 0.05       # relative FID increase that still counts as equal
RESAMPLES = 1000
TIMED_BATCH = 8


def against(base: np.ndarray, name: str, lab: Lab, found: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """arm -> loss_to_<name>, its _upper95: relative FID increase over the features `base` (N, D), by paired bootstrap.

    found: features of each arm, (n, D) of the first n <= N samples. Fewer than SAMPLES stand in the name: loss_to_dense_2k.
    """
    rows = {}
    for arm, features in found.items():
        n = len(features)
        pair = {"dense": base[:n], "other": features}  # `losses` compares with what is called dense
        loss = losses(pair, lab.judge, lab.strata(n), MARGIN, RESAMPLES, np.random.default_rng(0))["other"]
        metric = f"loss_to_{name}" + ("" if n == SAMPLES else fid_name(n).removeprefix("fid"))
        rows[arm] = {metric: loss["loss"], f"{metric}_upper95": loss["loss_upper95"]}
    return rows


def features_of(lab: Lab, arm: Arm, seed: int, samples: int) -> np.ndarray:
    return np.load(lab.folder / "features" / f"{key(arm, seed)}-{samples}.npy")


def over_seeds(estimates: Sequence[float], uppers: Sequence[float]) -> Difference:
    """One difference from those of several training seeds, judged on the same noise and holdout: what that noise adds does not
    average out, what the seeds add does."""
    errors = [(upper - estimate) / 1.6449 for estimate, upper in zip(estimates, uppers, strict=True)]
    between = statistics.variance(estimates) / len(estimates) if len(estimates) > 1 else 0.0
    return Difference(statistics.mean(estimates), (statistics.mean(error**2 for error in errors) + between) ** 0.5)


def speed(lab: Lab, arm: Arm, seed: int, kept_macs: float, budget_s: float) -> dict[str, float]:
    """Measured evaluations per second over those of the dense teacher, interleaved, and what the removed MACs predict."""
    weights, masks, _ = student_of(arm, lab, seed)
    nets = {"dense": lab.teacher, "sparse": network_of(lab, arm, weights, masks)}
    found = {"speedup_predicted": 1 / kept_macs}
    for backend in ("eager", "openvino"):
        cases = [Case(variant=name, backend=backend, batch=TIMED_BATCH, run=evaluation(net, backend), scale=1.0)
                 for name, net in nets.items()]
        times = interleaved(cases, warmup=5, min_repeats=20, max_repeats=400, budget_s=budget_s)
        dense, sparse = (statistics.median(times[case.key]) for case in cases)
        found[f"speedup_{backend}"] = dense / sparse
    return found


def evaluation(denoiser, backend: str):
    """One evaluation of TIMED_BATCH images."""
    x = torch.randn(TIMED_BATCH, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, denoiser.schedule.steps - 1, TIMED_BATCH).long()
    labels = torch.arange(TIMED_BATCH) % denoiser.num_classes if denoiser.num_classes else None
    predict = live_graph(denoiser, Recipe(timesteps=(0,)), TIMED_BATCH) if backend == "openvino" else (
        lambda x, t, labels, step: denoiser(x, t, labels))

    @torch.inference_mode()
    def run() -> None:
        predict(x, t, labels, 0)

    return run
