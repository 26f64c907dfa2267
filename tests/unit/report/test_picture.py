"""The picture is of the samples that it is given, and its sentence of the numbers that the rows hold."""

import numpy as np
import pytest

from tasks.report.picture import SHOWN, WIDTH, picture, sentence
from tasks.report.results import Row

SETTING = ("openvino", 8)


def rows(**speed: float) -> dict[str, Row]:
    return {name: Row(variant=name, quality={"nfe": nfe}, speed={SETTING: {"images_per_s": speed[name]}})
            for name, nfe in zip(SHOWN, (50, 12, 4), strict=True)}


@pytest.mark.parametrize("channels", [1, 3])
def test_every_variant_has_a_strip_of_its_first_samples(channels):
    samples = {name: np.full((10, channels, 8, 8), 60 * i, np.uint8) for i, name in enumerate(SHOWN)}
    sheet = np.asarray(picture(samples, rows(dense=10, dull_best=50, compressed=200), SETTING, 4))
    assert sheet.shape[1:] == (WIDTH, 3)
    strip = WIDTH // 4
    for i in range(len(SHOWN)):
        y = i * sheet.shape[0] // len(SHOWN)
        assert (sheet[y + 1:y + strip - 1] == 60 * i).all() and (sheet[y + strip + 2:y + strip + 30] == 255).any()


def test_the_sentence_has_both_ratios_and_whether_the_goal_was_met():
    said = sentence(rows(dense=10, dull_best=50, compressed=200), SETTING, True)
    assert "makes 200 images/s (openvino, batch 8): 20.0 times as many as `dense`, the teacher at 50 steps" in said
    assert "4.0 times as many as `dull_best`" in said and said.endswith("was met.")
    assert sentence(rows(dense=10, dull_best=50, compressed=200), SETTING, False).endswith("was not met.")
