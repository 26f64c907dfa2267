"""What timestep and label alone decide: computed apart from the network, and given to it as one row of numbers a sample.

Shipped inside packages. A list of timesteps is fixed, so whatever depends on nothing else has few values in all: it need not be
computed at every step, and a network that is given it does not know its time. Two cuts of a network are known:

`modulation`: what timestep and label make of every block's input; a DiT's adaLN vectors, the projections of a UNet's resnets.
`time`: what the timestep alone makes, where labels are so many that a table of modulations would outgrow the network.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTRIBUTE = "_given_rows"
MODULATION, TIME = CUTS = ("modulation", "time")
LARGEST_TABLE = 2**24  # numbers, 64 MiB: of modulations for every label and all steps
MANY_STEPS = 64        # for which there must be room


def label_rows(model: nn.Module) -> int:
    """Rows of the label table, that of no label included; 0 for a network without labels."""
    if hasattr(model, "transformer_blocks"):
        return model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings
    return 0 if model.class_embedding is None else model.class_embedding.num_embeddings


def suitable_cut(model: nn.Module) -> str:
    """Modulations, unless a table of them would be too large or some norm of a UNet reads the time embedding itself."""
    if any(type(module).__name__ == "AdaGroupNorm" for module in model.modules()):
        return TIME
    numbers = max(label_rows(model), 1) * sum(widths(model, MODULATION))
    return MODULATION if numbers * MANY_STEPS <= LARGEST_TABLE else TIME


def given_modules(model: nn.Module, cut: str) -> tuple[str, ...]:
    """Paths of the modules whose outputs a row holds, in its order."""
    if not hasattr(model, "transformer_blocks"):
        return tuple(f"{name}.time_emb_proj" for name, _ in resnets(model)) if cut == MODULATION else ("time_embedding",)
    part = "norm1.linear" if cut == MODULATION else "norm1.emb.timestep_embedder"
    blocks = tuple(f"transformer_blocks.{i}.{part}" for i in range(len(model.transformer_blocks)))
    return (*blocks, "proj_out_1") if cut == MODULATION else blocks


def idle_modules(model: nn.Module, cut: str) -> tuple[str, ...]:
    """Paths of the modules that only serve the given ones."""
    if hasattr(model, "transformer_blocks"):
        part = "norm1.emb" if cut == MODULATION else "norm1.emb.time_proj"
        return tuple(f"transformer_blocks.{i}.{part}" for i in range(len(model.transformer_blocks)))
    if cut == TIME:
        return ("time_proj",)
    return ("time_proj", "time_embedding", *(() if model.class_embedding is None else ("class_embedding",)))


def resnets(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """A UNet's modules that take a projection of the time embedding."""
    return [(name, module) for name, module in model.named_modules() if getattr(module, "time_emb_proj", None) is not None]


def row_parts(model: nn.Module, cut: str, t: Tensor, labels: Tensor | None) -> list[Tensor]:
    """t: (N,) fp32; labels: (N,) int64, or None where the network or the cut has none -> (N, width) of each given module, from
    the layers as they are live on the model."""
    if not hasattr(model, "transformer_blocks"):
        return unet_parts(model, cut, t, labels)
    norms = [block.norm1 for block in model.transformer_blocks]
    if cut == TIME:
        return [norm.emb.timestep_embedder(norm.emb.time_proj(t)) for norm in norms]
    embedded = [norm.emb(t, labels, hidden_dtype=torch.float32) for norm in norms]
    found = [norm.linear(norm.silu(emb)) for norm, emb in zip(norms, embedded, strict=True)]
    return [*found, model.proj_out_1(F.silu(embedded[0]))]


def unet_parts(model: nn.Module, cut: str, t: Tensor, labels: Tensor | None) -> list[Tensor]:
    learned = isinstance(model.time_proj, nn.Embedding)  # has a row for each timestep, of which the nearest is taken
    emb = model.time_embedding(model.time_proj(t.round().long() if learned else t))
    if cut == TIME:
        return [emb]
    if model.class_embedding is not None:
        emb = emb + model.class_embedding(labels)
    return [m.time_emb_proj(emb if m.skip_time_act else m.nonlinearity(emb)) for _, m in resnets(model)]


@torch.no_grad()
def widths(model: nn.Module, cut: str) -> tuple[int, ...]:
    """Of the parts of a row."""
    first = torch.zeros(1, device=next(model.parameters()).device)
    labels = first.long() if label_rows(model) else None
    return tuple(part.shape[1] for part in row_parts(model, cut, first, labels))


@torch.no_grad()
def rows_of(model: nn.Module, cut: str, times: Sequence[float]) -> Tensor:
    """-> (times, label rows or 1, width of a row): for every time and, of modulations, every label."""
    labels = None if cut == TIME or not label_rows(model) else torch.arange(label_rows(model))
    count = 1 if labels is None else len(labels)
    return torch.stack([torch.cat(row_parts(model, cut, torch.full((count,), float(t)), labels), 1) for t in times])


class Part(nn.Module):
    """Stands in for a module whose output is given."""

    def __init__(self, given: "Given", i: int):
        super().__init__()
        self.given, self.i = given, i

    def forward(self, *args, **kwargs) -> Tensor:
        return self.given.parts[self.i]


class Idle(nn.Module):
    """Stands in for a module whose output nobody reads."""

    def forward(self, *args, **kwargs) -> Tensor:
        return torch.zeros(1)


class Given:
    """The rows of the evaluation under way: set `rows`, (N, width), before the network is called."""

    def __init__(self, cut: str, widths: Sequence[int]):
        self.cut, self.widths = cut, tuple(widths)
        self.parts: tuple[Tensor, ...] = ()
        self.replaced: list[tuple[nn.Module, str, nn.Module]] = []  # parent, leaf, what was there

    @property
    def width(self) -> int:
        return sum(self.widths)

    def set_rows(self, rows: Tensor) -> None:
        self.parts = rows.split(self.widths, 1)


def give_rows(model: nn.Module, cut: str) -> Given:
    """Make the network take rows and neither timestep nor, with modulations, label, in place; `take_rows_away` ends it."""
    take_rows_away(model)
    given = Given(cut, widths(model, cut))
    stand_ins = {name: Part(given, i) for i, name in enumerate(given_modules(model, cut))}
    stand_ins |= {name: Idle() for name in idle_modules(model, cut)}
    for name, module in stand_ins.items():
        path, _, leaf = name.rpartition(".")
        parent = model.get_submodule(path)
        given.replaced.append((parent, leaf, parent._modules[leaf]))
        parent._modules[leaf] = module
    setattr(model, ATTRIBUTE, given)
    return given


def take_rows_away(model: nn.Module) -> None:
    """Put back what `give_rows` took out; nothing happens where it took nothing."""
    given = vars(model).pop(ATTRIBUTE, None)
    for parent, leaf, module in given.replaced if given is not None else ():
        parent._modules[leaf] = module


class RowTable:
    """The rows of times met so far, each computed once for all labels."""

    def __init__(self, compute: Callable[[float], Tensor], known: Mapping[float, Tensor] | None = None,
                 most: int = LARGEST_TABLE):
        """compute: a time -> (labels or 1, width). known: of times that need not be computed. most: numbers that are kept."""
        self.compute, self.kept, self.most = compute, dict(known or {}), most

    def at(self, t: float) -> Tensor:
        """-> (labels or 1, width)."""
        if t not in self.kept:
            found = self.compute(t)
            while self.kept and (len(self.kept) + 1) * found.numel() > self.most:
                self.kept.pop(next(iter(self.kept)))
            self.kept[t] = found
        return self.kept[t]

    def __call__(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """t: (N,) or one for all; labels: (N,), or None where rows know none -> (N, width), or (1, width) for all."""
        times = t.flatten().tolist()
        if any(time != times[0] for time in times):
            return torch.cat([self(one, None if labels is None else labels[i : i + 1]) for i, one in enumerate(t)])
        found = self.at(times[0])
        return found if labels is None or len(found) == 1 else found[labels]
