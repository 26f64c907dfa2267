"""What the study of evaluations makes of its measurements, by hand; both ways of an evaluation agree on a small model."""

import numpy as np
import pytest
import torch

from benchmarks.claims import search  # noqa: F401 (registers its claims)
from benchmarks.claims.claim import CLAIMS
from benchmarks.results import kept, write
from benchmarks.search import correlation, evaluation, promotion
from benchmarks.search.evaluation import Pair, cost_numbers, row
from benchmarks.search.floor import BETWEEN, PRODUCTS, floor_numbers, profiled
from benchmarks.search.plain import ON_THE_FLY
from tasks.core.quality import Gaussian
from tasks.evolve.promote import Rival, image_losses
from tasks.evolve.proxy import PROXIES
from tasks.evolve.search import Evaluation
from tasks.runtime.integer import INTEGER, available
from tasks.runtime.precision import apply_precision, calibrate_ranges, remove_precision
from tests.unit.runtime.conftest import tiny_denoiser, tiny_states  # noqa: F401


def test_cost_by_hand():
    pairs = [Pair(1.0, 4.0, 5.0, 5.0), Pair(1.0, 2.0, 6.0, 6.0 + 1e-6), Pair(3.0, 4.0, 7.0, 7.0)]
    found = cost_numbers(pairs, 0.25)
    assert (found["evaluation_ratio_q25"], found["evaluation_ratio"], found["evaluation_ratio_q75"]) == (0.25, 0.5, 0.75)
    assert found["evaluation_share"] == 0.5 and found["shared_steps"] == 0.25
    assert found["fitness_difference"] == pytest.approx(1e-6)


def test_floor_by_hand():
    """Of 10 s of a plain evaluation ours spends 1 between the layers and 2 in their products, whatever else it does."""
    own = {"aten::gelu": 0.75, "aten::native_layer_norm": 0.25, "onednn::qlinear_pointwise": 2.0, "aten::copy_": 5.0}
    found = floor_numbers([(own, {"aten::mm": 6.0, "aten::gelu": 4.0})] * 3)
    assert found == pytest.approx({"between_share": 0.1, "products_share": 0.2, "floor_share": 0.3})


def test_the_profiler_names_the_products_and_what_is_between_them(tiny_denoiser, tiny_states):  # noqa: F811
    with torch.inference_mode():
        _, spent = profiled(tiny_denoiser, *tiny_states(tiny_denoiser, 4, 0))
    assert spent.keys() & set(PRODUCTS)
    assert tiny_denoiser.architecture != "dit" or spent.keys() >= set(BETWEEN)


@pytest.mark.skipif(not available(), reason="a CPU without VNNI computes the search's layers in fp32")
@pytest.mark.parametrize("token", ["w8a8", "w3a5"])
def test_on_the_fly_is_the_kernels_to_the_last_bits(tiny_denoiser, tiny_states, token):  # noqa: F811
    model, inputs = tiny_denoiser.model, tiny_states(tiny_denoiser, 4, 0)
    ranges = calibrate_ranges(model, [tiny_states(tiny_denoiser, 32, 1)], tiny_denoiser.joins())
    for layer in ranges:  # one at a time: between convolutions a UNet's strides differ, and with them the order of its sums
        found = []
        for kinds in (INTEGER, ON_THE_FLY):
            apply_precision(model, {layer: token}, ranges, kinds)
            seen = []
            hook = model.get_submodule(layer).register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
            tiny_denoiser(*inputs)
            hook.remove()
            found.append(seen)
        remove_precision(model)
        # The integers are the same; scales and bias are fp32, and a kernel for another CPU may fuse what is two steps here.
        assert all((a - b).abs().max() <= 5e-7 * a.abs().max() for a, b in zip(*found, strict=True)), layer


def test_a_replay_by_hand():
    """The third is behind the first for sure after two images, the fourth is not and turns out to be on the front."""
    stream = [Rival(0.2, np.array([2.0, 2.0, 2.0, 2.0])), Rival(0.1, np.array([4.0, 4.0, 4.0, 4.0])),
              Rival(0.5, np.array([5.0, 5.1, 0.0, 0.0])), Rival(0.4, np.array([1.0, 3.5, 1.0, 1.0]))]
    found = promotion.replay(stream, few=2, z=1.0)
    assert found == {"images_share": (2 * 4 + 2 * 3) / 16, "front_missed": 0.0, "hypervolume_share": 1.0}
    missed = promotion.replay(stream, few=2, z=0.0)
    assert missed["front_missed"] == pytest.approx(1 / 3) and missed["hypervolume_share"] < 1


def test_image_losses_average_to_the_distance():
    rng = np.random.default_rng(0)
    found, dense, finer = rng.normal(size=(3, 5, 4))
    assert image_losses(found, (dense, finer)).mean() == pytest.approx(evaluation.distance(found, (dense, finer)))


def test_judged_candidates_are_spread_over_costs():
    front = [Evaluation(None, float(cost), 10.0 - cost) for cost in range(6)]
    behind = [Evaluation(None, float(cost), 20.0) for cost in range(6, 12)]
    chosen = correlation.spread([*front, *behind, Evaluation(None, 3.0, None)], 4)
    assert [e.cost for e in chosen] == [0.0, 5.0, 6.0, 11.0]
    assert len(correlation.spread(front[:2], 24)) == 2


def test_rank_correlation_by_hand():
    judged = [correlation.Judged(0, {"paired_4": few, "frechet_8": whole}, fid)
              for few, whole, fid in ((1, 1, 10), (2, 3, 20), (4, 2, 30), (3, 4, 40))]
    assert correlation.rank_correlations(judged) == pytest.approx({"spearman_paired_4": 0.8, "spearman_frechet_8": 0.8})


def test_distance_per_loss_by_hand():
    """Of losses of 0.25, 0.5 and 1; one below what samples tell apart and one above twice dense's FID say nothing."""
    judged = [correlation.Judged(0, {"paired_4": distance}, fid) for distance, fid in (
        (5, 2.5), (8, 3.0), (20, 4.0), (1, 2.01), (99, 9.0))]
    assert correlation.per_loss(judged, 2.0) == {"per_loss_paired_4": 20.0, "per_loss_paired_4_q25": 18.0}
    assert correlation.per_loss(judged[3:], 2.0) == {}


def test_proxies_on_few_images_and_on_all_are_the_search_s():
    rng = np.random.default_rng(0)
    found, dense, finer = rng.normal(size=(3, 8, 4))
    found = correlation.proxies_of(found, (dense, finer), Gaussian.of(rng.normal(size=(99, 4))), (4, 8))
    assert set(found) == {f"{proxy}_{n}" for proxy in PROXIES for n in (4, 8)}
    assert found["sum_4"] == pytest.approx(found["paired_4"] + found["frechet_4"])


def test_samples_of_the_judged_outlive_a_kill(tmp_path):
    drawn = []
    for _ in range(2):
        found = kept(tmp_path / "work" / "a.npy", lambda: drawn.append(1) or np.arange(3))
    assert found.tolist() == [0, 1, 2] and len(drawn) == 1


def words(root, **metrics):
    folder = root / "benchmarks" / "search"
    folder.mkdir(parents=True, exist_ok=True)
    variants = {"switch_ms": "evaluation.switch"}
    write(folder / "results.csv", [row("t", variants.get(metric, "evaluation.bitops"), 0, metric, value, "p")
                                   for metric, value in metrics.items()])
    return {c.name: c.check(root).word for c in CLAIMS if c.name in ("evaluation_cost", "precision_switch")}


def test_claims(tmp_path):
    assert words(tmp_path, evaluation_ratio=0.3, fitness_difference=0, switch_ms=0.9) == {
        "evaluation_cost": "holds", "precision_switch": "holds"}
    assert words(tmp_path, evaluation_ratio=0.4, fitness_difference=0, switch_ms=1.1) == {
        "evaluation_cost": "falls short", "precision_switch": "falls short"}
    assert words(tmp_path, evaluation_ratio=0.3, fitness_difference=1e-3)["evaluation_cost"] == "not measured"
