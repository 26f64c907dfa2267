"""The additive model of time on a profile worked out by hand."""

import pytest

from tasks.core.latency import Times, read_times

# layer a: 80 us at fp32, 16 at int8; b: 120 and 40; the remainder: 30 and 10. Hidden units were taken from a.
LAYERS = """layer,kind,backend,precision,grain,density,batch,time_us
a,linear,openvino,fp32,dense,1.0,8,80
a,linear,openvino,int8,dense,1.0,8,16
b,linear,openvino,fp32,dense,1.0,8,120
b,linear,openvino,int8,dense,1.0,8,40
a,linear,openvino,fp32,unit,0.5,8,50
a,linear,openvino,fp32,unit,0.25,8,30
a,linear,openvino,int8,unit,0.5,8,10
a,linear,openvino,fp32,2:4,0.5,8,80
"""
MODEL = """backend,precision,batch,time_us,spread
openvino,fp32,8,230,0
openvino,int8,8,66,0
openvino,int8+fp32,8,181,0
"""


@pytest.fixture
def profile(tmp_path):
    (tmp_path / "layers.csv").write_text(LAYERS)
    (tmp_path / "model.csv").write_text(MODEL)
    return tmp_path


def test_one_precision_throughout_is_the_whole_model(profile):
    times = read_times(profile, "openvino", 8, "unit")
    assert [times.whole(token) for token in ("fp32", "w8a8")] == [230, 66]
    for token, whole in (("fp32", 230), ("w8a8", 66), ("w4a8", 66)):  # fewer bits are no faster than 8
        layers = times.of("a", token) + times.of("b", token)
        assert layers + times.remainder({"a": token, "b": token}) == pytest.approx(whole)


def test_a_mixed_plan_takes_the_mean_of_the_remainders(profile):
    """Weighted by the layers' time in fp32, 80 : 120."""
    times = read_times(profile, "openvino", 8, None)
    assert times.remainder({"a": "w8a8", "b": "fp32"}) == pytest.approx((80 * 10 + 120 * 30) / 200)


def test_density_is_interpolated_between_what_was_timed(profile):
    times = read_times(profile, "openvino", 8, "unit")
    assert [times.of("a", "fp32", density) for density in (1.0, 0.75, 0.5, 0.25, 0.1)] == [80, 65, 50, 30, 30]
    assert times.of("b", "fp32", 0.5) == 120 and times.of("a_norm", "fp32") == 0  # not timed
    assert read_times(profile, "openvino", 8, "2:4").of("a", "fp32", 0.5) == 80
    assert read_times(profile, "openvino", 8, None).of("a", "fp32", 0.5) == 80


def test_a_change_costs_what_the_additive_model_misses_where_layers_take_turns(profile):
    additive = 16 + 120 + (80 * 10 + 120 * 30) / 200  # a at int8, b at fp32
    changes = read_times(profile, "openvino", 8, "unit").changes
    assert changes == {frozenset(("w8a8", "fp32")): pytest.approx(181 - additive)}


@pytest.mark.parametrize("tokens, count", [
    (("bf16", "bf16", "w8a8"), {"bf16+w8a8": 1}),          # everything between the layers runs in bf16
    (("bf16", "bf16", "fp32"), {"bf16+fp32": 4}),          # in fp32: each bf16 layer is a way there and a way back
    (("w8a8", "bf16", "fp32"), {"w8a8+fp32": 1, "bf16+fp32": 2}),
    (("w8a8", "w8a8", "fp32"), {"w8a8+fp32": 1})])
def test_one_fp32_layer_makes_every_bf16_layer_two_changes(tokens, count):
    prices = {"bf16+w8a8": 1.0, "bf16+fp32": 10.0, "w8a8+fp32": 100.0}
    times = Times({}, {}, {frozenset(pair.split("+")): price for pair, price in prices.items()})
    assert times.changing(tokens) == sum(prices[pair] * n for pair, n in count.items())


@pytest.mark.parametrize("backend, batch", [("eager", 8), ("openvino", 1)])
def test_what_was_not_timed_is_named_with_what_was(profile, backend, batch):
    held = r"it holds \[\('openvino', 8\)\]"
    with pytest.raises(ValueError, match=f"layers.csv: nothing for backend {backend} at batch {batch}; {held}"):
        read_times(profile, backend, batch, None)
