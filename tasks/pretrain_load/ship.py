"""`python -m tasks.pretrain_load.ship NAME [REMARK]`: a teacher that was just trained becomes one that the repository ships.

Reads artifacts/pretrain_load, artifacts/data, params.yaml and the stage's report; writes teachers/NAME: fp16 safetensors,
the curve, a grid of samples and the model card (card.json in words), all of it computed from what was measured. A folder's
NOTICE.md (licences, attribution) goes into the card; REMARK is said of the training: what it cost, how it was interrupted.
"""

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tasks.core import denoiser as denoisers
from tasks.core.artifacts import ARTIFACTS, REPORTS, read_json, validate, write_json
from tasks.core.params import read_params
from tasks.core.quality import memorisation
from tasks.data.features import describe_judge
from tasks.pretrain_load.stage import TEACHERS

CARD = """# {name}

{architecture} on the train split of {source} ({train_images:,} images of {size} x {size}{colours}),
{parameters:,} parameters, velocity prediction on a cosine schedule of 1,000 steps. Stored in fp16; loaded in fp32.

| | |
|---|---|
| command | `dvc repro pretrain_load` with `pretrain_load.source: train` and the values below |
| values | {values} |
| seed | {seed} |
| last loss | {loss:.4f} after {steps:,} steps (`curve.csv`){remark} |
{measured}
| nearest training image | {nn_train:.3f} (median pixel distance, as many images as the holdout) |
| nearest holdout image | {nn_holdout:.3f} |
| memorisation | {memorised:+.3f} excess share nearest to a training image (0: none, 1: all) |

Measured on {samples:,} samples of {sampling_steps} DDIM steps without guidance; the judge of stage `data` is the net
{judge}. The first 80 of them, uncurated:

![samples](samples.png)
{notice}"""


def grid(images: np.ndarray, columns: int, zoom: int = 2) -> Image.Image:
    """uint8 (N, C, H, W) -> one picture, row by row; N is cut to whole rows."""
    n, c, h, w = images.shape
    rows = n // columns
    sheet = images[: rows * columns].reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    picture = Image.fromarray(sheet[..., 0] if c == 1 else sheet)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) / 255


def measure(trained: Path, data: Path, bank_steps: int) -> dict:
    """What card.json holds: the stage's report, how its samples were made, memorisation in pixels."""
    bank = np.load(trained / "bank.npy")
    real = [flat(np.load(data / f"{part}.npy")) for part in ("train", "holdout")]
    memory = memorisation(flat(bank), *real, np.random.default_rng(0))
    return {**read_json(REPORTS / "pretrain_load.json"), "train_images": len(real[0]), "samples": len(bank),
            "sampling_steps": bank_steps, "nn_train": memory.nn_train, "nn_holdout": memory.nn_holdout,
            "memorised": memory.excess, "judge": describe_judge(data)}


def card(name: str, numbers: dict, params: dict, curve: list[tuple[str, str]]) -> str:
    how, data = params["pretrain_load"]["train"], params["data"]
    architecture = {"dit": "Class-conditional DiT (`DiTTransformer2DModel`)", "unet": "Unconditional UNet (`UNet2DModel`)"}
    quality = {k: v for k, v in sorted(numbers.items()) if k.startswith(("class_accuracy", "fid", "precision", "recall"))}
    folder = Path(data["path"]) if data["source"] == "folder" else None
    remark, notice = numbers.get("remark"), folder and folder / "NOTICE.md"
    return CARD.format(
        **{**numbers, "remark": f"; {remark}" if remark else ""}, name=name, architecture=architecture[how["architecture"]],
        source=folder.name if folder else data["source"], size=data["side"], colours=" RGB" if data["channels"] == 3 else "",
        seed=params["pretrain_load"]["seed"], values=", ".join(f"{k} {v}" for k, v in how.items()),
        loss=float(curve[-1][1]), steps=int(curve[-1][0]), measured="\n".join(f"| {k} | {v:.4f} |" for k, v in quality.items()),
        notice=f"\n{notice.read_text()}" if notice and notice.exists() else "")


def main(name: str, remark: str | None = None) -> None:
    trained, data = validate(ARTIFACTS / "pretrain_load"), validate(ARTIFACTS / "data")
    if not (trained / "curve.csv").exists():
        raise ValueError(f"{trained / 'curve.csv'}: not found; this teacher was loaded, not trained (pretrain_load.source)")
    folder = TEACHERS / name
    shutil.rmtree(folder, ignore_errors=True)
    denoisers.save(denoisers.load(trained / "teacher"), folder, torch.float16)
    shutil.copy(trained / "curve.csv", folder)
    with open(folder / "curve.csv", newline="") as file:
        curve = list(csv.reader(file))
    grid(np.load(trained / "bank.npy")[:80], columns=20).save(folder / "samples.png")
    params = read_params()
    numbers = measure(trained, data, params["pretrain_load"]["bank_steps"]) | ({"remark": remark} if remark else {})
    write_json(folder / "card.json", numbers)
    (folder / "README.md").write_text(card(name, numbers, params, curve[1:]))
    print(f"{folder}: {sum(p.stat().st_size for p in folder.rglob('*.safetensors')) / 1e6:.2f} MB")


if __name__ == "__main__":
    try:
        main(sys.argv[1], *sys.argv[2:3])
    except (ValueError, IndexError) as error:
        usage = "usage: python -m tasks.pretrain_load.ship NAME [REMARK]"
        sys.exit(f"error: {error}" if isinstance(error, ValueError) else usage)
