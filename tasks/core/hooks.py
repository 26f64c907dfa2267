"""See and change what sublayers, or the trunk, put out, for the length of one `with` block."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tasks.runtime.cache import TRUNK, trunk


@contextlib.contextmanager
def rewrite(model: nn.Module, sublayers: Sequence[str], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Every sublayer's output becomes change(i, output), i its index in `sublayers`."""
    hooks = [hook for i, name in enumerate(sublayers) for hook in hooked(model, name, partial(change, i))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def hooked(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    if name != TRUNK:
        return [model.get_submodule(name).register_forward_hook(lambda _, args, output: change(output))]
    blocks, entered = trunk(model), []

    def enter(block: nn.Module, args: tuple, kwargs: dict) -> None:
        entered[:] = [args[0] if args else kwargs["hidden_states"]]

    def leave(block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        added = output - entered[0]
        changed = change(added)
        return output if changed is added else entered[0] + changed

    return [blocks[0].register_forward_pre_hook(enter, with_kwargs=True), blocks[-1].register_forward_hook(leave)]


@contextlib.contextmanager
def record(model: nn.Module, sublayers: Sequence[str]) -> Iterator[list[Tensor]]:
    """Yields a list that holds, once the model has run, every sublayer's output in the order of `sublayers`."""
    outputs: list[Tensor] = [None] * len(sublayers)  # type: ignore[list-item]

    def keep(i: int, output: Tensor) -> Tensor:
        outputs[i] = output
        return output

    with rewrite(model, sublayers, keep):
        yield outputs


@contextlib.contextmanager
def replaced(model: nn.Module, sublayer: str, output: Tensor) -> Iterator[None]:
    """One sublayer returns `output`, whatever it computes."""
    with rewrite(model, [sublayer], lambda _, fresh: output):
        yield
