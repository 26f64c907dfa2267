"""What arms are to each other: paired differences of quality, ratios of fidelity, measured speed against removed work."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

from benchmarks.sparsity.arms import Arm
from benchmarks.sparsity.lab import Bench, Lab
from benchmarks.sparsity.queue import SAMPLES
from benchmarks.sparsity.study import costs, network_of
from tasks.benchmark.measure import Case, interleaved
from tasks.core import quality
from tasks.core.quality import NORMAL_95, Difference, fid_name
from tasks.core.recipe import Recipe
from tasks.runtime.graph import live_graph

TIMED_BATCH = 8


def against(base: np.ndarray, name: str, lab: Lab, found: np.ndarray) -> dict[str, float]:
    """loss_to_<name>, its _upper95: relative FID increase of the features `found` (n, D) over those of the same seeds in `base`
    (N, D), N >= n, by paired bootstrap. Fewer than SAMPLES stand in the name: loss_to_dense_2k."""
    n = len(found)
    if len(base) < n:
        raise ValueError(f"{name}: {len(base)} samples to compare {n} with")
    metric = f"loss_to_{name}" + ("" if n == SAMPLES else fid_name(n).removeprefix("fid"))
    (fid, fids), (fid_base, fids_base) = (lab.bootstrap.fids(features) for features in (found, base[:n]))
    return named(metric, quality.relative_difference(fid, fid_base, fids, fids_base))


def straying(base: np.ndarray, dense: np.ndarray, found: np.ndarray) -> Difference:
    """Relative increase of the mean distance to the dense images over that of `base`, of the same noise all three: (N, D).
    Samples are pairs; the spread is of a ratio of means, to first order."""
    own, other = (np.linalg.norm(features - dense, axis=1) for features in (found, base))
    ratio = own.mean() / other.mean()
    error = (own - ratio * other).std(ddof=1) / (len(own) ** 0.5 * other.mean())
    return Difference(ratio - 1, error)


@dataclass(frozen=True)
class OverSeeds:
    """A mean over few training seeds. within, between: its variance by samples and digits, and by what the seeds differ by,
    which holds noise of the samples again: too wide rather than too narrow."""

    estimate: float
    within: float
    between: float
    seeds: int

    @classmethod
    def of(cls, estimates: Sequence[float], within: float) -> "OverSeeds":
        return cls(statistics.mean(estimates), within, statistics.variance(estimates) / len(estimates), len(estimates))

    @property
    def upper95(self) -> float:
        """One-sided, by Student's t: a variance known from three seeds is hardly known (Welch-Satterthwaite)."""
        variance = self.within + self.between
        if self.between == 0:
            return Difference(self.estimate, variance ** 0.5).upper95
        freedom = variance ** 2 / (self.between ** 2 / (self.seeds - 1))
        return self.estimate + float(student_t.ppf(0.95, freedom)) * variance ** 0.5


def named(metric: str, difference: Difference | OverSeeds) -> dict[str, float]:
    return {metric: difference.estimate, f"{metric}_upper95": difference.upper95}


def over_seeds(estimates: Sequence[float], bounds: Sequence[float], shared: bool) -> OverSeeds:
    """Mean over training seeds, by the estimates and the 95 % bounds of each. shared: what a seed's bound allows for may be the
    same for all seeds, as the digits are that judge their FID; if not, each has samples of its own and it averages out."""
    errors = [(bound - estimate) / NORMAL_95 for estimate, bound in zip(estimates, bounds, strict=True)]
    within = statistics.mean(errors) ** 2 if shared else sum(error ** 2 for error in errors) / len(errors) ** 2
    return OverSeeds.of(estimates, within)


def speed(lab: Bench, arm: Arm, masks: dict[str, Tensor], budget_s: float) -> dict[str, float]:
    """Measured evaluations per second over those of the dense teacher, interleaved, and what the removed MACs predict. Training
    changes no time, so the masks are on the teacher's own weights."""
    kept_macs = costs(lab, arm, masks)["macs_share"]
    nets = {"dense": lab.teacher, "sparse": network_of(lab, arm, lab.teacher.model.state_dict(), masks)}
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
