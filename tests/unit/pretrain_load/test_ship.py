"""A teacher that was trained becomes a folder that ships: fp16 weights, a card that says what was measured."""

import csv

import numpy as np
import pytest
import torch

from tasks.core.artifacts import read_json, write_json, write_manifest
from tasks.core.denoiser import build, load, save
from tasks.pretrain_load import ship
from tasks.pretrain_load.architectures import SCHEDULE, unet

PARAMS = {"data": {"source": "digits", "path": "tasks/data", "side": 8, "channels": 1},
          "pretrain_load": {"seed": 3, "bank_steps": 50, "train": {"architecture": "unet"}}}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The repository after pretrain_load with source: train."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    made, data = tmp_path / "artifacts/pretrain_load", tmp_path / "artifacts/data"
    torch.manual_seed(0)
    save(build("UNet2DModel", unet(8, 1, width=8), SCHEDULE), made / "teacher")
    for folder in (data, tmp_path / "reports"):
        folder.mkdir()
    for folder, name, n in ((made, "bank", 80), (data, "train", 40), (data, "holdout", 20)):
        np.save(folder / f"{name}.npy", rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8))
    with open(made / "curve.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), (50, 0.5), (100, 0.25)])
    write_json(data / "data.json", {"feature_nets": {"report": {"trunk": "residual"}}})
    write_json(tmp_path / "reports/pretrain_load.json", {"fid_80": 1.5, "fid_80_real": 0.5, "parameters": 1234})
    for folder in (made, data):
        write_manifest(folder, {}, {})
    monkeypatch.setattr(ship, "read_params", lambda: PARAMS)
    return tmp_path


def test_a_trained_teacher_ships_with_its_card(trained):
    ship.main("small")
    folder = trained / ship.TEACHERS / "small"
    numbers, text = read_json(folder / "card.json"), (folder / "README.md").read_text()
    assert numbers["samples"] == 80 and numbers["sampling_steps"] == 50 and numbers["fid_80"] == 1.5
    assert -4 <= numbers["memorised"] <= 1
    assert "Unconditional UNet" in text and "0.2500 after 100 steps" in text and "80 samples of 50 DDIM steps" in text
    assert (folder / "samples.png").exists()
    assert next(load(folder).model.parameters()).dtype == torch.float32
    assert sum(p.stat().st_size for p in folder.rglob("*.safetensors")) < 0.6 * sum(
        p.stat().st_size for p in (trained / "artifacts/pretrain_load/teacher").rglob("*.safetensors"))


def test_a_folders_card_has_its_notice_its_judge_and_what_training_cost(trained, monkeypatch):
    (trained / "my/emoji").mkdir(parents=True)
    (trained / "my/emoji/NOTICE.md").write_text("## Licence\n\nCC-BY 4.0, Twitter, Inc.\n")
    data = {"source": "folder", "path": "my/emoji", "side": 8, "channels": 3}
    monkeypatch.setattr(ship, "read_params", lambda: PARAMS | {"data": data})
    write_json(trained / "artifacts/data/data.json", {"feature_nets": {"report": {"pretrained": "efficientnet_lite0"}}})
    write_manifest(trained / "artifacts/data", {}, {})
    ship.main("small", "40 core-minutes")
    text = (trained / ship.TEACHERS / "small/README.md").read_text()
    assert "train split of emoji (40 images of 8 x 8 RGB)" in text
    assert "after 100 steps (`curve.csv`); 40 core-minutes |" in text
    assert "efficientnet_lite0, trained on ImageNet. The first 80" in text and text.endswith("CC-BY 4.0, Twitter, Inc.\n")
    assert read_json(trained / ship.TEACHERS / "small/card.json")["remark"] == "40 core-minutes"


def test_a_teacher_that_was_only_loaded_is_not_shipped(trained):
    (trained / "artifacts/pretrain_load/curve.csv").unlink()
    write_manifest(trained / "artifacts/pretrain_load", {}, {})
    with pytest.raises(ValueError, match="loaded, not trained"):
        ship.main("small")
