"""What can be known before the first stage is refused there: `make run` ends in one line, and nothing on disk has changed."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flows import compress, doctor
from tasks.core import preflight
from tasks.core.params import validate_all
from tests.contract.reading import ROOT

TEACHERS = ROOT / "tasks/pretrain_load/teachers"
SECONDS = 10  # of CPU, for the whole command


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """With a teacher of its own, and what an earlier run has left."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TEACHERS / "mnist_dit", tmp_path / "model")
    shutil.copytree(TEACHERS / "mnist_unet", tmp_path / "other")
    (tmp_path / "tasks/data").mkdir(parents=True)
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("path: tasks/pretrain_load/teachers/mnist_dit", "path: model"))
    for path in ("artifacts/data/train.npy", "artifacts/package/compressed/recipe.json", "reports/fid.json", "dvc.lock"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("of an earlier run")
    return tmp_path


def tree(folder: Path) -> dict[str, str]:
    """Every file but the locks that a run takes."""
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.suffix != ".lock"}


def params(*changes: tuple[str, str]):
    """Lines of params.yaml, each by its beginning, with another value."""
    def damage(folder: Path) -> None:
        for key, value in changes:
            edit(folder, rf"(?m)^(  *{key}:) [^#\n]*", rf"\1 {value} ")
    return damage


def edit(folder: Path, pattern: str, replacement: str) -> None:
    text, found = re.subn(pattern, replacement, (folder / "params.yaml").read_text(), count=1)
    assert found, pattern
    (folder / "params.yaml").write_text(text)


def without_cover(folder: Path) -> None:
    edit(folder, r"(?ms)^  cover:.*?^  densities", "  cover: [nothing.*]\n  densities")


def densities_too_high(folder: Path) -> None:
    edit(folder, r"(?ms)^(mask_search:.*?^  densities:) [^#]*", r"\1 [0.99] ")
    params(("unit_share", "0.01"), ("unit_multiple", "512"))(folder)


def trained(folder: Path) -> None:
    edit(folder, r"(?ms)^(pretrain_load:\n  source:) folder", r"\1 train")
    params(("patch", "3"))(folder)


def config(file: str, **changes):
    def damage(folder: Path) -> None:
        path = folder / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return damage


def weights(change):
    def damage(folder: Path) -> None:
        path = folder / "model/transformer/diffusion_pytorch_model.safetensors"
        state = change(load_file(path))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return damage


def images(*counts: int, suffix: str = "png", holdout: int = 10):
    """A folder of so many pictures a class, which takes the place of MNIST; and a teacher that fits any number of classes."""
    def damage(folder: Path) -> None:
        for name, count in zip("abcdefgh", counts, strict=False):
            (folder / "images" / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / "images" / name / f"{i}.png")
                (folder / "images" / name / f"{i}.png").rename(folder / "images" / name / f"{i}.{suffix}")
        (folder / "images").mkdir(exist_ok=True)
        edit(folder, "path: model", "path: other")
        edit(folder, "source: mnist5k", "source: folder")
        edit(folder, "path: tasks/data", "path: images")
        edit(folder, "holdout: 1000", f"holdout: {holdout}")
    return damage


def renamed_student(folder: Path) -> None:
    for path in (folder / "model/few_steps").iterdir():
        path.rename(path.with_stem("few_5"))


def learned_by_a_student(folder: Path) -> None:
    edit(folder, "seed: 4242", "seed: 777")


CONFIG = "transformer/config.json"
STUDENT = "few_steps/few_4.json"
BAD = {
    "side": (params(("side", "32")), f"data.side: 32 is not 28, the teacher's sample_size (model/{CONFIG})"),
    "channels": (params(("channels", "3")), f"data.channels: 3 is not 1, the teacher's in_channels (model/{CONFIG})"),
    "classes": (config(CONFIG, num_embeds_ada_norm=1000), "not the weights of DiTTransformer2DModel as its config.json has it"),
    "a vae": (config("model_index.json", vae=["diffusers", "AutoencoderKL"]), "model_index.json: vae: AutoencoderKL is a part"),
    "another class": (config(CONFIG, _class_name="PixArtTransformer2DModel"), "_class_name: 'PixArtTransformer2DModel' is not"),
    "norm": (config(CONFIG, norm_type="ada_norm_single"), "norm_type: ada_norm_single is not ada_norm_zero"),
    "latents": (config(CONFIG, in_channels=4), "in_channels: 4 is not 1 (grey) or 3 (RGB)"),
    "a missing layer": (weights(lambda state: {k: v for k, v in state.items() if k != "proj_out_2.bias"}),
                        "1 missing (proj_out_2.bias)"),
    "no teacher": (lambda folder: edit(folder, "path: model", "path: nowhere"), "pretrain_load.path: nowhere holds no model_"),
    "holdout": (params(("holdout", "4995")), "data.holdout: 4995 is not between 10 and 4990 (5000 images, 10 classes)"),
    "too few images": (images(6, 6, holdout=11), "data.holdout: 11 is not between 2 and 10 (12 images, 2 classes)"),
    "a small class": (images(2, 40), "data.holdout: 10 of 42 images leaves"),
    "one picture": (images(1, 40), "data.path: class a holds one picture"),
    "no picture": (images(3, 3, suffix="heic"), "holds no image"),
    "samples": (params(("samples", "15"), ("pairs", "5")), "fid.samples: 15 is below 20, two samples of each"),
    "size": (params(("target", "size"), ("max_size", "1000")), "goal.max_size: 1000 is below"),
    "cover": (without_cover, "mask_search.cover: none of nothing.* matches a layer of the model"),
    "densities": (densities_too_high, "mask_search.densities: [0.99] take no unit of any block; the highest that does is 0.75"),
    "patch": (trained, "pretrain_load.train.patch: 3 does not divide the image size 28"),
    "a student's card": (config(STUDENT, rows=[]), f"model/{STUDENT}: recipe: rows [] is not a list of one object for each"),
    "a student's name": (renamed_student,
                         "model/few_steps/few_5.json: it has 4 rows, one an evaluation, and not as many as its name says"),
    "a student's network": (lambda folder: save_file({"a": torch.zeros(2)}, folder / "model/few_steps/few_4.safetensors"),
                            "few_4.safetensors: its weights are not those of the teacher's network"),
    "a student's noises": (learned_by_a_student, f"fid.seed: 777 is that of pairs in model/{STUDENT}: samples"),
    "backend": (params(("backend", "tensorrt")), "mask_search.backend: 'tensorrt' is not one of openvino, eager"),
}


def test_the_repository_is_good_as_it_is(repository):
    assert validate_all()["scale"] == "quick"


@pytest.mark.parametrize("case", BAD)
def test_a_bad_input_is_one_line_and_changes_nothing(repository, case, capsys):
    damage, message = BAD[case]
    damage(repository)
    before = tree(repository)
    assert compress.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert tree(repository) == before


def test_whoever_looks_ahead_says_the_same(repository, capsys):
    """`make run`, `make repro` and `make doctor`."""
    BAD["side"][0](repository)
    assert compress.main([]) == preflight.main() == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0] == said[1] == "error: params.yaml: " + BAD["side"][1]
    assert list(doctor.params()) == [("WRONG", said[0].removeprefix("error: "))]


@pytest.mark.slow
def test_it_takes_seconds(repository):
    """The whole command, in a process of its own; the weights are refused last of all."""
    BAD["a missing layer"][0](repository)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "flows.compress"], capture_output=True, text=True, check=False,
                          env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and BAD["a missing layer"][1] in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
