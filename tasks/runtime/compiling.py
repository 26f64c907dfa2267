"""Graphs compiled for this CPU by OpenVINO, without what it or the CPU gets wrong, and first in a child process.

Two faults of OpenVINO 2026.4.1's CPU compiler are avoided where a graph would meet them; each costs speed and nothing else.
Its snippets, which fuse elementwise operations, end the process where a GroupNormalization's output and another computed tensor
meet in one (the scale and shift of a UNet's `resnet_time_scale_shift: scale_shift`, AdaGroupNorm): such a graph is compiled
without them. And on a CPU without VNNI its products of 8-bit weights add two of them in 16 bits, which saturate: there integer
layers run in fp32 on the rounded values.

What else may end the compiler is not known. A graph with operations in a company in which they have not been compiled before on
this machine is compiled and run by a child process first. Not shipped inside packages.
"""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from tasks.core import rooms
from tasks.runtime.graph_solver import Solving, solved

WEIGHTS = "weights.bin"
LIMIT_S = 600.0  # for a child to compile the graphs of one folder; the largest tried took 3 s each
ROOT = Path(__file__).parents[2]
GIVEN = ("Const", "Parameter")  # sources that compute nothing
UNRELATED = ("INFERENCE_NUM_THREADS", "PERF_COUNT")  # properties that change nothing about what is compiled


@dataclass(frozen=True)
class Anatomy:
    """What has to be known of a graph before it is compiled."""

    company: frozenset[str]  # for every operation its kind and the kinds of those that it reads
    kinds: frozenset[str]    # of its operations
    fatal: bool              # whether snippets would end the compiler


@dataclass(frozen=True)
class Plan:
    """One graph, and how it is compiled."""

    path: Path
    batch: int
    properties: Mapping[str, object]
    company: frozenset[str]
    solving: Solving | None = None  # the solver that is put into it, if one is

    @property
    def setting(self) -> str:
        """Name of all that decides, beside the graph, what the compiler does."""
        used = {key: str(value) for key, value in self.properties.items() if key not in UNRELATED}
        return short_digest(json.dumps([version("openvino"), cpu(), used], sort_keys=True))


def compile_graphs(paths: Sequence[Path], batch: int, weight_bits: int, properties: Mapping[str, object],
                   solving: Solving | None = None) -> list:
    """-> openvino.CompiledModel of each graph, every axis fixed. paths: `0.xml` ... beside `weights.bin`.

    weight_bits: of the widest integers among the weights. Raises ValueError in one line, with the graph, where the compiler
    refuses it or dies of it.
    """
    plans = [planned(path, batch, weight_bits, properties, solving) for path in paths]
    rehearse(plans)
    return [compiled(plan) for plan in plans]


def planned(path: Path, batch: int, weight_bits: int, properties: Mapping[str, object], solving: Solving | None = None) -> Plan:
    found = anatomy(path.read_bytes())
    avoided = {"SNIPPETS_MODE": "DISABLE"} if found.fatal else {}
    if "FakeQuantize" in found.kinds and weight_bits > 7 and saturates():
        avoided |= {"LP_TRANSFORMS_MODE": "NO", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # the second would round by itself
    return Plan(path, batch, {**avoided, **properties}, company_of(found, solving), solving)


def company_of(found: Anatomy, solving: Solving | None) -> frozenset[str]:
    """A loop is another company for all that is inside, an update only for itself."""
    if solving is None:
        return found.company
    own = {f"{'update' if solving.steps is None else 'loop'} with {solving.history} x0 of earlier steps"}
    return own | (found.company if solving.steps is None else {f"loop: {kind}" for kind in found.company})


def short_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def compiled(plan: Plan):
    try:
        return compile_static(plan.path, plan.batch, plan.properties, plan.solving)
    except RuntimeError as error:
        said = " ".join(str(error).split())[-200:]
        raise ValueError(f"{plan.path}: OpenVINO {version('openvino')} cannot compile it: {said}") from error


def compile_static(path: Path, batch: int, properties: Mapping[str, object], solving: Solving | None = None):
    core = openvino_core()
    graph = core.read_model(path, path.with_name(WEIGHTS))
    graph.reshape({port: [batch, *list(port.partial_shape)[1:]] for port in graph.inputs if port.partial_shape.is_dynamic})
    return core.compile_model(graph if solving is None else solved(graph, solving), "CPU", dict(properties))


@functools.cache
def openvino_core():
    import openvino as ov
    return ov.Core()


@functools.cache
def cpu() -> list[str]:
    core = openvino_core()
    return [core.get_property("CPU", "FULL_DEVICE_NAME"), *sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))]


@functools.cache
def saturates() -> bool:
    """Whether this CPU's products of u8 and i8 lose what exceeds 16 bits, found by the largest ones."""
    import numpy as np
    import openvino as ov
    ops, count = ov.opset13, 64
    x = ops.parameter([1, count], np.float32)
    ends = [ops.constant(np.float32(end)) for end in (0, 255)]
    largest = ops.convert(ops.constant(np.full((1, count), 127, np.int8)), np.float32)
    weights = ops.multiply(largest, ops.constant(np.float32(1)))
    product = ops.matmul(ops.fake_quantize(x, *ends, *ends, 256), weights, False, True)
    found = openvino_core().compile_model(ov.Model([product], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return float(found([np.full((1, count), 255, np.float32)])[0].item()) != count * 255 * 127


_anatomies: dict[bytes, Anatomy] = {}


def anatomy(xml: bytes) -> Anatomy:
    """Of a graph as OpenVINO writes it; from memory where the same one was read before."""
    key = hashlib.blake2b(xml).digest()
    if key not in _anatomies:
        _anatomies[key] = read_anatomy(ElementTree.fromstring(xml))
    return _anatomies[key]


def read_anatomy(tree: ElementTree.Element) -> Anatomy:
    kinds = {layer.get("id"): layer.get("type") for layer in tree.iterfind("./layers/layer")}
    sources, readers = defaultdict(list), defaultdict(list)
    for edge in tree.iterfind("./edges/edge"):
        sources[edge.get("to-layer")].append(edge.get("from-layer"))
        readers[edge.get("from-layer")].append(edge.get("to-layer"))

    def read_by(node: str) -> str:
        return ",".join(sorted({"given" if kinds[i] in GIVEN else kinds[i] for i in sources[node]}))

    company = frozenset(f"{read_by(node)}>{kind}" for node, kind in kinds.items())
    return Anatomy(company, frozenset(kinds.values()), is_fatal(kinds, sources, readers))


def is_fatal(kinds: Mapping[str, str], sources: Mapping[str, list], readers: Mapping[str, list]) -> bool:
    """Whether the output of a GroupNormalization meets a tensor that is computed, too. Not every such graph is fatal: where it
    meets a convolution's output nothing happens."""
    def behind(node: str) -> Iterator[tuple[str, str]]:
        for reader in readers[node]:
            yield node, reader
            if kinds[reader] == "Convert":
                yield from behind(reader)

    return any(kinds[other] not in GIVEN for node, kind in kinds.items() if kind == "GroupNormalization"
               for source, reader in behind(node) for other in others(sources[reader], source))


def others(sources: Sequence[str], one: str) -> list[str]:
    """All sources of an operation but one occurrence of `one`."""
    left = list(sources)
    left.remove(one)
    return left


def rehearse(plans: Sequence[Plan]) -> None:
    """Let a child compile and run the graphs that hold what was not compiled on this machine before. Raises ValueError where
    that kills it."""
    new = new_ones(plans)
    if not new:
        return
    given = json.dumps([[str(plan.path.absolute()), plan.batch, dict(plan.properties), plan.solving and asdict(plan.solving)]
                        for plan in new])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    try:
        child = subprocess.run(command(), input=given, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    except subprocess.TimeoutExpired as late:
        raise ValueError(fate(new, late.stdout or b"", f"did not end within {LIMIT_S:.0f} s")) from None
    if child.returncode not in (0, 1):  # 1: it raised, as the compiler will here
        raise ValueError(fate(new, child.stdout, f"was ended by {ending(child.returncode)}"))
    if child.returncode == 0:
        for plan in new:
            remember(plan)


def new_ones(plans: Sequence[Plan]) -> list[Plan]:
    """Those that hold what neither an earlier run nor an earlier one of them holds."""
    seen, found = {plan.setting: set(known(plan.setting)) for plan in plans}, []
    for plan in plans:
        if not plan.company <= seen[plan.setting]:
            found.append(plan)
            seen[plan.setting] |= plan.company
    return found


def command() -> list[str]:
    return [sys.executable, "-P", "-m", "tasks.runtime.compiling"]


def fate(plans: Sequence[Plan], output: str | bytes, what: str) -> str:
    """output: of the child, a line for every graph that it has begun."""
    begun = max(1, len(output.splitlines()))
    return (f"{plans[begun - 1].path}: OpenVINO {version('openvino')} {what} while it compiled this graph in a child process; "
            "this model runs in plain diffusers, or with another version of OpenVINO")


def ending(returncode: int) -> str:
    names = {member.value: member.name for member in signal.Signals}
    return names.get(-returncode, f"signal {-returncode}") if returncode < 0 else f"exit status {returncode}"


_known: dict[str, set[str]] = {}


def known(setting: str) -> set[str]:
    """The company of all operations that were compiled on this machine under one setting."""
    if setting not in _known:
        _known[setting] = set().union(*map(read_company, sorted(memory(setting).glob("*.txt"))))
    return _known[setting]


def read_company(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def remember(plan: Plan) -> None:
    """For this process and for others; a machine that has no room for it compiles in a child again."""
    known(plan.setting).update(plan.company)
    text = "\n".join(sorted(plan.company)) + "\n"
    path = memory(plan.setting) / f"{short_digest(text)}.txt"
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError:
        return


def memory(setting: str) -> Path:
    return rooms.shared() / "compiled" / setting


def main() -> None:
    """What the child does: standard input holds the graphs, standard output says which one it has begun."""
    import numpy as np
    for path, batch, properties, solving in json.load(sys.stdin):
        print(path, flush=True)
        network = compile_static(Path(path), batch, properties, solving and Solving(**solving))
        network([np.zeros(port.shape, port.element_type.to_dtype()) for port in network.inputs])


if __name__ == "__main__":
    main()
