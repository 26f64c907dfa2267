"""The stage on a tiny random DiT: layers that learn while they are rounded, and a handing on that is never worse."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tasks.core.artifacts import Inputs
from tasks.core.denoiser import load
from tasks.core.pairs import Pairs
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.unroll import is_number
from tasks.finish import stage
from tasks.finish.rounded import Rounded, RoundedProduct, install, learned_ranges
from tasks.runtime.precision import apply_precision
from tests.unit.solver_learn.test_solver_learn_stage import LOSS, write_inputs

PARAMS = stage.Params(steps=6, batch=4, lr=1e-3, solver_lr=0.02, warmup=1, ema_decay=0.5, judge_every=2, held=4,
                      recompute=True, calibration_states=128, loss=LOSS, seed=3)
TOKENS = ["bf16", "w8a8", "w7a8", "w4a4"]


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("kind", ["linear", "conv", "joined"])
def test_it_computes_as_the_layer_that_ships(kind, token):
    torch.manual_seed(0)
    base = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 5, 3, 2, 1)
    x = torch.randn(4, 6) if kind == "linear" else torch.randn(4, 6, 8, 8)
    ranges = [-2.0, 2.5] if kind != "joined" else {"channels": [4, 2], "parts": [[-2.0, 2.5], [-1.0, 1.0]]}
    model = nn.ModuleDict({"layer": base})
    found = Rounded(base, token, ranges)(x)
    apply_precision(model, {"layer": token}, {"layer": ranges})
    wanted = model["layer"](x)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(found, base(x), atol=1e-6)


def test_gradients_pass_straight_through_inside_the_range_and_not_outside():
    base = nn.Linear(2, 1, bias=False)
    base.weight.data = torch.tensor([[0.5, 1.0]])
    x = torch.tensor([[0.25, 9.0]], requires_grad=True)
    Rounded(base, "w8a8", [-1.0, 1.0])(x).sum().backward()
    assert x.grad[0, 0].item() == pytest.approx(0.5, abs=0.01) and x.grad[0, 1].item() == 0
    assert base.weight.grad[0].tolist() == pytest.approx([0.25, 1.0], abs=0.01)


def test_a_scale_has_the_gradient_of_lsq():
    """Against torch's own learnable fake quantisation, whose zero point does not move, either."""
    x = (3 * torch.randn(200, generator=torch.Generator().manual_seed(1))).requires_grad_()
    scale, again = torch.tensor(0.02, requires_grad=True), torch.tensor([0.02], requires_grad=True)
    found = RoundedProduct.apply(x[:, None], scale, torch.ones(1, 1), None, 90, 255, None)[:, 0]
    weights = torch.linspace(-1, 1, 200)
    (found * weights).sum().backward()
    of_x, x.grad = x.grad, None
    wanted = torch._fake_quantize_learnable_per_tensor_affine(x, again, torch.tensor([90.0]), 0, 255, 1.0)
    (wanted * weights).sum().backward()
    assert torch.equal(found, wanted) and torch.equal(of_x, x.grad) and 0 < (of_x == 0).sum() < 200
    assert scale.grad.item() == pytest.approx(again.grad.item(), rel=1e-4)


@pytest.mark.parametrize("layer, x", [(nn.Linear(6, 5), torch.randn(2, 3, 6)), (nn.Linear(6, 5, bias=False), torch.randn(3, 6)),
                                      (nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), torch.randn(2, 6, 8, 8))])
def test_gradients_of_a_rounded_product_are_those_of_rounding_and_then_multiplying(layer, x):
    x.requires_grad_()
    rounded = Rounded(layer, "w8a8", [-1.0, 1.5])
    rounded(x).square().sum().backward()
    found = [x.grad, layer.weight.grad, *([] if layer.bias is None else [layer.bias.grad])]
    x.grad = layer.weight.grad = None
    (scale, zero), = (span for _, span in rounded.spans)
    coarse = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
    product = torch.func.functional_call(layer, {"weight": rounded.rounded_weight()}, (coarse,))
    wanted = torch.autograd.grad(product.square().sum(), [x, *layer.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("ranges", [[-2.0, 2.5], {"channels": [4, 2], "parts": [[-2.0, 2.5], [0.0, 1.0]]}])
def test_learned_scales_ship_as_ranges(ranges):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(6, 5, 3)), torch.randn(4, 6, 8, 8)
    install(model, {"0": "w8a4"}, {"0": ranges})
    model[0].numbers.data.add_(torch.tensor([0.3, -0.2])[: len(model[0].numbers)])
    found, plain = model(x), nn.Sequential(nn.Conv2d(6, 5, 3))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not is_number(name)})
    apply_precision(plain, {"0": "w8a4"}, learned_ranges(model))
    assert torch.allclose(plain(x), found, atol=1e-5)
    apply_precision(plain, {"0": "w8a4"}, {"0": ranges})
    assert not torch.allclose(plain(x), found, atol=1e-2)


def test_install_keeps_the_names_of_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    names = list(model.state_dict())
    install(model, {"0": "w8a8", "1": "fp32"}, {"0": [-1.0, 1.0]})
    assert [name for name in model.state_dict() if not is_number(name)] == names
    assert isinstance(model[0], Rounded) and isinstance(model[1], nn.Linear)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "inputs"
    root.mkdir()
    folders = write_inputs(root) | {"solver_learn": root, "distill": root, "evolve": root}
    Pairs(np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8), 7, 3).write(root)
    layers = load(root / "teacher").prunable_layers()
    recipe = Recipe(timesteps=(99, 60, 20), solver="dpm2m", precision={name: "w8a8" for name in layers if ".ff." in name})
    (root / "recipe.json").write_text(json.dumps(recipe.to_json()))
    (root / "weights.json").write_text(json.dumps({"name": "teacher", "file": None, "masks": None, "grain": None}))
    return Inputs(folders, "k" * 16)


def handed_on(out) -> tuple[Recipe, dict]:
    return Recipe.from_json(json.loads((out / "recipe.json").read_text())), json.loads((out / "weights.json").read_text())


def test_what_is_better_is_handed_on(inputs, tmp_path):
    report = stage.run(replace(PARAMS, steps=30), inputs, tmp_path).numbers
    recipe, weights = handed_on(tmp_path)
    assert report["loss_trained"] < report["loss_before"] and not report["kept_start"] and weights["finished"]
    assert recipe.solver == "learned" and recipe.nfe == 3 and set(recipe.precision.values()) == {"w8a8"}
    before = load(inputs["pretrain_load"] / "teacher").model.state_dict()
    after = load_file(tmp_path / "finished.safetensors")
    assert after.keys() == before.keys() and any(not torch.equal(after[name], before[name]) for name in after)
    ranges = json.loads((tmp_path / "ranges.json").read_text())
    assert ranges.keys() == recipe.precision.keys() and all(low <= 0 <= high for low, high in ranges.values())


def test_a_learned_forecast_is_trained_and_handed_on(inputs, tmp_path):
    folder, name = inputs["evolve"], "transformer_blocks.0.attn1"
    given = (((),), ((0.9,),), ((),))
    plan = CachePlan(sublayers=(name,), compute=((True,), (False,), (True,)), forecast="learned", weights=given)
    (folder / "recipe.json").write_text(json.dumps(replace(handed_on(folder)[0], cache=plan).to_json()))
    assert not stage.run(replace(PARAMS, steps=30), inputs, tmp_path).numbers["kept_start"]
    found = handed_on(tmp_path)[0].cache
    assert found.compute == plan.compute and 0.5 < found.weights[1][0][0] < 1.5 and found.weights[1][0][0] != 0.9


def test_what_is_worse_is_not(inputs, tmp_path, capsys):
    report = stage.run(replace(PARAMS, steps=2, lr=1.0, solver_lr=1.0, ema_decay=0.0), inputs, tmp_path).numbers
    recipe, weights = handed_on(tmp_path)
    assert report["kept_start"] and not weights["finished"] and recipe.solver == "dpm2m"
    assert not (tmp_path / "finished.safetensors").exists() and "handed on as it is" in capsys.readouterr().out


def test_rounding_that_the_search_learned_counts_for_what_came(inputs, tmp_path):
    """Integers of other weights make it worse: were they not read, both losses would be alike."""
    plain = stage.run(replace(PARAMS, steps=0), inputs, tmp_path).numbers
    recipe, model = handed_on(tmp_path)[0], load(inputs["pretrain_load"] / "teacher").model
    folder = inputs["evolve"] / "rounding"
    folder.mkdir()
    integers = {f"{name} 8": torch.zeros_like(model.get_submodule(name).weight, dtype=torch.int8) for name in recipe.precision}
    save_file(integers, folder / "teacher.safetensors")
    learned = stage.run(replace(PARAMS, steps=0), inputs, tmp_path).numbers
    assert learned["loss_before"] != plain["loss_before"] and learned["loss_trained"] == plain["loss_trained"]


def test_a_loss_that_is_no_number_is_not_handed_on(inputs, tmp_path, monkeypatch):
    losses = iter((1.0, float("nan")))
    monkeypatch.setattr(stage, "shipped_loss", lambda *_: next(losses))
    report = stage.run(replace(PARAMS, steps=30), inputs, tmp_path).numbers
    assert report["kept_start"] and not handed_on(tmp_path)[1]["finished"]


def test_masks_of_a_student_stay(inputs, tmp_path):
    root, name = inputs["distill"], "transformer_blocks.0.ff.net.2.weight"
    weights = load(root / "teacher").model.state_dict()
    mask = torch.rand(weights[name].shape) > 0.5
    save_file({key: value.contiguous() for key, value in weights.items()}, root / "student_few_3.safetensors")
    save_file({name: mask.to(torch.uint8)}, root / "masks_2_4.safetensors")
    (root / "weights.json").write_text(json.dumps({"name": "few_3", "file": "student_few_3.safetensors", "grain": "2:4",
                                                   "masks": "masks_2_4.safetensors"}))
    assert not stage.run(replace(PARAMS, steps=30), inputs, tmp_path).numbers["kept_start"]
    after = load_file(tmp_path / "finished.safetensors")[name]
    assert (after[~mask] == 0).all() and (after[mask] != 0).any()
