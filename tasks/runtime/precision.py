"""Bit-widths on a live model: integer weights per output channel, static activation ranges, bf16, and back again.

Arithmetic: weights are symmetric, w = scale[out] * q with |q| <= 2^(b-1) - 1, so a masked zero stays exactly zero;
activations are affine per tensor, x = scale * (q - zero) with 0 <= q < 2^a and zero an integer, so zero padding stays exact
(Krishnamoorthi, arXiv 1806.08342, sections 2.1 and 3.1). Torch computes the products in fp32 on dequantised values;
the OpenVINO form of the same modules computes them in integers.

An input that is a concatenation, as behind a UNet's skip connection, may have a range for each part; the parts' products are
added (Q-Diffusion, arXiv 2302.04304, section 4.2.2).

Masks go on first: integers are made from the weights as they are at the first `apply_precision`. A quantised layer's state dict
holds `weight_int`, `weight_scale` and `bias`. This file ships inside packages, so it imports nothing of the project.
"""

import copy
import functools
import itertools
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (3, 4, 5, 6, 7, 8)
_TOKEN = re.compile(r"w([3-8])a([3-8])")
_CLIPS = torch.linspace(0.3, 1.0, 15).tolist()  # shares of the full range tried as the clipping point
_KEPT_PER_BATCH = 4096  # activations of a layer kept from a calibration batch
_KEPT = 8192            # of these from all batches: the search for a clipping point runs through them 30 times for each width

# layer -> (lo, hi), or one such pair for each of WIDTHS; of an input of parts: {"channels": [n, ...], "parts": [such, ...]}
Ranges = Mapping[str, Sequence | Mapping]
Affine = tuple[float, int]  # scale, zero point
Integers = Mapping[tuple[str, int], Tensor]  # (layer, bits of its weights) -> int8 of the weight's shape


@functools.cache
def widths(token: str) -> tuple[int, int] | None:
    """"w4a8" -> (4, 8): bits of weights and activations; None for fp32 and bf16. Raises ValueError for anything else."""
    if token in ("fp32", "bf16"):
        return None
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise ValueError(f"precision {token!r} is not fp32, bf16 or w<3..8>a<3..8>")
    return int(match[1]), int(match[2])


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(out, ...) -> int8 of the same shape, fp32 scale (out,). An all-zero channel has scale 1.

    The scale covers the largest weight from 7 bits up; below, each channel takes the clipping point of least squared error
    (Banner et al., arXiv 1810.05723, section 3, by grid search instead of a prior on the distribution).
    """
    top = 2 ** (bits - 1) - 1
    rows = weight.detach().float().flatten(1)
    peak = rows.abs().amax(1, keepdim=True)
    peak = torch.where(peak > 0, peak, float(top))
    scales = [peak * clip / top for clip in (_CLIPS if bits <= 6 else [1.0])]
    errors = torch.cat([(_on_grid(rows, s, top) * s - rows).square().sum(1, keepdim=True) for s in scales], 1)
    scale = torch.cat(scales, 1).gather(1, errors.argmin(1, keepdim=True))
    return _on_grid(rows, scale, top).to(torch.int8).view(weight.shape), scale.flatten()


def _on_grid(rows: Tensor, scale: Tensor, top: int) -> Tensor:
    return (rows / scale).round().clamp_(-top, top)


def input_affine(value_range: Sequence, bits: int) -> tuple[float, int]:
    """(lo, hi), or one pair per width of WIDTHS -> scale, zero point of `bits` bits; the range is widened to hold 0."""
    lo, hi = value_range[WIDTHS.index(bits)] if isinstance(value_range[0], Sequence) else value_range
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    top = 2**bits - 1
    scale = (hi - lo) / top or 1.0
    return scale, min(top, max(0, round(-lo / scale)))


def input_parts(ranges: Sequence | Mapping, bits: int) -> tuple[tuple[int, Affine], ...]:
    """(channels, affine) of each part of an input; 0 channels: all there are."""
    if isinstance(ranges, Mapping):
        return tuple((n, input_affine(part, bits)) for n, part in zip(ranges["channels"], ranges["parts"], strict=True))
    return ((0, input_affine(ranges, bits)),)


def _spans(parts: Sequence[tuple[int, Affine]]) -> list[tuple[slice | None, Affine]]:
    """The channels of each part; None: all of them."""
    if len(parts) == 1:
        return [(None, parts[0][1])]
    ends = list(itertools.accumulate(channels for channels, _ in parts))
    return [(slice(end - channels, end), affine) for end, (channels, affine) in zip(ends, parts, strict=True)]


def _of_span(x: Tensor, span: slice | None) -> Tensor:
    return x if span is None else x[:, span]


class _Quantized(nn.Module):
    """A layer with integer weights. `base` lends its bias and geometry; its weight is not touched.

    table: what `prepared` made of the integers, shared by all layers of one weight and width. parts: see `input_parts`.
    """

    def __init__(self, base: nn.Module, weight_int: Tensor, weight_scale: Tensor, table: Tensor,
                 parts: Sequence[tuple[int, Affine]], bits: tuple[int, int]):
        super().__init__()
        self.register_buffer("weight_int", weight_int)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("table", table, persistent=False)
        self.bias = base.bias
        self.weight_bits, self.input_bits = bits
        self.spans = _spans(parts)
        self.register_load_state_dict_post_hook(_Quantized._refresh_table)

    def _refresh_table(self, _incompatible_keys) -> None:
        self.table = self.prepared(self.weight_int, self.weight_scale)

    @staticmethod
    def prepared(weight_int: Tensor, weight_scale: Tensor) -> Tensor:
        return dequantize(weight_int, weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        products = [self.product(self.rounded(_of_span(x, span).float(), affine), self.weight(span), None if i else self.bias)
                    for i, (span, affine) in enumerate(self.spans)]
        return sum(products[1:], products[0]).to(x.dtype)

    def weight(self, span: slice | None) -> Tensor:
        # A traced graph must hold the integers and their scale; in torch the table saves a pass over the weights.
        if torch.jit.is_tracing():
            return dequantize(_of_span(self.weight_int, span), self.weight_scale)
        return _of_span(self.table, span)

    def rounded(self, x: Tensor, affine: Affine) -> Tensor:
        top, (scale, zero) = 2**self.input_bits - 1, affine
        if torch.jit.is_tracing() and top < 255:
            # The same values on a grid of 256: OpenVINO 2026.4 runs FakeQuantize of other widths as int8 but moves the grid.
            x, top = x.clamp(-zero * scale, (top - zero) * scale), 255
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, top)


class QuantLinear(_Quantized):
    """x (..., in) -> (..., out)."""

    product = staticmethod(F.linear)


class QuantConv2d(_Quantized):
    """x (N, in, H, W) -> (N, out, H', W')."""

    def __init__(self, base: nn.Conv2d, *args):
        super().__init__(base, *args)
        if base.padding_mode != "zeros":
            raise ValueError(f"padding_mode {base.padding_mode!r} is not zeros")
        self.geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation, "groups": base.groups}

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, **self.geometry)


Kinds = tuple[type, type]  # of Linear, of Conv2d
SIMULATED: Kinds = (QuantLinear, QuantConv2d)


class Bf16Layer(nn.Module):
    """Weight, bias and input cast to bf16, the output cast back. They are buffers: diffusers takes the type of a model's first
    parameter for that of all (a UNet casts its time embedding to it)."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.layer = copy.deepcopy(base).to(torch.bfloat16)
        for name, parameter in list(self.layer.named_parameters(recurse=False)):
            delattr(self.layer, name)
            self.layer.register_buffer(name, parameter.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(torch.bfloat16)).to(x.dtype)


def dequantize(weight_int: Tensor, scale: Tensor) -> Tensor:
    """int8 (out, ...), (out,) -> fp32 (out, ...)."""
    return weight_int.float() * scale.view(-1, *[1] * (weight_int.dim() - 1))


@dataclass
class _State:
    """What `apply_precision` keeps on the model: the modules it took out and those it has made so far."""

    slots: dict[str, tuple[nn.Module, str, nn.Module]] = field(default_factory=dict)  # layer -> parent, leaf, original
    weights: dict[tuple, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)  # by layer, width and kind
    modules: dict[tuple, nn.Module] = field(default_factory=dict)  # by layer, token, the input's scales and zero points, kind


def apply_precision(model: nn.Module, plan: Mapping[str, str], ranges: Ranges, kinds: Kinds = SIMULATED,
                    integers: Integers = types.MappingProxyType({})) -> None:
    """Give every layer its precision, in place; layers that the plan leaves out are fp32.

    plan: module path of a Linear or Conv2d -> token (see `widths`). ranges: see `calibrate_ranges`; needed for the layers of
    integer width only. kinds: the classes that compute integer layers. integers: weights that are not to go to the nearest
    one, on the grid of `quantize_weight`. Another call switches: the integers of a layer and width are made or taken once, so
    that a switch costs microseconds a layer. Move the model to its device before the first call.
    Raises ValueError for an unknown layer or token and for a missing range; the model is then unchanged.
    """
    state = vars(model).setdefault("_precision", _State())
    wanted = dict.fromkeys(state.slots, "fp32") | dict(plan)
    chosen = [(_slot(model, state, layer), _module(state, layer, token, ranges, kinds, integers))
              for layer, token in wanted.items()]
    for (parent, leaf, _), module in chosen:
        parent._modules[leaf] = module


def remove_precision(model: nn.Module) -> None:
    """Put the original modules back and forget all tables; nothing happens if no precision is applied."""
    for parent, leaf, original in vars(model).pop("_precision", _State()).slots.values():
        parent._modules[leaf] = original


def forget_originals(model: nn.Module) -> None:
    """Free what only `remove_precision` or another width would need: a package that was opened stays as it is."""
    state = vars(model).get("_precision", _State())
    state.weights.clear()
    state.modules.clear()
    for parent, leaf, original in state.slots.values():
        if parent._modules[leaf] is not original:
            original.to("meta")


def live_precision(model: nn.Module) -> dict[str, str]:
    """Layer -> token, as the last `apply_precision` left it; a layer it never named is missing."""
    state = vars(model).get("_precision", _State())
    return {layer: _token(parent._modules[leaf]) for layer, (parent, leaf, _) in state.slots.items()}


def _token(module: nn.Module) -> str:
    if isinstance(module, _Quantized):
        return f"w{module.weight_bits}a{module.input_bits}"
    return "bf16" if isinstance(module, Bf16Layer) else "fp32"


def _slot(model: nn.Module, state: _State, layer: str) -> tuple[nn.Module, str, nn.Module]:
    if layer not in state.slots:
        path, _, leaf = layer.rpartition(".")
        try:
            parent, original = model.get_submodule(path), model.get_submodule(layer)
        except AttributeError:
            raise ValueError(f"precision plan: the model has no layer {layer!r}") from None
        if not isinstance(original, (nn.Linear, nn.Conv2d)):
            raise ValueError(f"precision plan: {layer!r} is a {type(original).__name__}, not a Linear or Conv2d")
        state.slots[layer] = (parent, leaf, original)
    return state.slots[layer]


def _module(state: _State, layer: str, token: str, ranges: Ranges, kinds: Kinds, integers: Integers) -> nn.Module:
    """The module that computes `layer` at this precision, made on first use."""
    original, bits = state.slots[layer][2], widths(token)
    if token == "fp32":
        return original
    if bits is not None and layer not in ranges:
        raise ValueError(f"precision plan: {layer!r} is {token} but has no activation range; calibrate_ranges measures it")
    parts = None if bits is None else input_parts(ranges[layer], bits[1])
    kind = kinds[isinstance(original, nn.Conv2d)]
    key = (layer, token, parts, bits and kind)
    if key not in state.modules:
        state.modules[key] = Bf16Layer(original) if bits is None else _quantized(state, layer, parts, bits, kind, integers)
    return state.modules[key]


def _quantized(state: _State, layer: str, parts: Sequence[tuple[int, Affine]], bits: tuple[int, int], kind: type,
               integers: Integers) -> nn.Module:
    original = state.slots[layer][2]
    key = (layer, bits[0], kind)
    if key not in state.weights:
        nearest, scale = quantize_weight(original.weight, bits[0])
        weight_int = integers.get((layer, bits[0]), nearest)
        state.weights[key] = (weight_int, scale, kind.prepared(weight_int, scale))
    return kind(original, *state.weights[key], parts, bits)


@torch.no_grad()
def calibrate_ranges(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
                     joins: Mapping[str, Sequence[int]] = types.MappingProxyType({})) -> dict[str, list | dict]:
    """Static ranges of the inputs of every Linear and Conv2d, measured with the precision removed.

    batches: (x, t, labels) of states drawn across whole trajectories, at least 128 samples together (8 samples: 20 times the
    error on a DiT). -> layer -> [[lo, hi], ...], one pair for each of WIDTHS: the clipping point of least squared error on a
    sample of the values seen, as with weights. On a DiT of 6 x 128 the output's relative error falls by it from 0.020 to 0.019
    with w8a8 and from 0.39 to 0.16 with w4a4, against the smallest and largest value. joins: layer -> channels of each part of
    its input (`Denoiser.joins`), which then have ranges of their own.
    """
    remove_precision(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    spans = {name: [span for span, _ in _spans([(n, None) for n in joins.get(name, (0,))])] for name in layers}
    seen: dict[str, list[list[Tensor]]] = {name: [[] for _ in spans[name]] for name in layers}

    def record(name: str, x: Tensor) -> None:
        for span, kept in zip(spans[name], seen[name], strict=True):
            kept.append(_thinned(_of_span(x, span), _KEPT_PER_BATCH))

    hooks = [m.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0])) for name, m in layers.items()]
    try:
        for x, t, labels in batches:
            model(x, timestep=t, class_labels=labels, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    samples = {name: [_thinned(torch.cat(kept), _KEPT) for kept in parts] for name, parts in seen.items() if parts[0]}
    found = {name: [[_clipped_range(values, bits) for bits in WIDTHS] for values in parts] for name, parts in samples.items()}
    return {name: {"channels": list(joins[name]), "parts": parts} if name in joins else parts[0]
            for name, parts in found.items()}


def _thinned(x: Tensor, n: int) -> Tensor:
    """About n of the values, evenly spread, and the two extremes: 8 bits are worse off without them."""
    values = x.detach().float().flatten()
    stride = max(1, values.numel() // n) | 1  # odd: no multiple of a width, so all channels are seen
    return torch.cat([values[::stride], values.min()[None], values.max()[None]]).cpu()


def _clipped_range(values: Tensor, bits: int) -> list[float]:
    """[lo, hi] of least squared error: first the upper end, then the lower, each over _CLIPS."""
    lo, hi = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    hi = min((hi * clip for clip in _CLIPS), key=lambda end: _rounding_error(values, (lo, end), bits))
    return [min((lo * clip for clip in _CLIPS), key=lambda end: _rounding_error(values, (end, hi), bits)), hi]


def _rounding_error(values: Tensor, value_range: tuple[float, float], bits: int) -> float:
    rounded = torch.fake_quantize_per_tensor_affine(values, *input_affine(value_range, bits), 0, 2**bits - 1)
    return (rounded - values).square().sum().item()


def pack(values: Tensor, bits: int) -> Tensor:
    """int8 of any shape -> uint8 (ceil(n * bits / 8),): two's complement of `bits` bits a value, lowest bit first.

    Raises ValueError for a value outside [-2^(bits-1), 2^(bits-1) - 1].
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if values.numel() and not low <= int(values.min()) <= int(values.max()) <= high:
        raise ValueError(f"pack: values from {int(values.min())} to {int(values.max())} do not fit {bits} bits ({low}..{high})")
    digits = np.unpackbits(values.cpu().numpy().view(np.uint8).reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(digits, bitorder="little"))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 (m,) -> int8 (count,). Raises ValueError if `packed` holds another number of values."""
    if packed.numel() != -(-count * bits // 8):
        raise ValueError(f"unpack: {packed.numel()} bytes, expected {-(-count * bits // 8)} for {count} values of {bits} bits")
    digits = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    sign_extended = np.concatenate([digits, np.repeat(digits[:, -1:], 8 - bits, axis=1)], axis=1)
    return torch.from_numpy(np.packbits(sign_extended, axis=1, bitorder="little").reshape(count).view(np.int8))
