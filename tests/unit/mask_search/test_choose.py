"""The choice between grains, on costs worked out by hand."""

import pytest

from tasks.core.cost import LayerCost
from tasks.core.latency import load_layers
from tasks.mask_search.choose import choose, latency_share, macs_share, size_share

COSTS = [LayerCost("a", "linear", 600, 60, None), LayerCost("b", "linear", 300, 30, None),
         LayerCost("b.qk", "attention_product", 100, 0, None)]
LAYERS = """layer,kind,backend,precision,grain,density,batch,time_us
a,linear,openvino,fp32,dense,1.0,8,60
a,linear,openvino,fp32,unit,0.5,8,33
a,linear,openvino,fp32,2:4,0.5,8,54
a,linear,openvino,bf16,dense,1.0,8,20
b,linear,openvino,fp32,dense,1.0,8,30
b,linear,eager,fp32,dense,1.0,8,90
"""
MODEL = "backend,precision,batch,time_us\nopenvino,fp32,8,120\nopenvino,bf16,8,50\n"


def test_shares_by_hand():
    assert macs_share(COSTS, {"a": 0.5}) == 0.7
    assert size_share(COSTS, {"a": 0.5}, "unit") == pytest.approx(60 / 90)
    assert size_share(COSTS, {"a": 0.5}, "2:4") == pytest.approx((60 * 0.625 + 30) / 90)  # 1 bit of mask per 8-bit weight


def test_latency_is_the_profiles_for_each_grain(tmp_path):
    (tmp_path / "layers.csv").write_text(LAYERS)
    (tmp_path / "model.csv").write_text(MODEL)
    table = load_layers(tmp_path)
    assert latency_share(table, {"a": 0.5}, "unit", "openvino", 8) == pytest.approx(1 - (60 - 33) / 120)
    assert latency_share(table, {"a": 0.75}, "unit", "openvino", 8) == pytest.approx(1 - (60 - 33) / 2 / 120)
    assert latency_share(table, {"a": 0.5}, "2:4", "openvino", 8) == pytest.approx(1 - (60 - 54) / 120)
    with pytest.raises(ValueError, match="nothing for backend openvino at batch 1"):
        latency_share(table, {"a": 0.5}, "unit", "openvino", 1)


def test_the_least_cost_on_the_target_is_chosen():
    predicted = {"unit": {"latency": 0.8, "size": 0.9}, "2:4": {"latency": 1.0, "size": 0.7}}
    assert choose(predicted, "latency", 0.02) == ("unit", "latency against dense: unit 0.800, 2:4 1.000")
    assert choose(predicted, "size", 0.02)[0] == "2:4"


def test_none_pays_below_the_least_gain():
    assert choose({"unit": {"latency": 0.99}, "2:4": {"latency": 1.02}}, "latency", 0.02) == (
        "none", "latency against dense: unit 0.990, 2:4 1.020; none gains 2%")
