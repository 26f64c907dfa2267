"""How well the search's proxies rank: each on few images and on all against FID of many, candidate by candidate.

Candidates come from a search of their own, spread over its costs, half of them on its front if it has so many, with those that
have a learned solver. Samples are drawn through OpenVINO, from fresh noise, and judged by the net that no search sees, against
real images that nothing has seen; their features are kept below runs/.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks import results
from benchmarks.holdout import load_unseen
from tasks.core.artifacts import digest
from tasks.core.denoiser import Denoiser
from tasks.core.progress import track
from tasks.core.quality import Gaussian, features, fid
from tasks.core.recipe import Recipe
from tasks.core.sampler import sample_in_chunks
from tasks.data.features import load_feature_net
from tasks.evolve.fitness import Evaluator
from tasks.evolve.proxy import PROXIES, loss_of, seen
from tasks.evolve.search import Evaluation, pareto_front
from tasks.runtime.graph import live_graph
from tasks.runtime.precision import Ranges, apply_precision, remove_precision

NOISE = 41_000  # seed of the samples that are judged: neither the search's nor fid's
BATCH = 100     # images of a network evaluation while sampling
MARGIN = 0.02   # relative FID increase below which 10,000 samples do not tell it from none


@dataclass(frozen=True)
class Judged:
    """One candidate: its proxies, by name and number of images, and its quality."""

    cost: float
    proxies: Mapping[str, float]
    fid: float


def spread(told: Sequence[Evaluation], n: int) -> list[Evaluation]:
    """n of the evaluated, evenly by rank of cost: every other one of the front, then of the rest, at least one of each."""
    front = pareto_front(told)
    rest = sorted((e for e in told if e.loss is not None and e not in front), key=lambda e: (e.cost, e.loss))
    on_front = min(len(front), n // 2)
    return [*evenly(front, on_front), *evenly(rest, min(len(rest), n - on_front))]


def evenly(items: Sequence, n: int) -> list:
    """n of them, the first and the last among them."""
    return [items[i] for i in np.linspace(0, len(items) - 1, n).round().astype(int)] if n else []


def sample_features(denoiser: Denoiser, recipe: Recipe, ranges: Ranges, net: torch.nn.Module, n: int, label: str,
                    noise: int = NOISE, first: int = 0) -> np.ndarray:
    """(n, D) of samples first .. first + n - 1, through the graphs that a package would hold. noise: its seed."""
    apply_precision(denoiser.model, recipe.precision, ranges)
    try:
        predict = live_graph(denoiser, recipe, BATCH)
    finally:
        remove_precision(denoiser.model)
    chunks = sample_in_chunks(predict, denoiser.schedule, recipe, denoiser.sample_shape, n, noise, denoiser.num_classes, BATCH,
                              first)
    return np.concatenate([features(net, images) for images in track(chunks, -(-n // BATCH), label)])


def judge(warm: Evaluator, items: Sequence[tuple[str, Recipe, float]], references: tuple[np.ndarray, np.ndarray],
          bank: Gaussian, data: Path, work: Path, images: Sequence[int], samples: int) -> Iterator[Judged]:
    """items: weights, recipe, cost. references: the dense teacher's features at 50 and at 100 steps; bank: see
    `tasks.evolve.proxy`; images: numbers of the first ones that proxies are taken on."""
    net = load_feature_net(data, "report")
    unseen, _ = load_unseen("judges", warm.weights["teacher"].sample_shape)
    reference = Gaussian.of(features(net, unseen))
    for k, (name, recipe, cost) in enumerate(items):
        denoiser, found = warm.weights[name], warm((name, recipe))
        remove_precision(denoiser.model)
        path = work / f"{digest([name, recipe.to_json(), samples])}.npy"
        sampled = results.kept(path, lambda: sample_features(denoiser, recipe, warm.ranges[name], net, samples,  # noqa: B023
                                                  f"candidate {k + 1} of {len(items)}"))              # noqa: B023
        yield Judged(cost, proxies_of(found, references, bank, images), fid(sampled, reference))


def proxies_of(found: np.ndarray, references: tuple[np.ndarray, np.ndarray], bank: Gaussian,
               images: Sequence[int]) -> dict[str, float]:
    """Every proxy on every number of images."""
    kept = {n: seen(found[:n], (references[0][:n], references[1][:n]), bank) for n in images}
    return {f"{proxy}_{n}": loss_of(kept[n], proxy) for n in images for proxy in PROXIES}


def rank_correlations(judged: Sequence[Judged]) -> dict[str, float]:
    """Spearman's rho of each proxy to FID."""
    fids = [one.fid for one in judged]
    return {f"spearman_{name}": float(spearmanr([one.proxies[name] for one in judged], fids).statistic)
            for name in judged[0].proxies}


def per_loss(judged: Sequence[Judged], dense: float) -> dict[str, float]:
    """What of each proxy goes with a relative FID increase of 1, by the candidates of at most twice dense's FID: the median,
    and the lower quartile, the safer value of `evolve.distance_per_loss`. Nothing if there are no such candidates."""
    near = [(one, one.fid / dense - 1) for one in judged if MARGIN < one.fid / dense - 1 <= 1]
    found = {}
    for name in judged[0].proxies if near else ():
        ratios = [one.proxies[name] / loss for one, loss in near]
        found |= {f"per_loss_{name}": float(np.median(ratios)), f"per_loss_{name}_q25": float(np.quantile(ratios, 0.25))}
    return found
