"""A folder on its way to another machine: as bytes up to a stated size, through an fsspec URI above it."""

import io
import os
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tasks.core.artifacts import digest, hash_file
from tasks.runtime.checks import check_name


@dataclass(frozen=True)
class Parcel:
    """Exactly one of `here`, `data`, `uri` is set. Picklable; `open()` works wherever it arrives."""

    name: str                  # digest of the content: a node unpacks the same folder once
    here: Path | None = None   # the folder itself: sender and receiver are one machine
    data: bytes | None = None  # a tar
    uri: str | None = None     # of a tar that the receiver can read through fsspec

    def open(self) -> Path:
        """The folder's path on this machine; read it, do not write into it."""
        if self.here is not None:
            return self.here
        folder = Path(tempfile.gettempdir()) / f"diffpress-{os.getuid()}" / self.name
        if not folder.exists():
            self.unpack(folder)
        return folder

    def unpack(self, folder: Path) -> None:
        """Another process may do the same at this moment: both unpack aside, one wins the rename."""
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.parent.stat().st_uid != os.getuid():
            raise ValueError(f"{folder.parent}: belongs to user {folder.parent.stat().st_uid}; expected a folder of our own")
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            whole = Path(aside) / "whole"
            whole.mkdir()
            self.unpack_into(whole)
            try:
                whole.rename(folder)
            except OSError:
                if not folder.exists():
                    raise

    def unpack_into(self, folder: Path) -> None:
        with tarfile.open(fileobj=io.BytesIO(self.data if self.uri is None else read_uri(self.uri))) as tar:
            members = tar.getmembers()
            for member in members:  # Python 3.11.0 to 3.11.3 know no filter="data"
                check_name(f"parcel {self.name}", member.name)
                if not member.isfile():
                    raise ValueError(f"parcel {self.name}: {member.name!r} is not a file")
            tar.extractall(folder, members)
        if content([(member.name, folder / member.name) for member in members]) != self.name:
            raise ValueError(f"parcel {self.name}: holds something else than what was sent")


def pack(root: Path, files: list[Path], max_bytes: int, storage_uri: str | None) -> Parcel:
    """files: of `root`, at any depth. Raises ValueError when they exceed max_bytes and there is no storage_uri."""
    name = content([(p.relative_to(root).as_posix(), p) for p in files])
    size = sum(p.stat().st_size for p in files)
    if size <= max_bytes:
        return Parcel(name, data=to_tar(root, files))
    if storage_uri is None:
        raise ValueError(f"cluster.storage_uri: null, but {root} holds {size} bytes, more than the "
                         f"{max_bytes} of cluster.max_object_mb that travel through the object store")
    uri = f"{storage_uri.rstrip('/')}/parcels/{name}.tar"
    write_uri(uri, to_tar(root, files))
    return Parcel(name, uri=uri)


def content(files: list[tuple[str, Path]]) -> str:
    """Digest of names and what they hold, in their order."""
    return digest([[name, hash_file(path)] for name, path in files])


def to_tar(root: Path, files: list[Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", dereference=True) as tar:  # DVC may have linked them to its cache
        for path in files:
            tar.add(path, path.relative_to(root).as_posix(), recursive=False)
    return buffer.getvalue()


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def read_uri(uri: str) -> bytes:
    import fsspec
    with fsspec.open(uri, "rb") as file:
        return file.read()


def write_uri(uri: str, data: bytes) -> None:
    """Named by its content: what is there already is not sent again. fsspec writes of one object are all or nothing on
    object stores; on a plain file system the name appears only when it is whole."""
    import fsspec
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.exists(path):
        return
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    filesystem.pipe_file(f"{path}.{os.getpid()}", data)
    filesystem.mv(f"{path}.{os.getpid()}", path)
