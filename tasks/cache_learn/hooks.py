"""See and change what sublayers put out, for the length of one `with` block."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn


@contextlib.contextmanager
def rewrite(model: nn.Module, sublayers: Sequence[str], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Every sublayer's output becomes change(i, output), i its index in `sublayers`."""
    hooks = [model.get_submodule(name).register_forward_hook(lambda _, args, output, i=i: change(i, output))
             for i, name in enumerate(sublayers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
