"""The solver inside the graph: one evaluation with its update, or a loop over all evaluations of an image.

Not shipped inside packages. Made from a network's graph when that is compiled, so that nothing of it is stored. The loop is
OpenVINO's own: its body is compiled once whatever the number of steps, and its weights are there once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tasks.runtime.solver import SolverStep, begun, remembered

FEWEST = 4  # coefficients of a step without history: p, q, a, d; its b follow


@dataclass(frozen=True)
class Solving:
    """What a graph must know of a solver. steps: of the loop; None: one evaluation and its update."""

    history: int         # x0 of earlier steps that an update may read
    clip: float | None   # bound of |x0|
    steps: int | None = None

    @property
    def coefficients(self) -> int:
        return FEWEST + 1 + self.history


def history_of(steps: Sequence[SolverStep]) -> int:
    return max(len(step.b) for step in steps) - 1


def coefficients(step: SolverStep, history: int) -> list[float]:
    """In the order in which `with_update` reads them; an x0 that a step does not read counts 0."""
    return [step.p, step.q, step.a, step.d, *step.b, *[0.0] * (history + 1 - len(step.b))]


def started(steps: Sequence[SolverStep], noise: Tensor, labels: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """x at the first row's time, and the x0 that are known before it, (history, *x), last first: that of an opening, if any."""
    past = np.zeros((history_of(steps), *noise.shape), np.float32)
    for place, x0 in zip(past, remembered(steps, noise, labels), strict=False):
        place[...] = x0.numpy()
    return begun(steps, noise, labels).float().numpy(), past


def solved(graph, solving: Solving):
    """graph: of an evaluation, with static shapes: x, rows, ... -> prediction, kept outputs."""
    updated = with_update(graph, solving)
    return updated if solving.steps is None else looped(updated, solving)


def with_update(graph, solving: Solving):
    """Further inputs: the coefficients and, where there is a history, the x0 of earlier steps (history, *x), last first.
    Outputs: x at the next time; x0, or the history for the next step, x0 the first; what is kept.

    x0 = clip(p x + q prediction), x_next = a x + d prediction + sum_k b_k x0_k.
    """
    import openvino as ov
    ops = ov.opset13
    x, predicted = graph.get_parameters()[0], graph.get_results()[0].input_value(0)
    given = ops.parameter([solving.coefficients], np.float32, "coefficients")
    past = [ops.parameter([solving.history, *x.shape], np.float32, "past")] if solving.history else []
    slices = ops.split(past[0], 0, solving.history).outputs() if past else []
    earlier = [ops.squeeze(one, 0) for one in slices]
    p, q, a, d, *b = ops.variadic_split(given, 0, [1] * solving.coefficients).outputs()
    x0 = ops.add(ops.multiply(x, p), ops.multiply(predicted, q))
    if solving.clip is not None:
        x0 = ops.clamp(x0, -solving.clip, solving.clip)
    following = ops.add(ops.multiply(x, a), ops.multiply(predicted, d))
    for term, weight in zip((x0, *earlier), b, strict=True):
        following = ops.add(following, ops.multiply(term, weight))
    # the past is a tensor of its own: tensors handed on one by one overwrite each other in OpenVINO's loop
    past_next = ops.concat([ops.unsqueeze(x0, 0), *slices[:-1]], 0) if past else x0
    put_out = [ops.result(following), ops.result(past_next), *graph.get_results()[1:]]
    return ov.Model(put_out, [*graph.get_parameters(), given, *past])


def looped(body, solving: Solving):
    """body: as `with_update` makes it, of a network that keeps nothing -> graph of x, rows (steps * batch, width), labels if
    the body takes any, coefficients (steps * each) and, where there is a history, what of it is known before the first step ->
    x after the last step."""
    import openvino as ov
    ops = ov.opset13
    parameters = body.get_parameters()
    x, rows, *labels, given = parameters[: -1 if solving.history else None]
    following, past_next = (result.output(0) for result in body.get_results())
    loop = ops.tensor_iterator()
    loop.set_body(body)
    outer = [ops.parameter(list(x.shape), np.float32, "x"), *(ops.parameter([solving.steps * part.shape[0], *part.shape[1:]],
                                                                          np.float32) for part in (rows, given))]
    fixed = [ops.parameter(list(one.shape), one.get_element_type(), "labels") for one in labels]
    loop.set_merged_input(x, outer[0].output(0), following)
    for part, whole in zip((rows, given), outer[1:], strict=True):
        loop.set_sliced_input(part, whole.output(0), 0, part.shape[0], part.shape[0], -1, 0)
    for part, whole in zip(labels, fixed, strict=True):
        loop.set_invariant_input(part, whole.output(0))
    known = [ops.parameter(list(one.shape), np.float32, "past") for one in (parameters[-1:] if solving.history else [])]
    for whole in known:
        loop.set_merged_input(parameters[-1], whole.output(0), past_next)
    return ov.Model([loop.get_iter_value(following, -1)], [outer[0], outer[1], *fixed, outer[2], *known])
