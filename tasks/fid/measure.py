"""From samples to the table's numbers. Pure: arrays in, dictionaries of numbers out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from tasks.core import quality
from tasks.core.quality import Gaussian

NEIGHBOURS = 1000  # samples whose nearest images are looked for


@dataclass(frozen=True)
class Judge:
    """A feature net and what the holdout looks like to it. features: (M, D), labels: (M,) or None without classes."""

    net: nn.Module
    features: np.ndarray
    labels: np.ndarray | None
    reference: Gaussian

    @classmethod
    def of(cls, net: nn.Module, holdout: np.ndarray, labels: np.ndarray | None, reference: Gaussian) -> "Judge":
        return cls(net, quality.features(net, holdout), labels, reference)


@dataclass(frozen=True)
class Seen:
    """Samples as the judge sees them: features (N, D), logits (N, K)."""

    features: np.ndarray
    logits: np.ndarray

    @classmethod
    def of(cls, judge: Judge, images: np.ndarray) -> "Seen":
        return cls(*quality.features_and_logits(judge.net, images))


def distribution(seen: Seen, judge: Judge, labels: np.ndarray | None) -> dict[str, float]:
    """FID under the name of its sample count, KID, precision, recall; the share of samples that show what they were asked for.

    labels: (N,) asked for, the same number of each; None from an unconditional model.
    """
    precision, recall = quality.precision_recall(seen.features, judge.features)
    numbers = {quality.fid_name(len(seen.features)): quality.fid(seen.features, judge.reference),
               "kid": quality.kid(seen.features, judge.features, labels, judge.labels),
               "precision": precision, "recall": recall}
    if labels is not None and judge.labels is not None:
        numbers["class_accuracy"] = float((seen.logits.argmax(1) == labels).mean())
    return numbers


def fidelities(features: Mapping[str, np.ndarray], twins: Mapping[str, np.ndarray],
               finer: np.ndarray) -> dict[str, dict[str, float]]:
    """Paired feature distance of every variant to dense, in units of what dense moves when its steps are doubled.

    features: (N, D) by variant; twins: (P, D) of dense under the variant's own solver and timesteps, for variants with changed
    weights, cache or bits; finer: (P, D) of dense at twice the steps. The first P samples are compared.
    fidelity: to dense's own images. It counts what other timesteps or another solver change too, and these honestly lead
    elsewhere: it ranks variants of one sampler, and across samplers it says how far the user's images move.
    fidelity_same_solver: to the twin, so masks, cache and bits alone; absent where the variant changed none of these.
    """
    pairs = len(finer)
    unit = quality.paired_distance(features["dense"][:pairs], finer)
    if unit == 0:
        raise ValueError("fidelity: dense gives the same images at twice the steps; there is no unit to measure in")
    numbers = {name: {"fidelity": quality.paired_distance(x[:pairs], features["dense"][:pairs]) / unit}
               for name, x in features.items()}
    for name, twin in twins.items():
        numbers[name]["fidelity_same_solver"] = quality.paired_distance(features[name][:pairs], twin[:pairs]) / unit
    return numbers


def losses(features: Mapping[str, np.ndarray], judge: Judge, labels: np.ndarray | None, margin: float, resamples: int,
           rng: np.random.Generator, real: float | None = None) -> dict[str, dict[str, float]]:
    """Relative FID increase of every variant over dense, by paired bootstrap: the same resamples of the seeds for all variants,
    and of the holdout, whose own noise is the larger part from 10,000 samples on.

    fid_sd: standard deviation of the variant's own FID; fid_real: `real`, in the row of dense. loss, loss_upper95: the
    estimate and its one-sided bound. loss_p_holm: p-value of "worse by `margin` or more", adjusted for the number of variants.
    loss_above_real: the increase over what dense has beyond `real`, the FID of as many real images; the plain loss divides by a
    FID that is in part the bias of few samples. Where there is a dull_best, compressed has loss_to_dull_best and its bound too.
    """
    counts = quality.resample_counts(len(features["dense"]), resamples, rng, quality.strata_of(labels))
    drawn = quality.resample_counts(len(judge.features), resamples, rng, quality.strata_of(judge.labels))
    reference = quality.resampled(judge.features, drawn)
    fids = {name: quality.fid(x, judge.reference) for name, x in features.items()}
    resampled = {name: quality.bootstrap_fid(x, reference, counts) for name, x in features.items()}

    def difference(name: str, base: str) -> quality.Difference:
        return quality.relative_difference(fids[name], fids[base], resampled[name], resampled[base])

    numbers: dict[str, dict[str, float]] = {name: {"fid_sd": float(np.std(x, ddof=1))} for name, x in resampled.items()}
    numbers["dense"] |= {} if real is None else {"fid_real": real}
    found = {name: difference(name, "dense") for name in features if name != "dense"}
    adjusted = quality.holm({name: d.p_worse_by(margin) for name, d in found.items()})
    for name, d in found.items():
        numbers[name] |= {"loss": d.estimate, "loss_upper95": d.upper95, "loss_p_holm": adjusted[name]}
        if real is not None and fids["dense"] > real:
            numbers[name]["loss_above_real"] = (fids[name] - fids["dense"]) / (fids["dense"] - real)
    if "dull_best" in features:
        dull = difference("compressed", "dull_best")
        numbers["compressed"] |= {"loss_to_dull_best": dull.estimate, "loss_to_dull_best_upper95": dull.upper95}
    return numbers


def real_fid(train: np.ndarray, labels: np.ndarray | None, n: int, judge: Judge) -> float | None:
    """What n real images score; None where there are not so many. train: (N, C, H, W) uint8, labels: (N,) or None."""
    if len(train) < n:
        return None
    return quality.fid(quality.features(judge.net, train[quality.evenly(len(train), n, labels)]), judge.reference)


def memorised(images: np.ndarray, train: np.ndarray, holdout: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """uint8 (., C, H, W). Distances in pixels (a feature net knows the train split), 1 being the full range of one pixel."""
    flat = (part.reshape(len(part), -1).astype(np.float32) / 255 for part in (images[:NEIGHBOURS], train, holdout))
    found = quality.memorisation(*flat, rng)
    return {"nn_train": found.nn_train, "nn_holdout": found.nn_holdout, "memorised": found.excess}
