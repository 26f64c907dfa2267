"""What 2:4 kernels of a GPU bring to a whole DiT, against the dense model and against units that are really gone.

`python -m benchmarks.sparsity.kernels` needs a CUDA device of compute capability 8.0 or later, takes minutes and replaces its
own rows (variants kernels.*) in results.csv. The weights are random where none are shipped: they change no time. The variants
take turns, evaluation by evaluation.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.sparsity.shapes import model_of
from tasks.core.cost import kept_share, layer_costs
from tasks.core.denoiser import Denoiser
from tasks.core.sparsity import kept_shares, nm_mask
from tasks.mask_search.masks import misfits, unit_masks
from tasks.runtime.masks import apply_masks, hidden_units, shrink_units
from tasks.runtime.semi_structured import supported, to_semi_structured

Run = Callable[[], object]
RESULTS = Path(__file__).parent / "results.csv"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BATCHES = (1, 8, 32)
HALF = 0.5  # of the hidden units of feed-forwards: as much of these as 2:4 removes


def macs_share(denoiser: Denoiser, grain: str, masks: dict[str, Tensor]) -> float:
    """Of the dense model, attention products and dense layers counted."""
    return kept_share(layer_costs(denoiser), kept_shares(denoiser.model, grain, masks), "macs")


def masks_of(denoiser: Denoiser) -> dict[str, dict[str, Tensor]]:
    """2:4 in every Linear that takes it, and half the hidden units of every feed-forward."""
    layers = {name: layer for name, layer in denoiser.prunable_layers().items() if isinstance(layer, nn.Linear)}
    unfit = misfits(layers, "2:4")
    blocks = [units.block for units in hidden_units(denoiser.model) if not units.products]
    return {"2:4": {f"{name}.weight": nm_mask(layer.weight, 2, 4) for name, layer in layers.items() if name not in unfit},
            "unit": unit_masks(denoiser.model, dict.fromkeys(blocks, HALF))}


def variants(model: nn.Module, masks: dict[str, dict[str, Tensor]]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """model: on the GPU, of the dtype that computes. -> the networks; parameter -> why it has no 2:4 kernel."""
    found = {name: copy.deepcopy(model) for name in ("dense", "masked", "two_four", "unit")}
    apply_masks(found["masked"], masks["2:4"])
    left = to_semi_structured(found["two_four"], masks["2:4"])
    shrink_units(found["unit"], masks["unit"])
    return found, left


def inputs(denoiser: Denoiser, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {"hidden_states": torch.randn(batch, *denoiser.sample_shape, generator=rng).to("cuda", dtype),
            "timestep": torch.linspace(0, denoiser.schedule.steps - 1, batch).long().cuda(),
            "class_labels": (torch.arange(batch) % denoiser.num_classes).cuda()}


def eager(model: nn.Module, given: dict[str, Tensor]) -> Run:
    return lambda: model(**given, return_dict=False)


@torch.inference_mode()
def graph(model: nn.Module, given: dict[str, Tensor]) -> Run:
    """The same evaluation as one CUDA graph: what the GPU takes, without the launches of many small kernels from Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are chosen and workspaces made before there is a capture
            model(**given, return_dict=False)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        model(**given, return_dict=False)
    return captured.replay


WAYS = {"eager": eager, "graph": graph}


@torch.inference_mode()
def timed(run: Run) -> float:
    """ms of one evaluation, on the GPU's own clock."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


@torch.inference_mode()
def deviation(model: nn.Module, right: nn.Module, given: dict[str, Tensor]) -> float:
    """Norm of the outputs' difference over theirs."""
    found, expected = (net(**given, return_dict=False)[0].float() for net in (model, right))
    return ((found - expected).norm() / expected.norm()).item()


def measure(name: str, repeats: int, warm: int = 5) -> Iterator[list[dict]]:
    """The rows of each dtype and batch as they are had."""
    denoiser = model_of(name)
    masks = masks_of(denoiser)
    predicted = {key: 1 / macs_share(denoiser, grain, masks[grain]) for key, grain in (("two_four", "2:4"), ("unit", "unit"))}
    for kind, dtype in DTYPES.items():
        if reason := supported(dtype):
            raise ValueError(f"2:4 kernels: {reason}")
        nets, left = variants(copy.deepcopy(denoiser.model).eval().requires_grad_(False).to("cuda", dtype), masks)
        machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {len(left)} masked layers without a kernel"
        for batch in BATCHES:
            given = inputs(denoiser, batch, dtype)
            said = f"{machine}; {kind}, batch {batch}; {repeats} interleaved rounds"
            found = {"dense": {}, "unit": {"speedup_predicted": predicted["unit"]},
                     "two_four": {"speedup_predicted": predicted["two_four"],
                                  "deviation": deviation(nets["two_four"], nets["masked"], given)}}
            for way, made in WAYS.items():
                runs = {key: made(net, given) for key, net in nets.items() if key != "masked"}
                rounds = [{key: timed(run) for key, run in runs.items()} for _ in range(warm + repeats)][warm:]
                found["dense"][f"ms_{way}"] = median(times["dense"] for times in rounds)
                for key in predicted:
                    found[key][f"speedup_{way}"] = median(times["dense"] / times[key] for times in rounds)
            yield [{"teacher": name, "variant": f"kernels.{key}.{kind}.{batch}", "seed": 0, "metric": metric,
                    "value": f"{value:.4g}", "protocol": said}
                   for key, numbers in found.items() for metric, value in numbers.items()]


def write(rows: list[dict], path: Path = RESULTS) -> None:
    own = {(row["teacher"], row["variant"]) for row in rows}
    results.replace(path, lambda row: (row["teacher"], row["variant"]) in own, rows)
    for row in rows:
        print(f"{row['teacher']:10} {row['variant']:26} {row['metric']:18} {row['value']}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=30, help="rounds that count")
    parser.add_argument("--models", nargs="+", default=["mnist_dit", "dit_xl_2"])
    asked = parser.parse_args()
    try:
        for name in asked.models:
            for found in measure(name, asked.repeats):
                write(found)
    except ValueError as error:
        sys.exit(f"error: {error}")
