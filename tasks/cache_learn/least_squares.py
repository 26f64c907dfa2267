"""Weights of the sum of kept outputs that lies nearest to a wanted one."""

import numpy as np

RIDGE = 1e-6  # in units of the mean squared output: outputs that agree leave their weights open


def solved(gram: np.ndarray, right: np.ndarray) -> tuple[float, ...]:
    """gram: (k, k) products of the outputs, the last one first; right: (k,) their products with the wanted one, both in fp64.
    -> w of least |sum w_j outputs_j - wanted|^2, drawn a little towards plain reuse."""
    ridge = RIDGE * np.trace(gram) / len(gram) + np.finfo(np.float64).tiny
    last = np.eye(len(gram))[0]
    return tuple(round(float(weight), 6) for weight in np.linalg.solve(gram + ridge * np.eye(len(gram)), right + ridge * last))
