"""The first thing that a reader sees: the same noises through dense, dull_best and compressed, and how fast each is."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tasks.report.plots import contact_sheet
from tasks.report.results import Row

PICTURE = "picture.png"  # in artifacts/report, and beside the published reports
SHOWN = ("dense", "dull_best", "compressed")
WIDTH, TEXT, GAP = 960, 22, 10  # pixels: of the picture, of a caption's letters, between rows


def picture(samples: Mapping[str, np.ndarray], rows: Mapping[str, Row], setting: tuple[str, int], columns: int) -> Image.Image:
    """samples: variant -> uint8 (N, C, H, W) of the same noises and labels; the first `columns` of each are shown."""
    font, strips = ImageFont.load_default(size=TEXT), []
    for name in SHOWN:
        strip = contact_sheet(samples[name][:columns], min(columns, len(samples[name])))
        image = Image.fromarray(strip.squeeze(-1) if strip.shape[-1] == 1 else strip).convert("RGB")
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.NEAREST)
        strips.append((image, caption(name, rows[name], setting)))
    sheet = Image.new("RGB", (WIDTH, sum(image.height + TEXT + 2 * GAP for image, _ in strips)), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for image, text in strips:
        sheet.paste(image, (0, y))
        draw.text((4, y + image.height + GAP // 2), text, "black", font)
        y += image.height + TEXT + 2 * GAP
    return sheet


def caption(name: str, row: Row, setting: tuple[str, int]) -> str:
    return f"{name}: {row.quality['nfe']} evaluations, {row.images_per_s(*setting):.0f} images/s"


def sentence(rows: Mapping[str, Row], setting: tuple[str, int], met: bool) -> str:
    """What the picture's numbers come to; they are of the same interleaved rounds."""
    dense, dull, ours = (rows[name].images_per_s(*setting) for name in SHOWN)
    steps, said = rows["dense"].quality["nfe"], "met" if met else "not met"
    return (f"`compressed` makes {ours:.0f} images/s ({setting[0]}, batch {setting[1]}): {ours / dense:.1f} times as many as "
            f"`dense`, the teacher at {steps} steps, and {ours / dull:.1f} times as many as `dull_best`, the best of what "
            f"anyone would try first. The goal in `params.yaml` was {said}.")


def read_samples(fid: Path) -> dict[str, np.ndarray]:
    """fid: folder of the stage."""
    return {name: np.load(fid / "samples" / f"{name}.npy") for name in SHOWN}
