"""A teacher against the data, by configs and headers alone; and a UNet whose last label means no label."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tasks.core.agreement import Data
from tasks.core.denoiser import build, inspect, load, read_weights, save
from tasks.distill import stage as distill
from tasks.pretrain_load import stage
from tasks.pretrain_load.architectures import SCHEDULE, dit, unet
from tasks.pretrain_load.preflight import fitted, inspected, planned
from tasks.runtime.packed import PackedDenoiser
from tests.unit.distill.test_distill_stage import PARAMS as DISTILL

DATA = Data(side=8, channels=1, num_classes=3, images=100)
SHAPE = {"architecture": "dit", "width": 16, "depth": 1, "heads": 2, "patch": 4}


def written(folder: Path, class_name: str, config: dict) -> Path:
    torch.manual_seed(0)
    save(build(class_name, config, SCHEDULE), folder)
    return folder


def unet_of(folder: Path, **changes) -> Path:
    return written(folder, "UNet2DModel", unet(8, 1, width=8) | changes)


@pytest.mark.parametrize("changes, message", [
    ({"side": 16}, "data.side: 16 is not 8, the teacher's sample_size ("),
    ({"channels": 3}, "data.channels: 3 is not 1, the teacher's in_channels ("),
    ({"num_classes": 4}, "config.json: num_embeds_ada_norm: 3 is not 4: the data has 4 classes"),
    ({"num_classes": 2}, "config.json: num_embeds_ada_norm: 3 is not 2: the data has 2 classes"),
    ({"num_classes": 0}, "config.json: num_embeds_ada_norm: 3 is not 0: the data has 0 classes")])
def test_a_teacher_for_other_data_is_refused(tmp_path, changes, message):
    folder = written(tmp_path, "DiTTransformer2DModel", dit(8, 1, 3, width=16, depth=1, heads=2, patch=4))
    assert inspected(folder, DATA).denoiser.num_classes == 3
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        inspected(folder, Data(**vars(DATA) | changes))
    assert "\n" not in str(refused.value)


def test_nothing_is_read_but_headers(tmp_path):
    """The numbers of the weights are gone; their places are not."""
    folder = unet_of(tmp_path)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:header] + b"\xff" * (len(whole) - header))  # every number is NaN
    found = inspected(folder, DATA)
    assert all(parameter.is_meta for parameter in found.denoiser.model.parameters())
    assert found.weights.parameters == sum(p.numel() for p in found.denoiser.model.parameters())
    with pytest.raises(ValueError, match="are NaN or infinite"):
        read_weights(found)


def test_a_learned_embedding_needs_a_row_for_each_timestep(tmp_path):
    unet_of(tmp_path, time_embedding_type="learned", num_train_timesteps=999)
    with pytest.raises(ValueError, match="config.json: num_train_timesteps: 999 is below 1000, the scheduler's timesteps"):
        inspected(tmp_path, DATA)


@pytest.mark.parametrize("changes, message", [
    ({"patch": 3}, "pretrain_load.train.patch: 3 does not divide the image size 8"),
    ({"heads": 3}, "pretrain_load.train.heads: 3 does not divide the width 16"),
    ({"architecture": "unet", "width": 12}, "pretrain_load.train: UNet2DModel cannot be computed as it is described: num_"),
    ({"width": 18}, "pretrain_load.train: DiTTransformer2DModel cannot be computed as it is described")])
def test_what_is_to_be_trained_can_be_built(changes, message):
    assert planned(SHAPE, DATA).num_classes == 3
    with pytest.raises(ValueError, match=message) as refused:
        planned(SHAPE | changes, DATA)
    assert "\n" not in str(refused.value)


# ---- num_class_embeds = classes + 1

def test_one_row_more_than_classes_is_the_null_label(tmp_path):
    found = inspected(unet_of(tmp_path / "a", num_class_embeds=4), DATA)
    assert (found.denoiser.num_classes, found.denoiser.has_null_label) == (4, False)
    teacher = fitted(read_weights(found), DATA.num_classes)
    save(teacher, tmp_path / "b")
    again = load(tmp_path / "b")
    for denoiser in (teacher, again):
        assert (denoiser.num_classes, denoiser.null_label, denoiser.has_null_label) == (3, 3, True)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 900])
    assert torch.equal(again(x, t, torch.tensor([0, 3])), teacher(x, t, torch.tensor([0, 3])))
    from diffusers import UNet2DModel
    plain = UNet2DModel.from_pretrained(tmp_path / "b/unet")
    torch.testing.assert_close(plain(x, t, class_labels=torch.tensor([0, 3])).sample, again(x, t, torch.tensor([0, 3])))


@pytest.mark.parametrize("rows, has_null", [(3, False), (4, True)])
def test_students_drop_labels_where_there_is_a_null_label(tmp_path, rows, has_null):
    teacher = fitted(load(unet_of(tmp_path, num_class_embeds=rows)), 3)
    assert teacher.num_classes == 3
    wanted = DISTILL.label_dropout if has_null else 0.0
    assert wanted == distill.training_settings(DISTILL, teacher).label_dropout and DISTILL.label_dropout > 0


@pytest.mark.parametrize("rows", [2, 5])
def test_any_other_number_of_rows_is_refused(tmp_path, rows):
    with pytest.raises(ValueError, match=f"num_class_embeds: {rows} is not 3 or 4, with a null label: the data has 3 classes"):
        inspected(unet_of(tmp_path, num_class_embeds=rows), DATA)


def test_a_package_draws_without_a_label_and_guides_by_the_null_label(tmp_path):
    teacher = fitted(load(unet_of(tmp_path / "a", num_class_embeds=4)), 3)
    config = json.loads(teacher.model.to_json_string())
    assert config["num_class_embeds"] == 4
    packed = PackedDenoiser(teacher.model, {"cache": None, "timesteps": [900]})
    assert packed.num_classes == packed.null_label == 3
    assert packed.labels(None, 2, torch.device("cpu")).tolist() == [3, 3]
    with pytest.raises(ValueError, match=r"class_labels: \[4\] not all between 0 and 3"):
        packed.labels([4], 1, torch.device("cpu"))
    without = PackedDenoiser(load(unet_of(tmp_path / "b", num_class_embeds=3)).model, {"cache": None, "timesteps": [900]})
    with pytest.raises(ValueError, match="guidance_scale: needs a null label; this model has 3 classes and none"):
        _ = without.null_label


def test_inspect_keeps_what_load_reads(tmp_path):
    found = inspect(unet_of(tmp_path))
    assert found.denoiser.sample_shape == load(tmp_path).sample_shape == (1, 8, 8)


# ---- the hub

HUB = {"source": "hub", "path": ".", "repo_id": "owner/name", "revision": "0123abc", "bank": 10, "bank_steps": 2, "seed": 0}
TRAIN = stage.TrainParams(**SHAPE, steps=1, batch=1, lr=0.1, muon_lr=0.0, warmup=1, weight_decay=0.0, ema_decay=0.9,
                          label_dropout=0.1, bf16=False)


def test_a_unet_is_not_trained_by_muon():
    with pytest.raises(ValueError, match=r"^pretrain_load\.train\.muon_lr: 0\.02; Muon trains"):
        dataclasses.replace(TRAIN, architecture="unet", muon_lr=0.02)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A repository; what is asked of it is copied into a cache by the library's own rule of patterns."""
    import huggingface_hub
    source, cache = unet_of(tmp_path / "remote"), tmp_path / "cache"

    def download(repo_id, revision, allow_patterns, local_files_only):
        if local_files_only and not cache.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such snapshot")
        files = [] if local_files_only else [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return source


def test_a_hub_model_is_looked_at_as_soon_as_it_is_there(hub, tmp_path):
    params = stage.Params(**HUB, train=TRAIN)
    known = {"data": Data(**vars(DATA) | {"num_classes": 0})}
    assert stage.preflight(params, known) is None
    stage.snapshot(params, ("*.json",))
    assert stage.preflight(params, known) is None, "its weights may come yet"
    assert stage.fetched(params) == tmp_path / "cache"
    assert stage.preflight(params, known).sample_shape == (1, 8, 8)
    with pytest.raises(ValueError, match="data.side: 16 is not 8, the teacher's sample_size"):
        stage.preflight(params, {"data": Data(**vars(DATA) | {"side": 16})})


def test_no_weights_are_fetched_of_what_is_no_network_on_pixels(hub, tmp_path):
    (hub / "vqvae").mkdir()
    (hub / "vqvae/diffusion_pytorch_model.safetensors").write_bytes(b"large")
    params = stage.Params(**HUB, train=TRAIN)
    stage.fetched(params)
    assert [p.parent.name for p in (tmp_path / "cache").rglob("*.safetensors")] == ["unet"], "nothing of what no part names"
    index = json.loads((hub / "model_index.json").read_text())
    (hub / "model_index.json").write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="model_index.json: vqvae: VQModel is a part"):
        stage.fetched(params)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_hub_that_is_away_is_one_line(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no\nroute")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="^pretrain_load.repo_id: owner/name at 0123abc cannot be fetched: no route$"):
        stage.fetched(stage.Params(**HUB, train=TRAIN))
