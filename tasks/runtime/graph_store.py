"""The graphs of a package as one small file: what `denoiser/` holds, too, is stored there alone. Not shipped inside packages.

Nearly all constants of the graphs are tensors of the network, byte for byte. `graphs.zip` has the other constants, the places
of the tensors among them, and the graphs themselves, whose XML shrinks to a twentieth.
"""

import json
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tasks.runtime import packed
from tasks.runtime.checks import describe, file_facts, read_object
from tasks.runtime.compiling import WEIGHTS
from tasks.runtime.graph_index import INDEX, STORED
from tasks.runtime.packed import blamed_on, decode

PLACES = "places.json"  # [[offset, tensor], ...]: where the tensors of `denoiser/` belong in `weights.bin`
MOST_PLACES = 2**26  # bytes
EPOCH = 1980, 1, 1, 0, 0, 0  # of every entry, so that the same graphs give the same bytes


def store(folder: Path) -> None:
    """Put `graphs.zip` in the place of the graphs and their weights in a package's `openvino/`, as `export` wrote them."""
    index = read_object(folder / INDEX)
    graphs = {name: (folder / name).read_bytes() for name in index["files"]}
    tensors = {bytes_of(tensor): name for name, tensor in sorted(stored_tensors(folder.parent).items())}
    pool, places = bytearray(graphs[WEIGHTS]), {}
    for start, size in {span for name, xml in graphs.items() if name != WEIGHTS for span in constants(xml)}:
        name = tensors.get(graphs[WEIGHTS][start : start + size])
        if name is not None:
            places[start], pool[start : start + size] = name, bytes(size)  # zeros take next to no room
    graphs |= {WEIGHTS: bytes(pool), PLACES: json.dumps(sorted(places.items())).encode()}
    with zipfile.ZipFile(folder / STORED, "w") as archive:
        for name in sorted(graphs):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), graphs[name], zipfile.ZIP_DEFLATED, 9)
    for name in index["files"]:
        (folder / name).unlink()


def unpacked(folder: Path, index: Mapping) -> tempfile.TemporaryDirectory:
    """A folder as `export` wrote it, removed with the object; `folder` holds `graphs.zip`, and its index was checked.

    Raises ValueError in one line where the file and the package's tensors do not give what the index says.
    """
    path, files = folder / STORED, tempfile.TemporaryDirectory(prefix="diffpress-graph-")
    tensors = stored_tensors(folder.resolve().parent)
    with blamed_on(path), zipfile.ZipFile(path) as archive:
        graphs = {name: entry(archive, name, facts["bytes"]) for name, facts in index["files"].items()}
        places = json.loads(entry(archive, PLACES, None))
        graphs[WEIGHTS] = with_tensors(graphs[WEIGHTS], places, tensors)
    for name, content in graphs.items():
        place = Path(files.name, name)
        place.write_bytes(content)
        if (found := file_facts(place)) != (expected := index["files"][name]):
            raise ValueError(f"{path}: {name}: expected {describe(expected)}, found {describe(found)}")
    Path(files.name, INDEX).write_bytes((folder / INDEX).read_bytes())
    return files


def entry(archive: zipfile.ZipFile, name: str, size: int | None) -> bytes:
    """size: in bytes; None: any up to MOST_PLACES."""
    found = archive.getinfo(name).file_size  # no more than this is ever read
    if found != size if size is not None else found > MOST_PLACES:
        raise ValueError(f"{name} has {found} bytes, expected {size or f'at most {MOST_PLACES}'}")
    return archive.read(name)


def with_tensors(pool: bytes, places: list, tensors: Mapping[str, Tensor]) -> bytes:
    whole = bytearray(pool)
    for start, name in places:
        content = bytes_of(tensors[name])
        if not 0 <= start <= len(whole) - len(content):
            raise ValueError(f"{name} at {start} is not within {WEIGHTS}, which has {len(whole)} bytes")
        whole[start : start + len(content)] = content
    return bytes(whole)


def stored_tensors(package: Path) -> dict[str, Tensor]:
    """The network's tensors as they are in memory."""
    denoiser = package / "denoiser"
    with blamed_on(denoiser / packed.WEIGHTS):
        return decode(load_file(denoiser / packed.WEIGHTS), read_object(denoiser / packed.PACKING)["tensors"])


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def constants(xml: bytes) -> list[tuple[int, int]]:
    """Offset and size of each constant of a graph."""
    found = ElementTree.fromstring(xml).iterfind("./layers/layer[@type='Const']/data")
    return [(int(data.get("offset")), int(data.get("size"))) for data in found]
