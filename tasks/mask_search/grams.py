"""Gram matrices of many layers' inputs in a bounded part of memory.

A matrix has columns^2 entries of 8 bytes: 162 MiB for a convolution of 512 channels, gigabytes for all layers of a UNet of
100 M parameters. Where they do not fit together, the calibration images are run once for each group of layers whose matrices
do, and what a group gave waits on disk until one of its layers is worked on. Each matrix is summed in the same order whatever
the bound, so the bound changes no result.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.core import disk
from tasks.core.calibration import Calibration, predictions
from tasks.core.denoiser import Denoiser
from tasks.core.progress import track
from tasks.mask_search.saliency import Statistics

KEY = "mask_search.gram_mb"
WORKED_ON = 3     # matrices of a layer's size while it is worked on: its Gram matrix, a part of its Hessian and that factored
IMAGES = 8        # unfolded at a time: a convolution's X is kh x kw times its input ...
ENTRIES = 1 << 23  # ... and so many of its entries: 64 MiB in fp64, besides the fp32 ones that they are made of


# ---- from shapes alone ----

def gram_bytes(shape: Sequence[int]) -> int:
    """Of the Gram matrix of a layer with a weight (out, in, ...) of that shape."""
    return 8 * prod(shape[1:]) ** 2


def check_widths(shapes: Mapping[str, Sequence[int]], mib: int) -> None:
    """Raises ValueError, by name, for a layer that cannot be worked on within `mib` MiB. shapes: of the layers' weights."""
    widest = max(shapes, key=lambda name: gram_bytes(shapes[name]))
    if (least := in_mib(WORKED_ON * gram_bytes(shapes[widest]))) > mib:
        raise ValueError(f"{KEY}: {mib} is too little for {widest}, each of whose outputs reads {prod(shapes[widest][1:])} "
                         f"inputs: {WORKED_ON} matrices of that size take {least} MiB")


def in_mib(size: int) -> int:
    """Rounded up."""
    return -(-size // (1 << 20))


def fits(shapes: Mapping[str, Sequence[int]], mib: int) -> bool:
    """Whether all Gram matrices can stay in memory while each layer is worked on in its turn."""
    sizes = [gram_bytes(shape) for shape in shapes.values()]
    return sum(sizes) + (WORKED_ON - 1) * max(sizes) <= mib << 20


def groups(shapes: Mapping[str, Sequence[int]], mib: int) -> list[list[str]]:
    """The layers in their order, as many at a time as have Gram matrices of `mib` MiB together."""
    found: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        if not found or gram_bytes(shape) > room:
            found.append([])
            room = mib << 20
        found[-1].append(name)
        room -= gram_bytes(shape)
    return found


# ---- from images ----

class OnDisk(Mapping[str, Statistics]):
    """Statistics that are read from a folder, one layer's at a time, whenever they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: dict[str, int] = {}

    def keep(self, name: str, statistics: Statistics) -> None:
        self.rows[name] = statistics.rows
        np.save(self.path(name), statistics.gram.numpy())

    def path(self, name: str) -> Path:
        return self.folder / f"{list(self.rows).index(name)}.npy"

    def __getitem__(self, name: str) -> Statistics:
        return Statistics(torch.from_numpy(np.load(self.path(name))), self.rows[name])

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def bounded_statistics(denoiser: Denoiser, calibration: Calibration, layers: Iterable[str], mib: int,
                       folder: Path) -> Mapping[str, Statistics]:
    """As `input_statistics`, with at most `mib` MiB of Gram matrices in memory, now and while a layer is worked on.

    folder: an empty one, for those that have to wait; it is to outlive the result. Raises ValueError, too, for a layer that
    alone needs more, and where the disk has no room for them.
    """
    known = denoiser.prunable_layers()
    shapes = {name: tuple(known[name].weight.shape) for name in layers}
    check_widths(shapes, mib)
    if fits(shapes, mib):
        return input_statistics(denoiser, calibration, shapes)
    needed = sum(map(gram_bytes, shapes.values()))
    if needed > (free := disk.free_bytes(folder)):
        raise ValueError(f"{KEY}: {mib}: {in_mib(needed)} MiB of Gram matrices have to wait on disk, and {folder} has "
                         f"{free >> 20} MiB free")
    kept, parts = OnDisk(folder), groups(shapes, mib)
    for part in track(parts, len(parts), "mask_search: inputs of the layers"):
        for name, statistics in input_statistics(denoiser, calibration, part).items():
            kept.keep(name, statistics)
    return kept


def input_statistics(denoiser: Denoiser, calibration: Calibration, layers: Iterable[str]) -> dict[str, Statistics]:
    """Layer path -> statistics over the calibration images, all in one pass and in memory.

    Memory: `gram_bytes` for each layer. Raises ValueError for a path that is no Linear or Conv2d of the model, a grouped
    convolution, and a layer that no image reaches.
    """
    known, found = denoiser.prunable_layers(), {}
    for name in layers:
        if name not in known:
            raise ValueError(f"input statistics: {name} is no Linear or Conv2d of the model")
        if getattr(known[name], "groups", 1) != 1:
            raise ValueError(f"input statistics: {name} is a convolution in {known[name].groups} groups, expected 1")
        columns, device = known[name].weight[0].numel(), known[name].weight.device
        found[name] = [torch.zeros(columns, columns, dtype=torch.float64, device=device), 0]
    hooks = [known[name].register_forward_pre_hook(adder(total)) for name, total in found.items()]
    try:
        predictions(denoiser, calibration)
    finally:
        for hook in hooks:
            hook.remove()
    idle = [name for name, (_, rows) in found.items() if not rows]
    if idle:
        raise ValueError(f"input statistics: no calibration image reaches {', '.join(idle)}")
    return {name: Statistics(gram, rows) for name, (gram, rows) in found.items()}


def adder(total: list) -> Callable:
    """A hook that adds a layer's inputs to [gram, rows]."""
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for rows in input_parts(module, inputs[0]):
            x = rows.double()
            total[0].addmm_(x.T, x)
            total[1] += len(x)
    return hook


def input_parts(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """`input_rows` of all images, in parts of ENTRIES at most where one row of output pixels is not more by itself."""
    columns = layer.weight[0].numel()
    for images in x.split(IMAGES):
        if isinstance(layer, nn.Linear):
            yield from input_rows(layer, images).split(max(1, ENTRIES // columns))
            continue
        across = layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0]
        padded, stride, reach = F.pad(images, across), layer.stride[0], layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
        height, width = ((size - layer.dilation[i] * (layer.kernel_size[i] - 1) - 1) // layer.stride[i] + 1
                         for i, size in enumerate(padded.shape[2:]))
        lines = max(1, ENTRIES // (columns * width * len(images)))
        for first in range(0, height, lines):
            last = min(first + lines, height) - 1
            yield unfolded(layer, padded[:, :, first * stride: last * stride + reach])


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """X (rows, columns): the layer's output without its bias is X @ weight.flatten(1).T."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    return unfolded(layer, F.pad(x, (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0])))


def unfolded(layer: nn.Conv2d, padded: Tensor) -> Tensor:
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)  # (N, columns, pixels)
    return patches.transpose(1, 2).flatten(0, 1)
