"""Masks on a live model: apply and remove, and the physical removal of hidden units that nothing reads any more.

Shipped inside packages: imports torch alone. A mask is a bool tensor of its parameter's shape, True where the weight stays.
Masks come before precision: quantised layers hold integers, not the parameters that a mask names.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ORIGINALS = "_weights_before_masks"  # a plain attribute of the model: in its copies, not in its state_dict


@dataclass(frozen=True)
class HiddenUnits:
    """Units between two layers: hidden units of a feed-forward, inner channels of an attention's heads or of a resnet.

    A producer with twice as many rows as there are units (a gated feed-forward, a resnet's scale and shift) holds unit i
    in the rows i and i + count.
    """

    block: str                      # module path of the feed-forward, attention or resnet
    count: int
    granule: int                    # units that leave together: a head, the channels of a group of norm2; 1 in a feed-forward
    producers: tuple[str, ...]      # paths of modules whose rows (weight dim 0, bias) make the units
    consumer: str                   # path of the module whose columns (weight dim 1) read them
    products: tuple[str, ...] = ()  # names that costs give to the attention products Q K^T and A V: they shrink with the heads


def hidden_units(model: nn.Module) -> list[HiddenUnits]:
    """Every feed-forward (`net.0.proj` -> `net.2`), self-attention (`to_q`, `to_k`, `to_v` -> `to_out.0`) and resnet
    (`conv1` -> `conv2`) of a diffusers model."""
    found = []
    for path, module in model.named_modules():
        if hasattr(module, "net") and hasattr(module.net[0], "proj"):
            found.append(HiddenUnits(path, module.net[2].in_features, 1, (f"{path}.net.0.proj",), f"{path}.net.2"))
        elif all(hasattr(module, part) for part in ("to_q", "to_k", "to_v", "to_out")):
            width = module.to_out[0].in_features
            found.append(HiddenUnits(path, width, width // module.heads, tuple(f"{path}.to_{part}" for part in "qkv"),
                                     f"{path}.to_out.0", (f"{path}.qk", f"{path}.av")))
        elif all(hasattr(module, part) for part in ("conv1", "norm2", "conv2")):
            parts = ["conv1", "norm2"] + (["time_emb_proj"] if module.time_emb_proj is not None else [])
            group = module.norm2.num_channels // module.norm2.num_groups
            found.append(HiddenUnits(path, module.conv2.in_channels, group, tuple(f"{path}.{part}" for part in parts),
                                     f"{path}.conv2"))
    return found


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero the masked weights in place and keep the originals. Idempotent; masks that were live before are replaced.

    masks: parameter name -> bool tensor of its shape. Raises ValueError for an unknown name or another shape.
    """
    remove_masks(model)
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"mask {name}: the model has no such parameter")
        if mask.shape != parameters[name].shape:
            raise ValueError(f"mask {name}: shape {tuple(mask.shape)}, the parameter's is {tuple(parameters[name].shape)}")
    setattr(model, ORIGINALS, {name: parameters[name].clone() for name in masks})
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device, torch.bool), 0)


@torch.no_grad()
def remove_masks(model: nn.Module) -> None:
    """Put the original weights back, bit for bit; a model without live masks is left as it is."""
    originals = model.__dict__.pop(ORIGINALS, {})
    for name, weight in originals.items():
        model.get_parameter(name).copy_(weight)


def kept_units(units: HiddenUnits, consumer_mask: Tensor) -> Tensor:
    """Indices (k,) of the units that stay, k >= granule; consumer_mask: (out, count, ...) bool.

    A unit goes when every weight that reads it is masked: whatever it computes reaches nothing. The channels of a head share
    its softmax, those of a resnet the statistics of their group in norm2: they go by whole heads and groups only.
    One granule always stays: no layer is empty.
    """
    read = consumer_mask.bool().transpose(0, 1).flatten(1).any(1)
    granules = read.view(-1, units.granule).any(1)
    if not granules.any():
        granules[0] = True
    return granules.repeat_interleave(units.granule).nonzero().flatten()


def shrink_units(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Make the masks permanent and cut the units that nothing reads. -> block path -> kept count, of the blocks that shrank.

    The outputs are those of the masked model up to the rounding of shorter sums. There is no way back: the originals go.
    """
    apply_masks(model, masks)
    model.__dict__.pop(ORIGINALS)
    kept = {}
    for units in hidden_units(model):
        mask = masks.get(f"{units.consumer}.weight")
        index = torch.arange(units.count) if mask is None else kept_units(units, mask)
        if len(index) < units.count:
            select_units(model, units, index)
            kept[units.block] = len(index)
    return kept


def restore_shapes(model: nn.Module, kept: Mapping[str, int]) -> None:
    """Give a model of the original shape the shapes that `shrink_units` left, so that its state_dict loads. Idempotent."""
    blocks = {units.block: units for units in hidden_units(model)}
    for block, count in kept.items():
        if block not in blocks:
            raise ValueError(f"kept units of {block}: the model has no such feed-forward, attention or resnet")
        units = blocks[block]
        if not 0 < count <= units.count or count % units.granule:
            raise ValueError(f"kept units of {block}: {count} is not a multiple of {units.granule} up to {units.count}")
        select_units(model, units, torch.arange(count))


def select_units(model: nn.Module, units: HiddenUnits, index: Tensor) -> None:
    """Keep the units `index` (k,) of one block, in place."""
    for path in units.producers:
        select_rows(model.get_submodule(path), index, units.count)
    consumer = model.get_submodule(units.consumer)
    consumer.weight = selected(consumer.weight, index, dim=1)
    set_width(consumer, ("in_features", "in_channels"), len(index))
    block = model.get_submodule(units.block)
    if hasattr(block, "heads"):  # an attention divides its rows by what it says of itself
        block.heads = block.sliceable_head_dim = len(index) // units.granule
        block.inner_dim = block.inner_kv_dim = len(index)


def select_rows(layer: nn.Module, index: Tensor, count: int) -> None:
    """Keep rows of a Linear or Conv2d, or channels of a GroupNorm, in each of the layer's len(weight) / count copies."""
    rows = torch.cat([index + start for start in range(0, len(layer.weight), count)])
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = len(rows) * layer.num_groups // layer.num_channels
    layer.weight = selected(layer.weight, rows, dim=0)
    if layer.bias is not None:
        layer.bias = selected(layer.bias, rows, dim=0)
    set_width(layer, ("out_features", "out_channels", "num_channels"), len(rows))


def selected(parameter: nn.Parameter, index: Tensor, dim: int) -> nn.Parameter:
    kept = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def set_width(layer: nn.Module, names: tuple[str, ...], width: int) -> None:
    """What the layer says of its own shape: the name differs with its type."""
    setattr(layer, next(name for name in names if hasattr(layer, name)), width)
