"""What pruning saves on each target, and the choice between grains, on costs worked out by hand."""

import pytest

from tasks.core.cost import LayerCost
from tasks.mask_search.choose import CostModel, choose, cost_models, latency_model, macs_model, storage_model

COSTS = [LayerCost("a", "linear", 600, 60, None), LayerCost("b", "linear", 300, 30, None),
         LayerCost("b.qk", "attention_product", 100, 0, None)]
LAYERS = """layer,kind,backend,precision,grain,density,batch,time_us
a,linear,openvino,fp32,dense,1.0,8,60
a,linear,openvino,fp32,unit,0.5,8,33
a,linear,openvino,fp32,2:4,0.5,8,54
a,linear,openvino,bf16,dense,1.0,8,20
b,linear,openvino,fp32,dense,1.0,8,30
b,linear,openvino,fp32,2:4,0.5,8,36
b,linear,eager,fp32,dense,1.0,8,90
"""
MODEL = "backend,precision,batch,time_us\nopenvino,fp32,8,120\nopenvino,bf16,8,50\n"


@pytest.fixture
def profile(tmp_path):
    (tmp_path / "layers.csv").write_text(LAYERS)
    (tmp_path / "model.csv").write_text(MODEL)
    return tmp_path


def test_macs_by_hand():
    model = macs_model(COSTS)
    assert model.whole == 1000 and model.dense(["a", "b.qk"]) == 700
    assert model.saved(["b", "b.qk"], "unit", 0.25) == 300  # heads take their share of the products along
    assert model.share({"a": 0.5, "a_norm": 0.5}, "2:4") == 0.7  # a norm is not counted


def test_bits_by_hand():
    model = storage_model(COSTS)
    assert model.whole == 720 and model.saved(["a", "b"], "2:4", 1.0) == 0
    assert model.share({"a": 0.5}, "unit") == pytest.approx(60 / 90)
    for grain in ("2:4", "vector"):  # 1 bit of mask for each 8-bit weight
        assert model.share({"a": 0.5}, grain) == pytest.approx((60 * 0.625 + 30) / 90)


def test_latency_is_the_profiles_for_each_grain(profile):
    model = latency_model(profile, "openvino", 8)
    assert model.whole == 120 and model.dense(["a", "b"]) == 90
    assert model.share({"a": 0.5}, "unit") == pytest.approx(1 - (60 - 33) / 120)
    assert model.share({"a": 0.75}, "unit") == pytest.approx(1 - (60 - 33) / 2 / 120)
    assert model.share({"a": 0.5, "b": 0.5}, "2:4") == pytest.approx(1 - (60 - 54 + 30 - 36) / 120)
    assert model.saved(["a"], "1:4", 0.25) == model.saved(["b"], "unit", 0.5) == model.saved(["b.qk"], "unit", 0.5) == 0


def test_a_batch_that_was_not_timed_is_named(profile):
    with pytest.raises(ValueError, match="nothing for backend openvino at batch 1"):
        cost_models(COSTS, profile, "openvino", 1)


def test_the_least_cost_on_the_target_is_chosen():
    predicted = {"unit": {"latency": 0.8, "size": 0.9}, "2:4": {"latency": 1.0, "size": 0.7}}
    assert choose(predicted, "latency", 0.02) == ("unit", "latency against dense: unit 0.800, 2:4 1.000")
    assert choose(predicted, "size", 0.02)[0] == "2:4"


def test_none_pays_below_the_least_gain():
    assert choose({"unit": {"latency": 0.99}, "2:4": {"latency": 1.02}}, "latency", 0.02) == (
        "none", "latency against dense: unit 0.990, 2:4 1.020; none gains 2%")


def test_costs_do_not_depend_on_the_order_of_layers():
    """Sets of names are ordered by hashes, which differ from process to process; one bit of a sum makes later stages stale."""
    prices = dict(zip("abcdefgh", (0.1, 1e-9, 3.3, 1e7, 0.7, 2.2e-5, 17.1, 5e3), strict=True))
    model = CostModel("us", sum(prices.values()), lambda layer, grain, density: prices[layer] * density)
    orders = [[*prices], [*reversed(prices)], sorted(prices, key=prices.get)]
    assert len({model.dense(order) for order in orders}) == 1
    assert len({model.saved(order, "unit", 0.3) for order in orders}) == 1
    assert len({model.share(dict.fromkeys(order, 0.3), "unit") for order in orders}) == 1
