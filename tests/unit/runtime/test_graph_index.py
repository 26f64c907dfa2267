"""A folder of graphs is opened as it was exported, or not at all."""

import json
import os
import shutil

import pytest
import torch

from tasks.core import disk
from tasks.core.denoiser import build
from tasks.core.recipe import CachePlan, Recipe
from tasks.package.write import seal, write_package
from tasks.pretrain_load.architectures import SCHEDULE, dit
from tasks.runtime import checks, graph
from tasks.runtime.graph import export, open_graph
from tasks.runtime.packed import open_model, verify

PLAN = CachePlan(sublayers=("transformer_blocks.0.ff",), compute=((True,), (False,), (True,)))
RECIPE = Recipe(timesteps=(900, 500, 100), cache=PLAN, precision={"proj_out_2": "bf16"})
ROOM = ("openvino/0.xml", "openvino/1.xml", "openvino/conditioning.xml", "openvino/weights.bin")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    denoiser = build("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=2, heads=2, patch=2), SCHEDULE)
    folder = write_package(denoiser, RECIPE, {}, {}, tmp_path_factory.mktemp("packages") / "p")
    export(open_model(folder / "denoiser")[0], RECIPE, folder / "openvino")
    seal(folder)
    return folder


@pytest.fixture
def package(made, tmp_path):
    return shutil.copytree(made, tmp_path / "p")


@pytest.fixture
def nothing_compiles(monkeypatch):
    monkeypatch.setattr(graph, "compile_graphs", lambda *_: pytest.fail("compiled"))


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def refused(package, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_graph(package / "openvino", 2, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [0, 1000, -1])
@pytest.mark.parametrize("name", [*ROOM, "openvino/graph.json", "recipe.json", "scheduler/scheduler_config.json"])
def test_one_flipped_byte_is_named(package, nothing_compiles, name, place):
    size = (package / name).stat().st_size
    flip(package / name, min(place, size // 2))
    refused(package, f"{name}: expected {size} bytes with blake2b .*, found {size}")


@pytest.mark.parametrize("name", ROOM)
def test_a_folder_without_its_package_is_checked_too(package, nothing_compiles, name):
    """As a graph that is exported for a study is, into a folder of its own."""
    alone = shutil.copytree(package / "openvino", package.parent / "alone")
    flip(package.parent / "alone" / name.split("/")[1], 500)
    with pytest.raises(ValueError, match=f"alone/{name.split('/')[1]}: expected"):
        open_graph(alone, 2, 1)


def test_another_name_of_the_folder_changes_nothing(package, nothing_compiles):
    flip(package / "recipe.json")
    (package.parent / "link").symlink_to(package / "openvino")
    with pytest.raises(ValueError, match="recipe.json: expected"):
        open_graph(package.parent / "link", 2, 1)


def test_a_package_without_its_manifest_is_none(package, nothing_compiles):
    (package / "package.json").unlink()
    refused(package, "package.json: not found")


@pytest.mark.parametrize("change", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
                                    lambda p: p.write_bytes(b"")], ids=["gone", "cut", "empty"])
@pytest.mark.parametrize("name", [*ROOM, "openvino/graph.json", "recipe.json"])
def test_what_is_missing_or_cut_short_is_named(package, nothing_compiles, name, change):
    change(package / name)
    refused(package, f"{name}: (missing, )?expected")


def test_a_damaged_byte_is_found_although_the_file_was_whole_a_moment_ago(package, monkeypatch):
    monkeypatch.setattr(checks, "SETTLED_NS", 0)
    predict, x = open_graph(package / "openvino", 2, 1), torch.randn(2, 1, 8, 8)
    before = predict(x, torch.tensor([900, 900]), torch.tensor([0, 1]), 0)
    aside = package / "openvino" / "copy"
    shutil.copyfile(package / "openvino" / "weights.bin", aside)
    flip(aside)
    os.replace(aside, package / "openvino" / "weights.bin")  # in place would change the graph that is open
    refused(package, "weights.bin: expected")
    assert torch.equal(predict(x, torch.tensor([900, 900]), torch.tensor([0, 1]), 0), before)


INDEX = {
    "no forms": ({"forms": []}, "forms"), "a form of another shape": ({"forms": [{"skipped": []}]}, "forms"),
    "forms no list": ({"forms": 1}, "forms"), "a step of no graph": ({"steps": [0, 7, 0]}, "steps: .* is not a list of graphs"),
    "steps of another kind": ({"steps": [0, "1", 0]}, "steps"), "sums of other steps": ({"sums": {"a": [[]]}}, "sums"),
    "a sum of a later step": ({"sums": {"a": [[], [[2, 1.0]], []]}}, "sums"), "labelled maybe": ({"labelled": 1}, "labelled"),
    "another precision": ({"inference_precision": "f16"}, "inference_precision"),
    "no token": ({"precision": {"a": "fp8"}}, "fp8"), "files a list": ({"files": []}, "no `files`"),
    "a file outside": ({"files": {"../0.xml": {"bytes": 1, "blake2b": "0" * 32}}}, "../0.xml is not a file inside the folder"),
    "no files": ({"files": {}}, "files: names , expected 0.xml, 1.xml, conditioning.xml, weights.bin"),
}


@pytest.mark.parametrize("change, message", INDEX.values(), ids=INDEX)
def test_an_index_that_means_nothing_is_refused(package, nothing_compiles, change, message):
    path = package / "openvino" / "graph.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    seal(package)
    refused(package, f"graph.json: .*{message}")


@pytest.mark.parametrize("content, message", [("{", "not JSON at line 1"), ("[]", "holds list"), ("{}", "older version"),
                                              ('{"forms": 1, "forms": 2}', "stands there twice"), ('{"a": NaN}', "NaN")])
def test_an_index_that_is_no_json_is_refused(package, nothing_compiles, content, message):
    (package / "openvino" / "graph.json").write_text(content)
    seal(package)
    refused(package, f"graph.json: .*{message}")


@pytest.mark.parametrize("opened", [lambda p: open_graph(p / "openvino", 2, 1), verify], ids=["graph", "plain"])
@pytest.mark.parametrize("change, message", [
    (lambda m: m | {"format": 2}, "format 2, this code reads format 1"), (lambda m: {}, "format None"),
    (lambda m: m | {"files": []}, "no `files`"), (lambda m: m | {"files": {}}, "does not name"),
    (lambda m: [m], "holds list"),
    (lambda m: m | {"files": m["files"] | {"../x": m["files"]["recipe.json"]}}, "../x is not a file inside the folder"),
    (lambda m: m | {"files": m["files"] | {"/x": m["files"]["recipe.json"]}}, "/x is not a file inside the folder"),
    (lambda m: m | {"files": m["files"] | {"recipe.json": 1}}, "recipe.json has no bytes and blake2b"),
    (lambda m: m | {"files": {k: v for k, v in m["files"].items() if k != "recipe.json"}}, "does not name recipe.json"),
])
def test_a_manifest_that_means_nothing_is_refused(package, nothing_compiles, opened, change, message):
    path = package / "package.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"package.json: .*{message}"):
        opened(package)


@pytest.fixture(scope="module")
def networks():
    """Two of one architecture, with weights of their own."""
    made = [build("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=1, heads=2, patch=2), SCHEDULE) for _ in range(2)]
    for seed, one in enumerate(made):
        rng = torch.Generator().manual_seed(seed)
        for parameter in one.model.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=rng)
    return [one.model.eval() for one in made]


def test_a_graph_that_is_open_outlives_another_export_into_its_folder(networks, tmp_path):
    """A compiled graph goes on reading its file."""
    inputs = torch.ones(2, 1, 8, 8), torch.tensor([900, 500]), torch.tensor([0, 1])
    export(networks[0], Recipe(timesteps=(900, 500, 100), cache=PLAN), tmp_path)
    predict, weights = open_graph(tmp_path, 2, 1), (tmp_path / "weights.bin").read_bytes()
    before, read = predict(*inputs, 0), (tmp_path / "weights.bin").open("rb")
    export(networks[1], Recipe(timesteps=(900,)), tmp_path)
    assert read.read() == weights != (tmp_path / "weights.bin").read_bytes()
    assert torch.equal(predict(*inputs, 0), before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.xml", "conditioning.xml", "graph.json", "weights.bin"]
    assert not torch.equal(open_graph(tmp_path, 2, 1)(*inputs, 0), before)


def test_an_export_that_is_cut_short_is_noticed(networks, tmp_path, nothing_compiles, monkeypatch):
    """The index comes last: until then it names the files that were there before."""
    export(networks[0], Recipe(timesteps=(900,)), tmp_path)
    monkeypatch.setattr(disk, "write_whole", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        export(networks[1], Recipe(timesteps=(900,)), tmp_path)
    with pytest.raises(ValueError, match="weights.bin: expected .* found"):
        open_graph(tmp_path, 2, 1)


def test_a_package_copied_over_another_leaves_what_reads_it_alone(package, tmp_path):
    from tasks.runtime.pipeline import copy_aside
    old = (package / "openvino" / "weights.bin").open("rb")
    content = (package / "openvino" / "weights.bin").read_bytes()
    (tmp_path / "new").write_bytes(b"other")
    copy_aside(str(tmp_path / "new"), str(package / "openvino" / "weights.bin"))
    assert old.read() == content and (package / "openvino" / "weights.bin").read_bytes() == b"other"
    assert not list(package.rglob("*.partial"))
