"""What stands for the quality of a candidate while there are no ten thousand images, and how sure it is.

All proxies look at features, by the net that guides the search, of a few images from the noise and labels of the dense
teacher's, and count in one unit: the paired distance of the dense teacher at 50 to that at 100 steps.

`paired`: mean distance of an image to the teacher's of the same noise. It resolves tiny changes, but a solver or a student that
makes other, equally good images is far off.
`frechet`: Frechet distance (its root, a distance of features, too) of the images' distribution to the teacher's bank. What the
few images of the teacher miss of the bank, those of the candidate are taken to miss, too (control variates, as
`quality.anchored_fid`); the distance is zero where the images are the teacher's.
`sum`: of both.

The error is the jackknife's, over blocks of images (Efron 1982): what the value moves by when a block is left out. Two
candidates are compared on the same images, so blocks are left out of both.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from tasks.core.quality import Difference, Gaussian, frechet_distance, paired_distance
from tasks.evolve.promote import image_losses

PROXIES = ("paired", "frechet", "sum")
BLOCKS = 16  # that are left out in turn
LEAST_IMAGES = 3  # two are a distribution, one is left out


def seen(found: np.ndarray, references: tuple[np.ndarray, np.ndarray], bank: Gaussian | None) -> dict[str, list[float]]:
    """What is kept of an evaluation. found: (n, D) features of a candidate's first n images; references: of the dense teacher's
    at 50 and at 100 steps; bank: the distribution of the teacher's bank, None: there is no `frechet`.

    paired: (n,) of each image. frechet: of all images, then of all but each block.
    """
    kept = {"paired": image_losses(found, references).tolist()}
    if bank is not None and len(found) >= LEAST_IMAGES:
        unit, anchor = paired_distance(references[1], references[0]), references[0][: len(found)]
        kept["frechet"] = [frechet(found[part], anchor[part], bank) / unit for part in parts(len(found))]
    return kept


def frechet(found: np.ndarray, anchor: np.ndarray, bank: Gaussian) -> float:
    """found, anchor: (n, D) of the same noise. A sum and difference of covariances may have directions of negative variance;
    there it is 0."""
    own, few = Gaussian.of(found), Gaussian.of(anchor)
    variances, directions = np.linalg.eigh(bank.sigma + own.sigma - few.sigma)
    sigma = (directions * variances.clip(0)) @ directions.T
    return float(np.sqrt(max(0.0, frechet_distance(bank.mu + own.mu - few.mu, sigma, bank))))


def parts(n: int) -> list[np.ndarray]:
    """Indices of all of n images, then of all but each block."""
    blocks = np.array_split(np.arange(n), min(BLOCKS, n))
    return [np.arange(n), *(np.setdiff1d(np.arange(n), block) for block in blocks if n > 1)]


def values(kept: Mapping[str, Sequence[float]], proxy: str) -> np.ndarray:
    """The proxy on all images, then on all but each block."""
    if proxy == "frechet":
        return np.array(kept["frechet"])
    losses = np.array(kept["paired"])
    means = np.array([losses[part].mean() for part in parts(len(losses))])
    return means if proxy == "paired" else means + kept["frechet"]


def loss_of(kept: Mapping[str, Sequence[float]], proxy: str) -> float:
    return float(np.mean(kept["paired"])) if proxy == "paired" else float(values(kept, proxy)[0])


def judged(kept: Mapping[str, Sequence[float]], proxy: str, base: Mapping[str, Sequence[float]] | None = None) -> Difference:
    """The proxy, or how far it is above that of `base`, which saw the same images; with its error."""
    found = values(kept, proxy) - (0.0 if base is None else values(base, proxy))
    left_out = found[1:]
    return Difference(float(found[0]), float(np.sqrt(max(0, len(left_out) - 1) * left_out.var())) if len(left_out) else 0.0)
