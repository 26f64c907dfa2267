"""What each part of the supernet is worth: error of the network's output with all layers at one width, with and without it.

On states of dense trajectories from other noise than the ranges and the rounding were made from; fp32 elsewhere.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from tasks.core.denoiser import Denoiser
from tasks.evolve.costs import edges
from tasks.evolve.fitness import Protocol, calibration_states
from tasks.runtime.precision import Integers, Ranges, apply_precision, calibrate_ranges, remove_precision
from tasks.runtime.rounding import Batch, Rounding, learn_rounding

BITS = (4, 6, 8)
ARMS = {  # name -> which parts it has
    "nearest": (), "joins": ("joins",), "learned": ("learned",), "edges": ("edges",), "all": ("joins", "learned", "edges")}
EDGE_BITS = 8
OTHER_NOISE = 1_000_003  # added to the protocol's seed


@torch.inference_mode()
def output_error(teacher: Denoiser, plan: Mapping[str, str], ranges: Ranges, integers: Integers,
                 states: Sequence[Batch]) -> float:
    """Norm of the output's change over the norm of the output, over all states."""
    whole = torch.cat([teacher(*state) for state in states])
    apply_precision(teacher.model, plan, ranges, integers=integers)
    found = torch.cat([teacher(*state) for state in states])
    remove_precision(teacher.model)
    return ((found - whole).norm() / whole.norm()).item()


def errors(teacher: Denoiser, protocol: Protocol, how: Rounding,
           widths: Iterable[int] = BITS) -> Iterator[tuple[str, int, float]]:
    """(arm, width of weights and activations, error)"""
    states = list(calibration_states(teacher, protocol))
    held = list(calibration_states(teacher, replace(protocol, seed=protocol.seed + OTHER_NOISE)))
    ranges = {False: calibrate_ranges(teacher.model, states), True: calibrate_ranges(teacher.model, states, teacher.joins())}
    for bits in widths:
        learned = {(layer, bits): q for layer, q in learn_rounding(teacher.model, bits, states, how).items()}
        for arm, parts in ARMS.items():
            plan = dict.fromkeys(ranges[False], f"w{bits}a{bits}")
            if "edges" in parts:
                plan |= dict.fromkeys(edges(teacher), f"w{EDGE_BITS}a{EDGE_BITS}")
            integers = learned if "learned" in parts else {}
            yield arm, bits, output_error(teacher, plan, ranges["joins" in parts], integers, held)
