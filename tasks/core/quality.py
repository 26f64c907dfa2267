"""Quality of sample sets as arithmetic on features: pure functions of (N, D) arrays, in float64.

Which network made the features is the caller's to name: distances of different networks share neither name nor column.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

STRATUM = 20  # samples of a class from which on a bootstrap keeps classes apart
EQUAL = 0.05  # relative FID difference up to which two sets of samples count as equally good
NORMAL_95 = 1.6449  # quantile of the normal distribution
ROWS = 1024  # rows of a distance or kernel matrix held at once: 80 MB against 10,000 columns


# ---- features ----

@torch.inference_mode()
def _outputs(net: nn.Module, images: np.ndarray, batch: int) -> list[np.ndarray]:
    rows = [net(torch.from_numpy(images[i:i + batch]).float() / 127.5 - 1) for i in range(0, len(images), batch)]
    return [torch.cat(column).double().numpy() for column in zip(*rows, strict=True)]


def features(net: nn.Module, images: np.ndarray, batch: int = 250) -> np.ndarray:
    """images: (N, C, H, W) uint8; net: fp32 NCHW in [-1, 1] -> (features, ...). -> (N, D) float64."""
    return _outputs(net, images, batch)[0]


def features_and_logits(net: nn.Module, images: np.ndarray, batch: int = 250) -> tuple[np.ndarray, np.ndarray]:
    """As `features`, of a net that classifies as well. -> (N, D) and (N, K) float64."""
    found, logits = _outputs(net, images, batch)
    return found, logits


# ---- distance of distributions ----

@dataclass(frozen=True)
class Gaussian:
    """mu (..., D) and sigma (..., D, D) of a set of features, or of each resample of one."""

    mu: np.ndarray
    sigma: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> "Gaussian":
        """x: (N, D), N >= 2."""
        return cls(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def sqrt_psd(matrix: np.ndarray) -> np.ndarray:
    """Symmetric square root of positive semi-definite (..., D, D) matrices."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))[..., None, :]) @ vectors.swapaxes(-1, -2)


def frechet_distance(mu: np.ndarray, sigma: np.ndarray, reference: Gaussian) -> np.ndarray:
    """|mu - mu_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2)) (Heusel et al., arXiv 1706.08500, eq. 6).

    mu: (..., D), sigma: (..., D, D), a reference of the same shape or without the leading axes -> (...). S S_r has the
    eigenvalues of the symmetric S_r^(1/2) S S_r^(1/2): no general matrix root is needed, and
    rank-deficient covariances (fewer samples than features) need no offset.
    """
    root = sqrt_psd(reference.sigma)
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma @ root).clip(0)).sum(-1)
    traces = np.trace(sigma, axis1=-2, axis2=-1) + np.trace(reference.sigma, axis1=-2, axis2=-1)
    return ((mu - reference.mu) ** 2).sum(-1) + traces - 2 * cross


def fid(x: np.ndarray, reference: Gaussian) -> float:
    """Frechet distance of features (N, D) to the reference. Biased upwards by O(1/N): compare at equal N only."""
    own = Gaussian.of(x)
    return float(frechet_distance(own.mu, own.sigma, reference))


def anchored_fid(x: np.ndarray, anchor: np.ndarray, whole: Gaussian, reference: Gaussian) -> float:
    """The FID that many samples would have, estimated from few by control variates (Owen, Monte Carlo, chapter 8.9).

    x, anchor: (n, D) of the same seeds and labels, from two ways of sampling; whole: of many samples of the anchor's way. What
    the few anchors miss of the whole, x misses too: as far as the two ways go along with each other, the noise of few samples
    is gone. FID's bias goes by 1/n (Chong and Forsyth, arXiv 1911.07023): what the halves have more than all is taken off.
    """
    if x.shape != anchor.shape:
        raise ValueError(f"anchored_fid: {x.shape} and {anchor.shape} are not pairs")

    def found(part: slice) -> float:
        own, few = Gaussian.of(x[part]), Gaussian.of(anchor[part])
        return float(frechet_distance(whole.mu + own.mu - few.mu, whole.sigma + own.sigma - few.sigma, reference))

    half = len(x) // 2
    return 2 * found(slice(None)) - (found(slice(half)) + found(slice(half, None))) / 2


def evenly(total: int, n: int, labels: np.ndarray | None = None) -> np.ndarray:
    """n of `total` indices, evenly spread over the classes: as many of each as samples have. labels: (total,) or None.

    Drawn regardless of class, 1,000 real MNIST images score a FID of 0.20 and more in place of 0.14.
    """
    order = np.arange(total) if labels is None else np.argsort(labels, kind="stable")
    return order[np.linspace(0, total - 1, min(n, total)).astype(int)]


def fid_name(n: int) -> str:
    """The metric's name carries its sample count: `fid_1k`, `fid_10k`, `fid_250`."""
    return f"fid_{n // 1000}k" if n >= 1000 and n % 1000 == 0 else f"fid_{n}"


def kid(x: np.ndarray, y: np.ndarray, labels_x: np.ndarray | None = None, labels_y: np.ndarray | None = None) -> float:
    """Unbiased squared MMD under k(a, b) = (a.b / D + 1)^3 over all pairs (Binkowski et al., arXiv 1801.01401, section 4).

    x: (N, D), y: (M, D). One U-statistic of the whole sets; the paper's average over subsets estimates the same.
    labels: (N,) and (M,) ints of sets drawn with fixed numbers per class. Two of their members share a class less often than
    independent draws do, which alone would make the KID of real images negative (by 0.02 at 200 MNIST samples). Raises
    ValueError for a class of one sample.
    """
    return float(_means_within(x, labels_x).mean() + _means_within(y, labels_y).mean() - 2 * _kernel_means(x, y).mean())


def kid_difference(x: np.ndarray, base: np.ndarray, y: np.ndarray, strata: np.ndarray | None = None) -> "Difference":
    """KID of x minus KID of base, both (N, D) of the same seeds and labels, against y (M, D); strata: (N,) ints or None.

    The error is that of a U-statistic's linear part, 2 (mean_j k(x_i, x_j) - mean_m k(x_i, y_m)), paired and within strata. For
    few samples, where FID's bias prefers the set of less variance.
    """
    if x.shape != base.shape:
        raise ValueError(f"kid_difference: {x.shape} and {base.shape} are not pairs")
    (within, across), (base_within, base_across) = ((_means_within(f, strata), _kernel_means(f, y)) for f in (x, base))
    inner, outer = within - base_within, across - base_across
    linear, strata = 2 * (inner - outer), np.zeros(len(x), int) if strata is None else strata
    variance = sum(linear[strata == s].var(ddof=1) * (strata == s).mean() for s in np.unique(strata))
    return Difference(float((inner - 2 * outer).mean()), float(np.sqrt(variance / len(x))))


def _kernel_means(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,) means of k(x_i, .) over y."""
    return np.concatenate([(((rows @ y.T) / x.shape[1] + 1) ** 3).mean(1) for rows in _blocks(x)])


def _means_within(x: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """(N,) means of k(x_i, .) over an independent draw: pairs of one class leave x_i out, and weigh as (n_c / n)^2."""
    labels = np.zeros(len(x), int) if labels is None else labels
    means = _kernel_means(x, x)
    for c in np.unique(labels):
        members = x[labels == c]
        if len(members) < 2:
            raise ValueError(f"kid: class {c} has 1 of {len(x)} samples; every class needs 2")
        n, own = len(members), _kernel_means(members, members)
        itself = ((members * members).sum(1) / x.shape[1] + 1) ** 3
        means[labels == c] += ((own * n - itself) / (n - 1) - own) * n / len(x)
    return means


def _blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[i:i + ROWS] for i in range(0, len(x), ROWS))


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances (N, D), (M, D) -> (N, M).

    By differences, not |x|^2 + |y|^2 - 2 x.y, whose cancellation would give a copy a distance above zero.
    """
    a, b = torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y))
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def nearest(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of every row of x (N, D) to its nearest row of y (M, D). -> (N,)."""
    return np.concatenate([distances(rows, y).min(1) for rows in _blocks(x)])


def precision_recall(x: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, eq. 1-3). x: (N, D), reference: (M, D).

    precision: share of x inside the reference's manifold, the balls around each point that reach its k-th nearest neighbour;
    recall: share of the reference inside x's. Raises ValueError when a set holds k points or fewer.
    """
    if min(len(x), len(reference)) <= k:
        raise ValueError(f"precision_recall: {min(len(x), len(reference))} points are too few for k = {k}")
    return _covered(x, reference, _radii(reference, k)), _covered(reference, x, _radii(x, k))


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    # column 0 of the sorted distances is the point itself
    return np.concatenate([np.partition(distances(rows, x), k, axis=1)[:, k] for rows in _blocks(x)])


def _covered(x: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    return float(np.concatenate([(distances(rows, centres) <= radii).any(1) for rows in _blocks(x)]).mean())


# ---- paired comparison: sample i of both sets started from the same noise and label ----

def paired_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over pairs of the Euclidean distance of features; x, y: (N, D) of the same seeds.

    Divided by the distance between the teacher at 50 and at 100 steps it is `fidelity`: 0 is the same images, 1 is the change
    that nobody would notice.
    """
    if x.shape != y.shape:
        raise ValueError(f"paired_distance: {x.shape} and {y.shape} are not pairs")
    return float(np.linalg.norm(x - y, axis=1).mean())


def resample_counts(n: int, resamples: int, rng: np.random.Generator, strata: np.ndarray | None = None) -> np.ndarray:
    """How often each of n samples is drawn in each bootstrap resample, within strata (N,) ints if given. -> (B, N) float64.

    Sampling with stratified labels is resampled with stratified labels, or the bootstrap invents a variance that is not there.
    """
    strata = np.zeros(n, int) if strata is None else strata
    counts = np.zeros((resamples, n))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        drawn = rng.integers(len(members), size=(resamples, len(members)))
        flat = drawn + len(members) * np.arange(resamples)[:, None]
        counts[:, members] = np.bincount(flat.ravel(), minlength=resamples * len(members)).reshape(resamples, -1)
    return counts


def strata_of(labels: np.ndarray | None) -> np.ndarray | None:
    """The strata that a bootstrap may keep: classes, where each has STRATUM samples or more.

    In a stratum of m samples a resample varies by (m - 1) / m of what fresh samples do, by nothing at m = 1; without strata the
    bound is wider than it need be, which is the safe side.
    """
    return None if labels is None or np.unique(labels, return_counts=True)[1].min() < STRATUM else labels


def resampled(x: np.ndarray, counts: np.ndarray) -> Gaussian:
    """Of every resample; x: (N, D), counts: (B, N) -> mu (B, D), sigma (B, D, D).

    All second moments are one matrix product, counts (B, N) x outer products (N, D (D + 1) / 2).
    """
    n, d = x.shape
    centre = x.mean(0)
    centred = x - centre
    upper = np.triu_indices(d)
    means = counts @ centred / n
    moments = counts @ (centred[:, upper[0]] * centred[:, upper[1]])
    sigma = np.empty((len(counts), d, d))
    sigma[:, upper[0], upper[1]] = sigma[:, upper[1], upper[0]] = moments
    return Gaussian(means + centre, (sigma - n * means[:, :, None] * means[:, None, :]) / (n - 1))


def bootstrap_fid(x: np.ndarray, reference: Gaussian, counts: np.ndarray) -> np.ndarray:
    """FID of every resample; x: (N, D), counts: (B, N), reference: one, or one of each resample -> (B,)."""
    found = resampled(x, counts)
    return frechet_distance(found.mu, found.sigma, reference)


@dataclass(frozen=True)
class Difference:
    """A difference to a baseline, for FID the relative one, and its standard error."""

    estimate: float
    error: float

    @property
    def upper95(self) -> float:
        """One-sided 95 % bound; below `margin`: not worse by `margin`."""
        return self.estimate + NORMAL_95 * self.error

    def p_worse_by(self, margin: float) -> float:
        """p-value of "worse by `margin` or more"; small: shown to be less than that (non-inferiority)."""
        if self.error == 0:
            return float(self.estimate >= margin)
        return 0.5 * math.erfc((margin - self.estimate) / (self.error * math.sqrt(2)))


def relative_difference(fid_x: float, fid_base: float, fids_x: np.ndarray, fids_base: np.ndarray) -> Difference:
    """r = FID_x / FID_base - 1; fids_*: (B,) of the same resamples in both.

    A resample repeats samples, so its FID is biased upwards, numerator and denominator alike: quantiles of its own ratios
    cover the truth in 0 to 55 % of cases where 95 are due (16 to 64 features, 250 to 1,000 samples, simulated Gaussians).
    So only the spread is taken from them, of r linearised at the estimate,  dr = (dFID_x - (1 + r) dFID_base) / FID_base;
    r + 1.645 sd(dr) covers in 94 to 99 %, and in more where x is the better set.
    """
    r = fid_x / fid_base - 1
    return Difference(float(r), float(np.std(fids_x - (1 + r) * fids_base, ddof=1) / fid_base))


def paired_bootstrap(x: np.ndarray, base: np.ndarray, reference: Gaussian, resamples: int, rng: np.random.Generator,
                     strata: np.ndarray | None = None) -> Difference:
    """Relative FID difference of x (N, D) to base (N, D), both of the same seeds and labels."""
    if x.shape != base.shape:
        raise ValueError(f"paired_bootstrap: {x.shape} and {base.shape} are not pairs")
    counts = resample_counts(len(x), resamples, rng, strata)
    return relative_difference(fid(x, reference), fid(base, reference),
                               bootstrap_fid(x, reference, counts), bootstrap_fid(base, reference, counts))


def holm(p: dict[str, float]) -> dict[str, float]:
    """p-values adjusted for their number (Holm 1979): sorted upwards, p_(i) (m - i), made monotone, at most 1."""
    adjusted, running = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        running = max(running, min(1.0, p[name] * (len(p) - rank)))
        adjusted[name] = running
    return adjusted


# ---- memorisation ----

@dataclass(frozen=True)
class Memorisation:
    """Medians of nearest-neighbour distances and the excess share of samples that are nearest to a training image."""

    nn_train: float
    nn_holdout: float
    excess: float


def memorisation(samples: np.ndarray, train: np.ndarray, holdout: np.ndarray, rng: np.random.Generator) -> Memorisation:
    """Are samples nearer to the training images than to images of the same source never trained on? All (., D) arrays.

    excess = (p - q) / (1 - q): p is the share of samples whose nearest image of train and holdout together is one of train,
    q = N_train / (N_train + N_holdout) what p is expected to be when the split means nothing to the samples (each image is as
    likely to be the nearest as any other). 0: no memorisation; 1: every sample is nearest to a training image.
    Its standard error is about sqrt(N_train / N_holdout / N): 0.06 for 1,000 samples and a split of 4 to 1.
    nn_train is taken on a random part of train as large as the holdout, so that the two medians may be compared.
    Pass pixels, not features of a net trained on `train`: such a net treats the two splits differently by itself.
    """
    part = rng.choice(len(train), min(len(train), len(holdout)), replace=False)
    to_holdout, to_train = nearest(samples, holdout), nearest(samples, train)
    # a tie (the same image in both) says nothing: it counts as one half
    p = float((to_train < to_holdout).mean() + 0.5 * (to_train == to_holdout).mean())
    q = len(train) / (len(train) + len(holdout))
    return Memorisation(float(np.median(nearest(samples, train[part]))), float(np.median(to_holdout)), (p - q) / (1 - q))
