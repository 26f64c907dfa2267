"""Which files of a folder are pictures, and of which class; names alone, nothing is opened.

- A class is a sub-folder at the top, with all that lies below it at any depth. Classes are numbered in the sorted order of
  their names as text, as torchvision's ImageFolder does: 0, 1, 10, 2. A single sub-folder is no class: nothing has a label.
- A picture is a file with one of SUFFIXES in any case; pictures are sorted by their paths. Other files are counted and said.
- What is hidden (its name begins with a dot) or made by an operating system (OWN) is neither a class nor a picture.
- A link to a file is that file. A link to a folder is refused: DVC does not look behind it, so pictures that change there would
  leave results fresh, and copies of the folder would lose the class. The folder itself may be a link.
- A file GROUPS at the top says which pictures show the same thing and so must not be torn apart by the split: columns file (a
  path in the folder) and group, a row for each picture. A group lies in one class.
- Refused, too: pictures beside class folders, a class without a picture or with a single one, folders that are splits, links
  to nothing, pipes and sockets, two names that look alike but are spelled with different code points.
"""

import csv
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
OWN = {"__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information", "thumbs.db",
       "ehthumbs.db", "desktop.ini"}
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
GROUPS = "groups.csv"
SHOWN = 8  # names in one line
HIDDEN = "hidden"


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder, class after class; those of a folder without sub-folders under the name ''."""

    classes: dict[str, list[Path]]
    left_out: Counter[str]  # files that are no pictures, by suffix; HIDDEN: names

    @property
    def files(self) -> list[Path]:
        return [file for files in self.classes.values() for file in files]

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (N,), or None without classes."""
        sizes = [len(files) for files in self.classes.values()]
        return np.repeat(np.arange(len(sizes), dtype=np.int64), sizes) if len(sizes) > 1 else None

    def describe(self) -> list[str]:
        """Lines that say how the folder was understood."""
        lines = []
        if "" not in self.classes:
            sizes = some([f"{name} ({len(files)})" for name, files in self.classes.items()])
            lines.append(f"{len(self.classes)} classes, in this order: {sizes}" if len(self.classes) > 1 else
                         f"one sub-folder holds pictures, {sizes}: no classes")
        if all(name.isdecimal() for name in self.classes) and list(self.classes) != sorted(self.classes, key=int):
            lines.append("the classes are numbered in the order of their names as text (1, 10, 2), not of their numbers; "
                         "zeros in front (01, 02, 10) make both the same")
        if self.left_out:
            lines.append(f"not read as pictures: {counted(self.left_out)}; read are {', '.join(SUFFIXES)}")
        return lines


def list_folder(folder: Path) -> Listing:
    """Raises ValueError, one line, with the file or folder and what is taken instead."""
    if not folder.is_dir():
        raise refusal(f"{shown(folder)} is not a folder")
    top, left_out = [], Counter()
    classes: dict[str, list[Path]] = {}
    others: dict[str, Counter] = {}
    for entry in visible(folder, left_out):
        if entry.is_dir():
            others[entry.name] = Counter()
            classes[entry.name] = keep_pictures(walk(entry.path, others[entry.name]), others[entry.name])
        elif entry.name != GROUPS:
            top.append(entry.path)
    top = keep_pictures(top, left_out)
    check_top(folder, top, classes, others, left_out)
    for counts in others.values():
        left_out.update(counts)
    listing = Listing({"": top} if top else classes, left_out)
    check_sizes(listing.classes)
    return listing


def read_groups(folder: Path, listing: Listing) -> np.ndarray | None:
    """int64 (N,): the group of each picture of `listing`; None without a file GROUPS. Raises ValueError, one line."""
    path = folder / GROUPS
    if not path.is_file():
        return None
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise refusal(f"{shown(path)} cannot be read as a table in UTF-8 ({error})") from None
    if header != ["file", "group"]:
        raise refusal(f"{shown(path)} begins with {shown(','.join(header)) or 'nothing'}; its first line is file,group")
    group_of: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        if len(row) != 2 or not all(row) or row[0] in group_of:
            raise refusal(f"{shown(path)}, row {number}: {shown(','.join(row)) or 'nothing'}; a row names a file, once, and "
                          "its group")
        group_of[row[0]] = row[1]
    return numbered(path, listing, {folder / name: group for name, group in group_of.items()})


def numbered(path: Path, listing: Listing, group_of: dict[Path, str]) -> np.ndarray:
    """Groups as numbers in the order of the pictures, once both name the same pictures."""
    for file in listing.files:
        if file not in group_of:
            raise refusal(f"{shown(path)} gives no group to {shown(file)}")
    if more := group_of.keys() - set(listing.files):
        raise refusal(f"{shown(path)} names {shown(min(more))}, which is no picture of the folder")
    class_of: dict[str, str] = {}
    for name, files in listing.classes.items():
        for file in files:
            if (other := class_of.setdefault(group_of[file], name)) != name:
                raise refusal(f"{shown(path)}: group {shown(group_of[file])} lies in two classes, {shown(other)} and "
                              f"{shown(name)}")
    numbers = {group: i for i, group in enumerate(class_of)}
    return np.array([numbers[group_of[file]] for file in listing.files], np.int64)


def visible(folder: str | Path, left_out: Counter) -> Iterator[os.DirEntry]:
    """The files and folders in `folder`, sorted by name, without hidden ones."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise refusal(f"{shown(folder)} cannot be read ({error.strerror})") from None
    for entry in entries:
        check_entry(entry)
        if entry.name.startswith(".") or entry.name.lower() in OWN:
            left_out[HIDDEN] += 1
        else:
            yield entry


def check_entry(entry: os.DirEntry) -> None:
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise refusal(f"{shown(entry.path)} is a link to nothing")
    if entry.is_dir() and entry.is_symlink():
        raise refusal(f"{shown(entry.path)} is a link to a folder, and DVC does not see what changes behind it; taken are "
                      "folders, and links to files (`cp -rsL FROM TO`, FROM with its full path, makes them for a whole folder)")
    if not entry.is_dir() and not entry.is_file():
        raise refusal(f"{shown(entry.path)} is neither a file nor a folder")


def walk(folder: str, left_out: Counter) -> Iterator[str]:
    """All files below, at any depth, sorted by the parts of their paths."""
    for entry in visible(folder, left_out):
        if entry.is_dir():
            yield from walk(entry.path, left_out)
        else:
            yield entry.path


def keep_pictures(files: Iterable[str], left_out: Counter) -> list[Path]:
    kept = []
    for file in files:
        suffix = os.path.splitext(file)[1].lower()
        if suffix in SUFFIXES:
            kept.append(Path(file))
        else:
            left_out[suffix or "without a suffix"] += 1
    return kept


def check_top(folder: Path, top: list[Path], classes: dict[str, list[Path]], others: dict[str, Counter],
              left_out: Counter) -> None:
    """top: pictures that lie in no sub-folder. classes, others: pictures of each sub-folder, counts of its other files."""
    full = [name for name, files in classes.items() if files]
    if not top and not full:
        found = counted(sum(others.values(), left_out))
        raise refusal(f"{shown(folder)} holds no image ({', '.join(SUFFIXES)}), but {found or 'nothing'}")
    if top and full:
        raise refusal(f"{shown(top[0])} lies beside the folders {some(full)}, which hold pictures, too; taken are pictures "
                      "that all lie in such folders, one for each class, or that all lie beside each other")
    if not top and len(full) < len(classes):
        empty = next(name for name in classes if not classes[name])
        raise refusal(f"class {shown(folder / empty)} holds no picture, but {counted(others[empty]) or 'nothing'}; read are "
                      f"{', '.join(SUFFIXES)}")
    if full and {name.lower() for name in full} <= SPLITS:
        raise refusal(f"{shown(folder)} holds {some(full)}, which are splits, not classes; name one of them: diffpress makes "
                      "its own holdout")
    check_spelling(folder, full)


def check_spelling(folder: Path, names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            raise refusal(f"{shown(folder)} holds two classes that look alike, {ascii(twin)} and {ascii(name)}; rename one")


def check_sizes(classes: dict[str, list[Path]]) -> None:
    for name, files in classes.items():
        if len(files) < 2:
            what = f"class {shown(name)}" if name else "the folder"
            raise refusal(f"{what} holds one picture, {shown(files[0])}; train and holdout need one each")


def refusal(text: str) -> ValueError:
    return ValueError(f"data.path: {text}")


def shown(path: str | Path) -> str:
    """A name that prints as one line in UTF-8, whatever bytes it is made of."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(shown(name) for name in names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def counted(counts: Counter) -> str:
    return some([f"{n} {what}" for what, n in counts.most_common()])
