"""Peak memory of work in its own process."""

from functools import partial

import pytest

from tasks.benchmark.memory import peak_growth

MB = 2**20


def take(size):
    bytearray(b"x") * size


def fail():
    raise OSError("on purpose")


def test_the_peak_counts_what_is_freed_again_and_nothing_of_earlier_work():
    big, small = peak_growth([partial(take, 200 * MB), partial(take, 20 * MB)], preload=[])
    assert 198 * MB <= big < 230 * MB and 18 * MB <= small < 50 * MB  # the kernel counts pages in batches


def test_work_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="its error is above"):
        peak_growth([fail], preload=[])
