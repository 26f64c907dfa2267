"""What one worker does, and the loop that needs none. A worker imports this file alone: it stays light."""

import contextlib
import importlib.metadata
import itertools
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PACKAGES = ("ray", "torch", "diffusers", "numpy")  # other versions may change a result, or what travels between nodes

Settle = Callable[[int, Any], Any]  # (place in the order, result) -> what is kept of it


@dataclass(frozen=True)
class Failed:
    """The result of an item that raised, or whose worker died or hung as often as was allowed."""

    reason: str


@dataclass(frozen=True)
class Known:
    """An item whose result is known already: it keeps its place in the order and costs no worker."""

    value: Any


def map_here(build: Callable[[], Callable], items: Iterable, lookahead: int, threads: int, settle: Settle | None) -> Iterator:
    source = enumerate(items)
    window = deque(itertools.islice(source, lookahead))
    while window:
        index, item = window.popleft()
        if isinstance(item, Known):
            yield item.value
        else:
            with torch_threads(threads):
                result = attempt(build(), item)
            yield settle(index, result) if settle else result
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

    def check(self, wanted: Mapping[str, str]) -> None:
        check_versions(wanted)

    def start(self, make: Callable[[], Callable]) -> None:
        self.apply = make()

    def call(self, items: Sequence[Any]) -> list[Any]:
        return [attempt(self.apply, item) for item in items]


def versions() -> dict[str, str]:
    """Of Python and of PACKAGES, as they are installed here."""
    return {"python": platform.python_version(), **{package: installed(package) for package in PACKAGES}}


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def mismatch(node: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """One line that names the node, the packages and both versions of each; None where all agree."""
    other = [f"{package} {found[package]} instead of {version}" for package, version in wanted.items()
             if found[package] != version]
    return f"cluster: node {node} has {', '.join(other)}; constraints.txt is to be installed there, too" if other else None


def check_versions(wanted: Mapping[str, str]) -> None:
    """wanted: the driver's `versions()`. Raises ValueError where this process has others."""
    if said := mismatch(platform.node(), versions(), wanted):
        raise ValueError(said)
