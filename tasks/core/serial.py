"""What one worker does, and the loop that needs none. A worker imports this file alone: it stays light."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Failed:
    """The result of an item that raised, or whose worker died or hung as often as was allowed."""

    reason: str


@dataclass(frozen=True)
class Known:
    """An item whose result is known already: it keeps its place in the order and costs no worker."""

    value: Any


def map_here(build: Callable[[], Callable], items: Iterable, lookahead: int, threads: int) -> Iterator:
    source = iter(items)
    window = deque(itertools.islice(source, lookahead))
    while window:
        item = window.popleft()
        if isinstance(item, Known):
            yield item.value
        else:
            with torch_threads(threads):
                result = attempt(build(), item)
            yield result
        window.extend(itertools.islice(source, 1))


@contextlib.contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """As many threads as a worker has: another number may move the last bits of a matrix product."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attempt(f: Callable, item: Any) -> Any:
    try:
        return f(item)
    except Exception as error:  # whatever one item raises is that item's result, not the end of the others
        return Failed(f"{type(error).__name__}: {error}")


class Worker:
    """The body of an actor."""

    def start(self, make: Callable[[], Callable]) -> None:
        self.apply = make()

    def call(self, item: Any) -> Any:
        return attempt(self.apply, item)
