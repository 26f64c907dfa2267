"""The OpenVINO form computes what the live torch model does, and integer layers really run as integers."""

import copy
import json
from collections import Counter

import pytest
import torch

from tasks.core.denoiser import Denoiser, in_channels_last
from tasks.core.recipe import CachePlan, Recipe
from tasks.runtime import compiling
from tasks.runtime.cache import TRUNK, apply_cache, remove_cache, sources
from tasks.runtime.graph import export, live_graph, open_graph
from tasks.runtime.graph_export import trace
from tasks.runtime.precision import apply_precision, calibrate_ranges, remove_precision

BATCH, TIMESTEPS = 3, (900, 600, 300, 100)  # graphs are traced with another batch than the one they run with
MATRIX_NODES = ("FullyConnected", "Convolution")
BF16 = "bf16" if "BF16" in compiling.cpu() else "f32"  # what bf16 layers run as on this CPU


@pytest.fixture(scope="module")
def ranges(tiny_denoiser, tiny_states):
    return calibrate_ranges(tiny_denoiser.model, [tiny_states(tiny_denoiser, 64, 7), tiny_states(tiny_denoiser, 64, 8)],
                            tiny_denoiser.joins())


def staggered(tiny_denoiser, forecast="none"):
    """Every sublayer is skipped at two of three later steps, the first ones at other steps than the last."""
    names = tuple(s.name for s in tiny_denoiser.sublayers())
    compute = tuple(tuple(step == 0 or (step + i) % 3 == 0 for i in range(len(names))) for step in range(len(TIMESTEPS)))
    columns = [sources(column, forecast) for column in zip(*compute, strict=True)]
    weights = tuple(tuple(tuple(1.3 - 0.4 * j for j in range(len(column[step]))) for column in columns)
                    for step in range(len(compute)))
    return CachePlan(sublayers=names, compute=compute, forecast=forecast, weights=weights if forecast == "learned" else None)


def relative_errors(tiny_denoiser, recipe, predict, tiny_states):
    """Of each step, over two trajectories with other inputs, against torch with the same cache live."""
    plan, errors = recipe.cache, []
    handle = plan and apply_cache(tiny_denoiser.model, plan.sublayers, plan.compute, plan.forecast, recipe.timesteps,
                                  plan.weights)
    for trajectory in range(2):
        for step in range(recipe.nfe):
            inputs = tiny_states(tiny_denoiser, BATCH, 10 * trajectory + step)
            if plan and plan.forecast != "none":  # which is made for the step's own timestep
                inputs = inputs[0], torch.full((BATCH,), recipe.timesteps[step]), inputs[2]
            if handle is not None:
                handle.step = step
            expected = tiny_denoiser(*inputs)
            errors.append(((predict(*inputs, step) - expected).norm() / expected.norm()).item())
    remove_cache(tiny_denoiser.model)
    return errors


def matrix_precisions(predict):
    """How many matrix nodes of the first graph run in which precision."""
    nodes = [node.get_rt_info() for node in predict.compiled[0].get_runtime_model().get_ordered_ops()]
    return Counter(n["runtimePrecision"].astype(str) for n in nodes if n["layerType"].astype(str) in MATRIX_NODES)


@pytest.mark.parametrize("forecast", ["none", "taylor", "learned"])
def test_fp32_with_a_cache_plan_is_the_live_model(tiny_denoiser, tiny_states, forecast):
    recipe = Recipe(timesteps=TIMESTEPS, cache=staggered(tiny_denoiser, forecast))
    predict = live_graph(tiny_denoiser, recipe, BATCH)
    assert len(predict.compiled) == len(recipe.cache.masks) == 4, "every step is needed by a later one, or is the last"
    assert max(relative_errors(tiny_denoiser, recipe, predict, tiny_states)) < 1e-5


@pytest.mark.parametrize("forecast", ["none", "taylor", "learned"])
def test_a_skipped_trunk_is_one_tensor(tiny_denoiser, tiny_states, forecast):
    """The graph of the steps that skip it is next to nothing."""
    weights = (((),), ((),), ((1.3, -0.4),), ((1.6, -0.7),)) if forecast == "learned" else None
    plan = CachePlan(sublayers=(TRUNK,), compute=((True,), (True,), (False,), (False,)), forecast=forecast, weights=weights)
    recipe = Recipe(timesteps=TIMESTEPS, cache=plan)
    predict = live_graph(tiny_denoiser, recipe, BATCH)
    assert max(relative_errors(tiny_denoiser, recipe, predict, tiny_states)) < 1e-5
    whole, skipped = (len(predict.compiled[predict.index["steps"][step]].get_runtime_model().get_ops()) for step in (1, 2))
    assert skipped < whole / 2 and predict.index["forms"][predict.index["steps"][1]]["kept"] == [TRUNK]


@pytest.mark.parametrize(("forecast", "kept"), [("none", [1]), ("taylor", [0, 1])])
def test_what_no_later_step_needs_is_not_put_out(tiny_denoiser, tiny_states, forecast, kept):
    """Steps 0, 1 and 3 are computed in full, 2 is skipped whole: two forms of one mask."""
    names = tuple(s.name for s in tiny_denoiser.sublayers())
    plan = CachePlan(sublayers=names, compute=tuple((step != 2,) * len(names) for step in range(4)), forecast=forecast)
    recipe = Recipe(timesteps=TIMESTEPS, cache=plan)
    predict = live_graph(tiny_denoiser, recipe, BATCH)
    forms = [predict.index["forms"][i] for i in predict.index["steps"]]
    assert [step for step, form in enumerate(forms) if form["kept"] == list(names)] == kept
    assert [bool(form["skipped"]) for form in forms] == [False, False, True, False] and len(predict.compiled) == 3
    assert max(relative_errors(tiny_denoiser, recipe, predict, tiny_states)) < 1e-5


def test_three_outputs_are_summed_and_tensors_are_used_in_turns(tiny_denoiser, tiny_states):
    names = tuple(s.name for s in tiny_denoiser.sublayers())
    compute = tuple((step in (0, 1, 2, 4, 6),) * len(names) for step in range(8))
    columns = sources([row[0] for row in compute], "learned")
    weights = tuple(tuple(tuple(1.2 - 0.5 * j + 0.01 * step for j in range(len(found))) for _ in names)
                    for step, found in enumerate(columns))
    recipe = Recipe(timesteps=tuple(range(900, 100, -100)),
                    cache=CachePlan(sublayers=names, compute=compute, forecast="learned", weights=weights))
    assert [len(found) for found in columns] == [0, 0, 0, 3, 0, 3, 0, 3]
    assert max(relative_errors(tiny_denoiser, recipe, live_graph(tiny_denoiser, recipe, BATCH), tiny_states)) < 1e-5


def test_a_trajectory_that_ends_early_leaves_nothing_behind(tiny_denoiser, tiny_states):
    recipe = Recipe(timesteps=TIMESTEPS, cache=staggered(tiny_denoiser, "learned"))
    predict = live_graph(tiny_denoiser, recipe, BATCH)
    for step in range(2):
        predict(*tiny_states(tiny_denoiser, BATCH, 77), step)
    assert max(relative_errors(tiny_denoiser, recipe, predict, tiny_states)) < 1e-5


@pytest.mark.parametrize("cached", [False, True])
def test_int8_runs_as_integers_and_is_the_fake_quantised_model(tiny_denoiser, ranges, cached, tiny_states):
    """Values on the border of two integers fall either way: then one step of one layer's grid separates the two."""
    plan = dict.fromkeys(ranges, "w8a8")
    recipe = Recipe(timesteps=TIMESTEPS, precision=plan, cache=staggered(tiny_denoiser) if cached else None)
    apply_precision(tiny_denoiser.model, plan, ranges)
    predict = live_graph(tiny_denoiser, recipe, BATCH)
    errors = relative_errors(tiny_denoiser, recipe, predict, tiny_states)
    remove_precision(tiny_denoiser.model)
    if not compiling.saturates():
        assert set(matrix_precisions(predict)) <= {"u8", "i8"}
    aside = {layer for layers in tiny_denoiser.conditioning().values() for layer in layers}  # in the rows
    assert sum(matrix_precisions(predict).values()) >= len(ranges) - len(aside)
    assert max(errors) < 0.03 and sorted(errors)[len(errors) // 2] < 0.015


def test_every_other_width_keeps_its_grid(tiny_denoiser, ranges, tiny_states):
    """OpenVINO takes a FakeQuantize of 64 levels for one of 256: 6-bit inputs are a test of the way around."""
    plan = dict.fromkeys(ranges, "w4a6")
    recipe = Recipe(timesteps=TIMESTEPS, precision=plan)
    apply_precision(tiny_denoiser.model, plan, ranges)
    errors = relative_errors(tiny_denoiser, recipe, live_graph(tiny_denoiser, recipe, BATCH), tiny_states)
    remove_precision(tiny_denoiser.model)
    assert min(errors) < 1e-4 and max(errors) < 0.1


def test_precisions_mix_in_one_graph(tiny_denoiser, ranges, tiny_states):
    tokens = ("w8a8", "bf16", "fp32")
    plan = {layer: tokens[i % 3] for i, layer in enumerate(ranges)}
    recipe = Recipe(timesteps=TIMESTEPS, precision=plan)
    apply_precision(tiny_denoiser.model, plan, ranges)
    predict = live_graph(tiny_denoiser, recipe, BATCH)
    errors = relative_errors(tiny_denoiser, recipe, predict, tiny_states)
    remove_precision(tiny_denoiser.model)
    assert {"f32", BF16} <= set(matrix_precisions(predict)) <= {"f32", BF16, "u8", "i8"}
    assert predict.index["inference_precision"] == "f32" and max(errors) < 0.03


def test_bf16_throughout_lets_everything_run_in_bf16(tiny_denoiser, ranges, tiny_states):
    plan = dict.fromkeys(ranges, "bf16")
    recipe = Recipe(timesteps=TIMESTEPS, precision=plan)
    apply_precision(tiny_denoiser.model, plan, {})
    predict = live_graph(tiny_denoiser, recipe, BATCH)
    errors = relative_errors(tiny_denoiser, recipe, predict, tiny_states)
    remove_precision(tiny_denoiser.model)
    assert set(matrix_precisions(predict)) == {BF16} and max(errors) < 0.1  # torch keeps norms and sums in fp32


def test_graphs_share_their_weights(tiny_denoiser, tmp_path):
    plain, cached = Recipe(timesteps=TIMESTEPS), Recipe(timesteps=TIMESTEPS, cache=staggered(tiny_denoiser))
    export(tiny_denoiser.model, plain, tmp_path / "plain")
    export(tiny_denoiser.model, cached, tmp_path / "cached")
    sizes = {name: (tmp_path / name / "weights.bin").stat().st_size for name in ("plain", "cached")}
    weights = sum(p.numel() * 4 for p in tiny_denoiser.model.parameters())
    assert weights * 0.9 < sizes["plain"] and sizes["cached"] < sizes["plain"] * 1.1
    assert {p.name for p in (tmp_path / "cached").iterdir()} == {*(f"{i}.xml" for i in range(4)), "conditioning.xml",
                                                              "graph.json", "weights.bin"}
    assert json.loads((tmp_path / "cached" / "graph.json").read_text())["steps"] == [0, 1, 2, 3]


def test_wrong_uses_are_named(tiny_denoiser, ranges, tmp_path, tiny_states):
    recipe = Recipe(timesteps=TIMESTEPS, cache=staggered(tiny_denoiser))
    layer = next(iter(ranges))
    with pytest.raises(ValueError, match=f"{layer} is fp32 on the model and w8a8 in the recipe"):
        export(tiny_denoiser.model, Recipe(timesteps=TIMESTEPS, precision={layer: "w8a8"}), tmp_path)
    apply_cache(tiny_denoiser.model, recipe.cache.sublayers, recipe.cache.compute)
    with pytest.raises(ValueError, match="a cache is live"):
        export(tiny_denoiser.model, recipe, tmp_path)
    remove_cache(tiny_denoiser.model)
    export(tiny_denoiser.model, recipe, tmp_path)
    predict = open_graph(tmp_path, BATCH, 1)
    with pytest.raises(ValueError, match="opened for a batch of 3, got 5"):
        predict(*tiny_states(tiny_denoiser, 5, 0), 0)
    with pytest.raises(ValueError, match="step 1 reuses the output of step 0, but none is kept"):
        predict(*tiny_states(tiny_denoiser, 3, 0), 1)
    with pytest.raises(ValueError, match="step 4 is not between 0 and 3"):
        predict(*tiny_states(tiny_denoiser, 3, 0), 4)


PERMUTED = {
    "channels last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda w: torch.stack([w, torch.full_like(w, 77)], -1)[..., 0],
    "a view of a larger one": lambda w: torch.cat([torch.full_like(w, 77), w])[len(w):],
    "expanded": lambda w: w[:1].expand(w.shape),
    "a single value": lambda w: w.flatten()[3],
}


class Toy(torch.nn.Module):
    """A network of one tensor, of any type and anywhere."""

    def __init__(self, w: torch.Tensor, place: str):
        super().__init__()
        if place == "parameter":
            self.w = torch.nn.Parameter(w, requires_grad=False)
        elif place == "buffer":
            self.register_buffer("w", w, persistent=False)
        else:
            self.w = w

    def forward(self, x):
        weight = self.w.float().broadcast_to(8, 8, 3, 3)
        return torch.nn.functional.conv2d(x, weight, padding=1) * self.w.float().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("how", PERMUTED)
def test_a_constant_is_read_as_it_is_wherever_it_lies_in_memory(how, dtype):
    """bf16 tensors that were not contiguous came out as whatever memory held by then, NaN for every sample."""
    rng = torch.Generator().manual_seed(0)
    whole = (10 * torch.randn(8, 8, 3, 3, generator=rng)).to(dtype)
    x = torch.randn(2, 8, 4, 4, generator=rng)
    for place in ("parameter", "buffer", "attribute"):
        if place == "parameter" and not dtype.is_floating_point:
            continue
        toy = Toy(PERMUTED[how](whole), place)
        expected = toy(x)
        network = compiling.openvino_core().compile_model(trace(toy, (x,)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = torch.from_numpy(network([x.numpy()])[0])
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_bf16_model_in_channels_last_gives_its_eager_predictions(ranges, tiny_denoiser, tiny_states):
    """As `load` leaves every teacher."""
    live = Denoiser(in_channels_last(copy.deepcopy(tiny_denoiser.model)), tiny_denoiser.schedule)
    recipe = Recipe(timesteps=TIMESTEPS, precision=dict.fromkeys(ranges, "bf16"))
    apply_precision(live.model, recipe.precision, {})
    assert max(relative_errors(live, recipe, live_graph(live, recipe, BATCH), tiny_states)) < 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_tells_close_and_fractional_times_apart(tiny_denoiser, tiny_states, precision):
    """In a graph of bf16 numbers 992 to 995 would be one timestep, and as an integer 992.5 would be 992."""
    layers = dict.fromkeys(tiny_denoiser.prunable_layers(), precision) if precision != "fp32" else {}
    apply_precision(tiny_denoiser.model, layers, {})
    predict = live_graph(tiny_denoiser, Recipe(timesteps=(995, 992), precision=layers), BATCH)
    x, _, labels = tiny_states(tiny_denoiser, BATCH, 0)
    times = (992.0, 992.5, 993.0, 995.0)
    found = [predict(x, torch.full((BATCH,), t), labels, 0) for t in times]
    wanted = [tiny_denoiser(x, torch.full((BATCH,), t), labels) for t in times]
    for one, of_torch in zip(found, wanted, strict=True):
        assert (one - of_torch).norm() < (1e-5 if precision == "fp32" else 0.05) * of_torch.norm()
    assert len({tuple(one.flatten().tolist()) for one in found}) == len(times)
    mixed = predict(x, torch.tensor([992.0, 995.0, 993.0]), labels, 0)
    for i, one in enumerate((found[0], found[3], found[2])):
        assert torch.allclose(mixed[i], one[i], atol=1e-6)
    remove_precision(tiny_denoiser.model)
