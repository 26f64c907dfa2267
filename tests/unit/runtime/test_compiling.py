"""What the compiler gets wrong is switched off where a graph would meet it, and a compiler that dies is one line.

No graph that ends the compiler is in here: the child that dies is a stand-in that ends itself.
"""

import sys

import pytest
import torch

from tasks.core.denoiser import build
from tasks.core.recipe import Recipe
from tasks.pretrain_load.architectures import SCHEDULE, unet
from tasks.runtime import compiling
from tasks.runtime.compiling import Plan, is_fatal, known, planned, rehearse
from tasks.runtime.graph import export, live_graph, open_graph
from tasks.runtime.precision import apply_precision, calibrate_ranges

TIMES = torch.tensor([900, 500, 10])
SCALE_SHIFT = {"resnet_time_scale_shift": "scale_shift"}
K_BLOCKS = {"down_block_types": ["KDownBlock2D"], "up_block_types": ["KUpBlock2D"], "block_out_channels": [32]}


def tiny_unet(change):
    torch.manual_seed(0)
    small = {"block_out_channels": [8], "layers_per_block": 1, "down_block_types": ["DownBlock2D"],
             "up_block_types": ["UpBlock2D"], "add_attention": False}
    made = build("UNet2DModel", {**unet(8, 1, width=8), **small, **change}, SCHEDULE)
    made.model.eval().requires_grad_(False)
    for parameter in made.model.parameters():  # the shifts and scales start at 0 and 1
        parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape)
    return made


def readers(**sources):
    """node -> kind, and what it reads: "a=(Kind, b, c)"."""
    kinds = {node: kind for node, (kind, *_) in sources.items()}
    reads = {node: list(read) for node, (_, *read) in sources.items()}
    return kinds, reads, {node: [other for other in reads for _ in range(reads[other].count(node))] for node in reads}


@pytest.mark.parametrize("second, fatal", [
    (("Multiply", "n", "s"), True), (("Multiply", "s", "n"), True), (("Add", "n", "s"), True),
    (("Multiply", "n", "c"), False),
    (("Multiply", "n", "x"), False), (("Swish", "n"), False), (("Convolution", "n", "c"), False),
    (("Multiply", "n", "n"), True), (("Multiply", "x", "s"), False)])
def test_a_normalised_tensor_that_meets_another_one(second, fatal):
    found = readers(x=("Parameter",), c=("Const",), s=("Add", "x", "c"), n=("GroupNormalization", "x", "c", "c"), m=second)
    assert is_fatal(*found) == fatal


def test_a_change_of_type_between_hides_nothing():
    between = {"t": ("Convert", "n"), "m": ("Multiply", "t", "s")}
    assert is_fatal(*readers(x=("Parameter",), s=("Relu", "x"), n=("GroupNormalization", "x"), **between))


@pytest.mark.parametrize(("change", "token"), [(SCALE_SHIFT, "fp32"), (SCALE_SHIFT, "bf16"), (SCALE_SHIFT, "w8a8"),
                                               (K_BLOCKS, "fp32")])
def test_a_unet_that_scales_what_it_normalised_is_its_eager_self(change, token, tmp_path):
    """At int8 values on the border of two integers may fall either way."""
    made = tiny_unet(change)
    x = torch.randn(3, *made.sample_shape)
    ranges = calibrate_ranges(made.model, [(x, TIMES, None)], made.joins())
    plan = {} if token == "fp32" else dict.fromkeys(ranges, token)
    apply_precision(made.model, plan, ranges)
    expected = made(x, TIMES)
    export(made.model, Recipe(timesteps=(500,), precision=plan), tmp_path)
    assert planned(tmp_path / "0.xml", 3, 8, {}).properties["SNIPPETS_MODE"] == "DISABLE"
    found = open_graph(tmp_path, 3, 1)(x, TIMES, None, 0)
    assert ((found - expected).norm() / expected.norm()).item() < {"fp32": 1e-5, "bf16": 0.03, "w8a8": 0.03}[token]


def test_an_ordinary_unet_keeps_its_snippets(tmp_path):
    export(tiny_unet({}).model, Recipe(timesteps=(500,)), tmp_path)
    assert not planned(tmp_path / "0.xml", 3, 8, {}).properties


@pytest.mark.parametrize("saturates, bits, expected", [(True, 8, "NO"), (True, 7, None), (False, 8, None)])
def test_integer_products_that_saturate_are_switched_off(tmp_path, monkeypatch, saturates, bits, expected):
    """Two products of 255 and 63, the largest of 7 bits, stay below 2^15; of 255 and 127 they do not."""
    assert 2 * 255 * 63 < 2**15 < 2 * 255 * 127
    monkeypatch.setattr(compiling, "saturates", lambda: saturates)
    path = tmp_path / "0.xml"
    path.write_text('<net><layers><layer id="0" type="FakeQuantize"/></layers><edges/></net>')
    assert planned(path, 3, bits, {}).properties.get("LP_TRANSFORMS_MODE") == expected


def test_layers_of_eight_bits_are_exact_on_every_cpu():
    """The largest weights and inputs: where products saturate, half of this is lost."""
    made = tiny_unet({})
    layer = made.model.time_embedding.linear_2
    layer.weight.data.fill_(1.0)
    apply_precision(made.model, {"time_embedding.linear_2": "w8a8"}, {"time_embedding.linear_2": (0.0, 1e-3)})
    x = torch.randn(3, *made.sample_shape)
    expected = made(x, TIMES)
    found = live_graph(made, Recipe(timesteps=(500,), precision={"time_embedding.linear_2": "w8a8"}), 3)(x, TIMES, None, 0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A graph of which nothing was compiled before, and a memory of its own."""
    monkeypatch.setattr(compiling, "_known", {})
    monkeypatch.setattr(compiling, "memory", lambda setting: tmp_path / "memory" / setting)
    (tmp_path / "0.xml").write_text("")
    return Plan(tmp_path / "0.xml", 2, {"INFERENCE_NUM_THREADS": 1}, frozenset({"Parameter>Relu>Result"}))


def child(monkeypatch, code):
    monkeypatch.setattr(compiling, "command", lambda: [sys.executable, "-S", "-c", code])


def test_a_compiler_that_is_killed_is_one_line_with_the_graph(plan, monkeypatch):
    code = "import os, signal, sys; print('begun', flush=True); sys.stdin.read(); os.kill(os.getpid(), signal.SIGKILL)"
    child(monkeypatch, code)
    for _ in range(2):  # it is not remembered as compiled
        with pytest.raises(ValueError, match=r"0.xml: OpenVINO 20\S+ was ended by SIGKILL while it compiled") as caught:
            rehearse([plan])
        assert "\n" not in str(caught.value)


def test_the_graph_that_was_begun_last_is_named(plan, monkeypatch, tmp_path):
    second = Plan(tmp_path / "1.xml", 2, {}, frozenset({"other"}))
    child(monkeypatch, "import sys; sys.stdin.read(); print('0'); print('1', flush=True); sys.exit(117)")
    with pytest.raises(ValueError, match=r"1.xml: OpenVINO \S+ was ended by exit status 117"):
        rehearse([plan, second])


def test_a_compiler_that_does_not_end_is_ended(plan, monkeypatch):
    monkeypatch.setattr(compiling, "LIMIT_S", 0.5)
    child(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(ValueError, match=r"0.xml: OpenVINO \S+ did not end within"):
        rehearse([plan])


def test_what_was_compiled_once_needs_no_child_again(plan, monkeypatch):
    child(monkeypatch, "import sys; sys.stdin.read()")
    rehearse([plan])
    child(monkeypatch, "import sys; sys.exit(2)")
    rehearse([plan])
    compiling._known.clear()  # as another process
    rehearse([plan, Plan(plan.path, 4, {"INFERENCE_NUM_THREADS": 2, "PERF_COUNT": True}, plan.company)])
    with pytest.raises(ValueError, match="exit status 2"):  # other properties
        rehearse([Plan(plan.path, 2, {"SNIPPETS_MODE": "DISABLE"}, plan.company)])
    with pytest.raises(ValueError, match="exit status 2"):  # an operation in another company
        rehearse([Plan(plan.path, 2, plan.properties, plan.company | {"Parameter>Relu>Add"})])


def test_a_child_that_raises_leaves_the_error_to_us(plan, monkeypatch):
    child(monkeypatch, "import sys; sys.stdin.read(); raise RuntimeError")
    rehearse([plan])
    assert not known(plan.setting)
    with pytest.raises(ValueError, match=r"0.xml: OpenVINO \S+ cannot compile it: "):
        compiling.compiled(plan)


def test_a_memory_that_cannot_be_written_is_none(plan, monkeypatch, tmp_path):
    (tmp_path / "memory").write_text("in the way")
    child(monkeypatch, "import sys; sys.stdin.read()")
    rehearse([plan])
    assert plan.company <= known(plan.setting)


def test_the_real_child_compiles_and_runs_a_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "_known", {})
    monkeypatch.setattr(compiling, "memory", lambda setting: tmp_path / "memory" / setting)
    export(tiny_unet({}).model, Recipe(timesteps=(500,)), tmp_path / "graph")
    found = planned(tmp_path / "graph" / "0.xml", 2, 0, {"INFERENCE_NUM_THREADS": 1})
    monkeypatch.chdir(tmp_path)
    rehearse([found])
    assert found.company <= known(found.setting) and len(list((tmp_path / "memory").rglob("*.txt"))) == 1
