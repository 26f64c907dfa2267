"""A package's graphs as one file beside the network's tensors are what was exported, or are refused."""

import gc
import json
import shutil
import zipfile

import pytest
import torch

from tasks.core.denoiser import build
from tasks.core.recipe import CachePlan, Recipe
from tasks.package.write import seal, write_package
from tasks.pretrain_load.architectures import SCHEDULE, dit
from tasks.runtime import graph
from tasks.runtime.graph import export, open_graph
from tasks.runtime.graph_store import store
from tasks.runtime.packed import open_model
from tasks.runtime.precision import calibrate_ranges

PLAN = CachePlan(sublayers=("transformer_blocks.0.ff",), compute=((True,), (False,), (True,)))
TOKENS = ("w8a8", "bf16", "w4a8", "fp32")
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T, LABELS = torch.tensor([900.0, 900.0]), torch.tensor([0, 1])


def write(folder, seed=0):
    denoiser = build("DiTTransformer2DModel", dit(8, 1, 4, width=64, depth=1, heads=2, patch=2), SCHEDULE)
    rng = torch.Generator().manual_seed(seed)
    for parameter in denoiser.model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=rng)
    ranges = calibrate_ranges(denoiser.model, [(X, T, LABELS)], denoiser.joins())
    precision = {layer: TOKENS[i % 4] for i, layer in enumerate(ranges) if i % 4 < 3}
    name = next(layer for layer, token in precision.items() if token == "w8a8") + ".weight"
    masks = {name: denoiser.model.get_parameter(name) > 0}
    recipe = Recipe(timesteps=(900, 500, 100), cache=PLAN, precision=precision,
                    sparsity={"grain": "2:4", "density": {name.removesuffix(".weight"): 0.5}})
    write_package(denoiser, recipe, ranges, masks, folder)
    export(open_model(folder / "denoiser")[0], recipe, folder / "openvino")
    seal(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("packages") / "plain")


@pytest.fixture
def package(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "p")
    store(folder / "openvino")
    seal(folder)
    return folder


@pytest.fixture
def nothing_compiles(monkeypatch):
    monkeypatch.setattr(graph, "compile_graphs", lambda *_: pytest.fail("compiled"))


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_graph(folder, 2, 1)
    assert "\n" not in str(caught.value)


def test_what_is_unpacked_is_what_was_exported_and_is_gone_with_the_graph(package, plain):
    assert {path.name for path in (package / "openvino").iterdir()} == {"graphs.zip", "graph.json"}
    predict, exported = open_graph(package / "openvino", 2, 1), open_graph(plain / "openvino", 2, 1)
    folder = predict.folder
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (plain / "openvino").iterdir())
    assert all((folder / name).read_bytes() == (plain / "openvino" / name).read_bytes() for name in names)
    assert torch.equal(predict(X, T, LABELS, 0), exported(X, T, LABELS, 0))
    del predict
    gc.collect()  # it refers to itself
    assert not folder.exists()


def test_weights_are_stored_once(package, plain):
    """By zlib alone random weights keep nine tenths of their size; what stays of them here is the index of their places."""
    weights = (plain / "openvino" / "weights.bin").stat().st_size
    with zipfile.ZipFile(package / "openvino" / "graphs.zip") as archive:
        assert archive.getinfo("weights.bin").file_size == weights
        assert archive.getinfo("weights.bin").compress_size < 0.15 * weights


def test_the_same_graphs_give_the_same_bytes(package, plain, tmp_path):
    again = shutil.copytree(plain, tmp_path / "again")
    store(again / "openvino")
    assert (again / "openvino" / "graphs.zip").read_bytes() == (package / "openvino" / "graphs.zip").read_bytes()


@pytest.mark.parametrize("name", ["openvino/graphs.zip", "openvino/graph.json", "denoiser/weights.safetensors",
                                  "denoiser/packing.json", "recipe.json"])
def test_one_flipped_byte_is_named(package, nothing_compiles, name):
    data = bytearray((package / name).read_bytes())
    data[len(data) // 2] ^= 1
    (package / name).write_bytes(data)
    refused(package / "openvino", f"{name}: expected {len(data)} bytes with blake2b .*, found")


def test_tensors_of_another_network_are_refused(package, nothing_compiles, tmp_path):
    shutil.copyfile(write(tmp_path / "other", seed=1) / "denoiser" / "weights.safetensors",
                    package / "denoiser" / "weights.safetensors")
    seal(package)
    refused(package / "openvino", "graphs.zip: weights.bin: expected .* found")


def rewritten(package, change):
    path = package / "openvino" / "graphs.zip"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    seal(package)


@pytest.mark.parametrize("change, message", [
    (lambda e: e.pop("0.xml"), "0.xml"), (lambda e: e.pop("places.json"), "places.json"),
    (lambda e: e.update({"0.xml": bytes(10**8)}), "0.xml has 100000000 bytes, expected"),
    (lambda e: e.update({"places.json": bytes(2**26 + 1)}), "places.json has 67108865 bytes, expected at most 67108864"),
    (lambda e: e.update({"places.json": b"{"}), "property name"), (lambda e: e.update({"places.json": b"[1]"}), "TypeError"),
    (lambda e: e.update({"places.json": json.dumps([[0, "no tensor"]]).encode()}), "no tensor"),
    (lambda e: e.update({"places.json": json.dumps([[-1, "proj_out_1.bias"]]).encode()}), "proj_out_1.bias at -1 is"),
    (lambda e: e.update({"places.json": json.dumps([[10**9, "proj_out_1.bias"]]).encode()}), "1000000000 is not within"),
    (lambda e: e.update({"places.json": b"[]"}), "weights.bin: expected .* found"),
])
def test_an_archive_that_means_nothing_is_refused(package, nothing_compiles, change, message):
    rewritten(package, change)
    refused(package / "openvino", f"graphs.zip: .*{message}")


def test_what_is_no_archive_is_refused(package, nothing_compiles):
    (package / "openvino" / "graphs.zip").write_bytes(b"PK no archive")
    seal(package)
    refused(package / "openvino", "graphs.zip: BadZipFile")


def test_without_its_package_it_has_no_weights(package, nothing_compiles, tmp_path):
    shutil.move(package / "openvino", tmp_path / "alone")
    refused(tmp_path / "alone", "denoiser/weights.safetensors: FileNotFoundError")
