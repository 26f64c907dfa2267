"""A full disk: told apart from every other failure, said in one line, and never a reason for half a file."""

import errno
import os
import re
import shutil
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Writers that raise no OSError with a number: NumPy, PyTorch's zip, safetensors (the system's words), OpenVINO's C++ stream.
WORDS = re.compile(r"\d+ requested and \d+ written|inline_container|PytorchStreamWriter failed writing|iostream error|"
                   + "|".join(re.escape(os.strerror(number)) for number in sorted(FULL)))


def is_full(error: BaseException) -> bool:
    """Whether `error`, or what led to it, is a write that found no room."""
    found: BaseException | None = error
    while found is not None:
        if getattr(found, "errno", None) in FULL or WORDS.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


def describe(error: BaseException, target: Path) -> str:
    """One line: what could not be written, how much room there is, what the writer said."""
    where = Path(getattr(error, "filename", None) or target)
    said = " ".join(str(error).split())[:200]
    return f"{where}: cannot be written, {free_bytes(where) / 1e6:.0f} MB are free there ({said})"


def free_bytes(path: Path) -> int:
    """Of the disk that `path` is, or would be, on."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def write_whole(path: Path, text: str) -> None:
    """`path` holds the old text or the new one, whatever happens meanwhile: a kill, a full disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
