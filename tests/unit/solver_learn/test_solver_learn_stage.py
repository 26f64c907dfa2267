"""The stage on a tiny random DiT: what it writes, that it writes the same twice, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tasks.core.artifacts import Inputs
from tasks.core.cluster import Cluster
from tasks.core.denoiser import build, load, save
from tasks.core.pairs import Pairs
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, network, sample, to_uint8
from tasks.core.unroll import PictureLoss, Weights
from tasks.data.features import FeatureNet, load_feature_net
from tasks.runtime.solver import SOLVERS
from tasks.solver_learn import stage
from tasks.solver_learn.start import Start, best_start, rows_of, starts

DIT = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 1, "out_channels": 1, "num_layers": 1,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_type": "ada_norm_zero",
       "norm_elementwise_affine": False}
LOSS = Weights(maps=1.0, pixels=4.0, moments=1.0)
TEACHER = stage.TeacherParams(solver="unipc", spacing="uniform", steps=6)
PARAMS = stage.Params(evaluations=(2, 3), noises=12, held=4, teacher=TEACHER, solvers=("dpm2m",),
                      spacings=("uniform", "logsnr"), opening=True, steps=4, batch=4, lr=0.02, warmup=1, ema_decay=0.5,
                      judge_every=2, loss=LOSS, seed=7)


def write_inputs(root):
    """data and pretrain_load, as far as few steps need them."""
    net = {"trunk": "plain", "width": 4, "channels": 1, "classes": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = build("DiTTransformer2DModel", DIT, {"num_train_timesteps": 100, "prediction_type": "v_prediction"})
        for parameter in teacher.model.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
        save_file(FeatureNet(**net).state_dict(), root / "features_search.safetensors")
    (root / "data.json").write_text(json.dumps({"feature_nets": {"search": net}}))
    save(teacher, root / "teacher")
    return {"data": root, "pretrain_load": root}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def alone() -> Cluster:
    return Cluster.from_params({"address": None, "workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0, "max_attempts": 1,
                                "max_object_mb": 256, "storage_uri": None, "connect_timeout_s": 25, "start_timeout_s": 60})


@pytest.fixture
def run(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name="out", params=PARAMS):
        out = tmp_path / name
        out.mkdir()
        return stage.run(params, Inputs(folders, name.ljust(16, "_"), alone()), out), out

    return run


def start(n: int, seed: int):
    return initial_noise((1, 8, 8), range(n), seed), labels_for(range(n), 3)


def test_what_it_writes(run, folders):
    report, out = run()
    solvers, pairs = json.loads((out / "solvers.json").read_text())["dense"], Pairs.read(out)
    assert set(solvers) == {"2", "3"} and len(pairs) == 12
    teacher, net = load(folders["pretrain_load"] / "teacher"), load_feature_net(folders["data"], "search")
    noise, labels, wanted = pairs.split(4)[1].take(range(4))
    for nfe, found in solvers.items():
        assert found["loss"] <= found["start_loss"] and len(found["rows"]) == int(nfe)
        recipe = Recipe.from_json({"timesteps": found["timesteps"], "solver": "learned", "rows": found["rows"], "cache": None,
                                   "precision": {}, "sparsity": None})
        images = sample(network(teacher), teacher.schedule, recipe, noise, labels)
        assert PictureLoss(net, LOSS)(images, wanted).item() == pytest.approx(found["loss"], rel=1e-3)
        assert report.numbers[nfe]["loss"] == found["loss"]


def test_the_pairs_are_the_teachers_images(run, folders):
    _, out = run()
    teacher = load(folders["pretrain_load"] / "teacher")
    images = sample(network(teacher), teacher.schedule, TEACHER.recipe(teacher.schedule), *start(12, 7))
    assert np.abs(np.load(out / "pairs.npy").astype(int) - to_uint8(images).astype(int)).max() <= 1


def test_the_same_bytes_twice(run):
    (_, one), (_, two) = run("one"), run("two")
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in ("solvers.json", "pairs.npy", "held.csv"))


def test_a_start_that_is_not_beaten_is_kept_and_it_is_said(run, capsys):
    report, out = run(params=replace(PARAMS, steps=0))
    assert all(found["kept_start"] and found["loss"] == found["start_loss"] for found in report.numbers.values())
    assert "nothing better than" in capsys.readouterr().out


def test_the_start_is_not_chosen_on_held_pairs(run, monkeypatch):
    seen = []
    monkeypatch.setattr(stage, "best_start", lambda *given: seen.append(given[4]) or Start("dpm2m", "uniform", False))
    run()
    assert [(pairs.first, len(pairs)) for pairs in seen] == [(0, 8), (0, 8)]  # of 12, of which the last 4 are held


@pytest.mark.parametrize("opening", [False, True])
def test_the_best_start_is_the_one_of_least_loss(folders, opening):
    teacher, net = load(folders["pretrain_load"] / "teacher"), load_feature_net(folders["data"], "search")
    images = stage.opening_images(teacher, 2, 0)[0]
    wanted = Start("dpm2m", "logsnr", opening)
    rows = tuple(rows_of(teacher.schedule, 3, wanted, images))
    recipe = Recipe(timesteps=stage.timesteps_of(rows), solver="learned", rows=rows)
    made = to_uint8(sample(network(teacher), teacher.schedule, recipe, *start(6, 1)))
    candidates = list(starts(("ddim", "dpm2m"), ("uniform", "logsnr"), True))
    assert len(candidates) == 8
    assert best_start(teacher, 3, candidates, images, Pairs(made, 1, 3), PictureLoss(net, LOSS)) == wanted


@pytest.mark.parametrize(("changed", "message"), [
    ({"evaluations": ()}, r"solver_learn.evaluations: \[\] is empty"),
    ({"evaluations": (4, 4)}, r"solver_learn.evaluations: \[4, 4\] names one twice"),
    ({"evaluations": (0,)}, "solver_learn.evaluations: 0 is not between 1 and 50"),
    ({"solvers": ("euler",)}, f"solver_learn.solvers: 'euler' is not one of {', '.join(SOLVERS)}"),
    ({"held": 12}, "solver_learn.held: 12 is not between 1 and 11")])
def test_bad_params_are_one_line(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(PARAMS, **changed)
