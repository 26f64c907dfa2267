"""What is known of the data before a picture is decoded: how many there are and of which classes."""

from pathlib import Path

import numpy as np

from tasks.core.agreement import Data
from tasks.data.folder import list_folder
from tasks.data.images import check_headers, load_groups, split

MNIST5K = 500  # of each of ten classes
DIGITS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)  # of 0 to 9, in sklearn's load_digits
LEAST = 2  # of each class in the holdout: the KID compares pairs of one class


def expected(source: str, path: str | None, side: int, channels: int, holdout: int, seed: int) -> Data:
    """The arguments are the stage's params. Raises ValueError with the key where images are too few for the holdout."""
    counts = np.array({"mnist5k": (MNIST5K,) * 10, "digits": DIGITS}.get(source) or folder_counts(Path(path or "")))
    check_holdout(counts, holdout, seed, load_groups(source, path))
    return Data(side=side, channels=channels, num_classes=len(counts) if len(counts) > 1 else 0, images=int(counts.sum()))


def check_holdout(counts: np.ndarray, holdout: int, seed: int, groups: np.ndarray | None = None) -> None:
    """counts: images of each class. Each class keeps its share in both parts, so only small classes can have too few, or
    those of few groups."""
    total, least = counts.sum(), counts.min()
    if groups is None and least * holdout >= LEAST * total and least * (total - holdout) >= total:
        return
    labels = np.repeat(np.arange(len(counts)), counts) if len(counts) > 1 else None
    _, held = split(labels, total, holdout, seed, groups)  # raises where there are too few to split
    few = np.array([len(held)]) if labels is None else np.bincount(labels[held], minlength=len(counts))
    if few.min() < LEAST:
        raise ValueError(f"data.holdout: {holdout} of {total} images leaves {few.min()} of class {few.argmin()} in the "
                         f"holdout; each class needs {LEAST} there")


def folder_counts(folder: Path) -> list[int]:
    """Pictures of each class. Their headers are read, at most some thousands of them."""
    listing = list_folder(folder)
    check_headers(listing.files)
    return [len(files) for files in listing.classes.values()]
