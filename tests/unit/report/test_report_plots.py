"""Plots that follow the page's colours, and the arithmetic in them."""

import base64
import io

import numpy as np
from PIL import Image

from tasks.report.plots import (
    COLOURS,
    Point,
    Scale,
    box,
    cache,
    contact_sheet,
    front,
    layers,
    overlap,
    parallel,
    pareto,
    png,
    search,
)


def point(images_per_s, distance):
    return Point(name=f"{images_per_s}/{distance}", images_per_s=images_per_s, distance=distance, kind="fp32")


def test_the_front_keeps_what_nothing_beats_in_both():
    points = [point(1, 5), point(2, 5), point(3, 7), point(3, 6), point(2, 8), point(4, 9)]
    assert [p.name for p in pareto(points)] == ["2/5", "3/6", "4/9"]
    assert pareto([]) == []


def test_boxes_overlap_only_where_they_share_an_area():
    a = box(0, 0, "ab", to_the_left=False)
    assert overlap(a, box(5, 4, "ab", to_the_left=False))
    assert not overlap(a, box(0, 0, "ab", to_the_left=True))  # they touch at x = 0
    assert not overlap(a, box(0, 10, "ab", to_the_left=False))


def test_a_contact_sheet_is_read_row_by_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 3), np.uint8)
    sheet = contact_sheet(images, 2)
    assert sheet.shape == (4, 6, 1)  # the fifth image fills no row
    assert [sheet[y, x, 0] for y in (0, 2) for x in (0, 3)] == [0, 1, 2, 3]


def test_a_png_holds_the_image():
    for channels in (1, 3):
        image = np.random.default_rng(0).integers(0, 256, (4, 6, channels), np.uint8)
        data = base64.b64decode(png(image).removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image.squeeze())


def test_no_stand_in_colour_and_no_id_of_a_figure_is_left():
    drawings = [cache(["a", "b"], np.eye(2, dtype=bool), (900, 10)), layers(["a", "b"], [1.0, 0.5], [(8, 8), (32, 32)]),
                front([point(1, 5)], "fid_1k", [point(2, -0.01)], 1.0, "images/s"),
                search(np.ones(2), np.array([1.0, 3.0]), np.array([True, False]), [(1, 0.1), (2, 0.3)], "time"),
                parallel([scale([1.0, 3.0]), scale([2.0, 2.0])], np.array([True, False]), 0)]
    for drawing in drawings:
        assert drawing.startswith("<svg") and "var(--blue)" in drawing
        assert not any(stand_in in drawing for stand_in in COLOURS.values())
        assert 'id="figure' not in drawing


def scale(values, log=False):
    return Scale(name="s", values=np.asarray(values, float), show=str, log=log)


def test_a_scale_spans_its_values():
    assert scale([1, 3, 2]).places.tolist() == [0, 1, 0.5]
    assert np.allclose(scale([1, 100, 10], log=True).places, [0, 1, 0.5])
    assert scale([2, 2]).places.tolist() == [0.5, 0.5]


def test_the_same_plot_is_the_same_bytes():
    a, b = (layers(["a"], [1.0], [(8, 8)]) for _ in range(2))
    assert a == b
