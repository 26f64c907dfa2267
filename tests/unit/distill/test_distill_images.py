"""Which images a student sees."""

import pytest
import torch

from tasks.core.denoiser import Schedule
from tasks.distill.images import Images, check_pool, draw, with_noise
from tests.unit.distill.toy import SCHEDULE, tiny_images

POOL = Images(pixels=torch.tensor([0, 0, 255]).byte().view(3, 1, 1, 1), labels=torch.tensor([1, 1, 2]), real=2)


@pytest.mark.parametrize("share, expected", [(0.0, 0), (1.0, 1), (0.25, 0.25)])
def test_draw_mixes_the_bank_in(share, expected):
    x0, labels = draw(POOL, 4000, share, 9, 0.1, torch.Generator().manual_seed(0))
    taught = x0.flatten() == 1
    assert set(x0.flatten().tolist()) <= {-1, 1}
    assert taught.float().mean() == pytest.approx(expected, abs=0.03)
    assert share not in (0, 1) or taught.float().mean() == expected
    assert (labels == 9).float().mean() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(labels[labels != 9] == 2, taught[labels != 9])


def test_every_image_is_drawn():
    pool = Images(pixels=torch.arange(7).byte().view(7, 1, 1, 1), labels=torch.arange(7), real=4)
    _, labels = draw(pool, 500, 0.5, 9, 0.0, torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == set(range(7))


def test_a_pool_without_real_images_serves_bank_share_1():
    pool = Images(pixels=POOL.pixels[2:], labels=None, real=0)
    check_pool(pool, 1.0)
    assert draw(pool, 4, 1.0, 9, 0.1, torch.Generator().manual_seed(0))[0].flatten().tolist() == [1] * 4


@pytest.mark.parametrize("real, share, message", [(0, 0.5, "asks for real images"), (3, 0.5, "asks for teacher samples")])
def test_a_share_of_nothing_is_an_error(real, share, message):
    with pytest.raises(ValueError, match=f"distill.bank_share: 0.5 {message}, and there are none"):
        check_pool(Images(pixels=POOL.pixels, labels=None, real=real), share)


def test_a_batch_splits_into_its_images():
    schedule = Schedule.from_config(SCHEDULE)
    images = tiny_images()
    batch = with_noise(schedule, images.pixels.float(), images.labels, torch.Generator().manual_seed(0))
    parts = batch.split(3)
    assert [len(part.x) for part in parts] == [4, 4, 4]
    for key in ("x", "t", "labels", "target"):
        assert torch.equal(torch.cat([getattr(part, key) for part in parts]), getattr(batch, key))
    assert with_noise(schedule, images.pixels.float(), None, torch.Generator()).split(2)[1].labels is None
