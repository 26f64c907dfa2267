"""A guess at the loss of a candidate that was not evaluated, learned from those that were: additive, on a logarithmic scale.

The sensitivity of every gene comes out of the search's own results: nothing is spent on measuring genes one by one.
"""

from collections import deque

import numpy as np

FEWEST = 20      # results below which there is no guess
WINDOW = 2000    # latest results that are learned from: a long search must not grow slower
GROWTH = 0.05    # more results by this share: fitted anew
PENALTIES = 10.0 ** np.arange(-1, 6)  # ridge penalties tried, for standardised features


class Surrogate:
    """Ridge regression of the logarithm of the loss."""

    def __init__(self):
        self.rows, self.targets = deque(maxlen=WINDOW), deque(maxlen=WINDOW)
        self.told, self.fitted, self.model = 0, 0, None

    def tell(self, features: np.ndarray, loss: float) -> None:
        self.rows.append(features)
        self.targets.append(np.log(max(loss, 1e-6)))  # no loss at all: an image equal to the reference
        self.told += 1

    def fit(self) -> bool:
        """-> whether there is a guess."""
        if self.told >= max(FEWEST, self.fitted * (1 + GROWTH)):
            self.model, self.fitted = ridge(np.stack(self.rows), np.array(self.targets)), self.told
        return self.model is not None

    def losses(self, features: np.ndarray) -> np.ndarray:
        """(n, d) -> (n,). After `fit`."""
        weights, offset = self.model
        return np.exp(features @ weights + offset)


def ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """x (n, d), y (n,) -> weights (d,), offset of the least squares of standardised features with the penalty that generalised
    cross-validation finds best (Golub, Heath and Wahba 1979, eq. 1.4)."""
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    x, centred = (x - mean) / spread, y - y.mean()
    squares, v = np.linalg.eigh(x.T @ x)  # of the singular values; x is tall, this is small
    found = squares > 1e-10 * squares[-1]
    squares, v = squares[found], v[:, found]
    seen = v.T @ (x.T @ centred)

    def score(penalty: float) -> float:
        kept = squares / (squares + penalty)
        residual = centred @ centred - ((2 - kept) * kept * seen**2 / squares).sum()
        return float(residual) / (len(y) - 1 - kept.sum()) ** 2

    penalty = min(PENALTIES, key=score)
    weights = v @ (seen / (squares + penalty)) / spread
    return weights, float(y.mean() - mean @ weights)


def hypervolume_gains(points: np.ndarray, known: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """What each of points (n, 2) alone would add to the area that known (m, 2) dominate below corner (2,), all (cost, loss).

    Known points are a staircase: between the costs of two of its steps the loss to beat is that of the cheaper one.
    """
    steps = known[np.lexsort((known[:, 1], known[:, 0]))]
    lowest = np.minimum.accumulate(np.concatenate([[corner[1]], steps[:, 1]]))
    down = np.flatnonzero(steps[:, 1] < lowest[:-1])  # of hundreds a few
    edges = np.concatenate([[-np.inf], steps[down, 0], [np.inf]]).clip(max=corner[0])
    to_beat = np.concatenate([[corner[1]], steps[down, 1]])
    widths = (edges[1:] - np.maximum(edges[:-1], points[:, :1])).clip(min=0)
    return (widths * (to_beat - points[:, 1:]).clip(min=0)).sum(1)
