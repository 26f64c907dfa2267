"""groups.csv: pictures of one thing are on one side of the split."""

import shutil

import numpy as np
import pytest

from tasks.data.folder import list_folder, read_groups
from tasks.data.images import load_groups, split
from tasks.data.preflight import expected

LABELS = np.repeat([0, 1], [60, 30])
GROUPS = np.concatenate([np.arange(60) // 3, 100 + np.arange(30) // 2])


def sides(groups: np.ndarray, seed: int) -> tuple[set, set]:
    return tuple(set(groups[part]) for part in split(LABELS, 90, 18, seed, groups))


def test_no_group_is_torn_apart_whatever_the_seed():
    assert all(not train & held for train, held in (sides(GROUPS, seed) for seed in range(20)))
    torn = split(LABELS, 90, 18, 0)  # what happens without them
    assert set(GROUPS[torn[0]]) & set(GROUPS[torn[1]])


def test_each_class_keeps_its_share_and_every_image_is_somewhere():
    train, held = split(LABELS, 90, 18, 0, GROUPS)
    assert sorted([*train, *held]) == list(range(90))
    assert np.bincount(LABELS[held]).tolist() == [12, 6]
    assert (held == split(LABELS, 90, 18, 0, GROUPS)[1]).all() and (held != split(LABELS, 90, 18, 1, GROUPS)[1]).any()


def test_the_holdout_is_smaller_where_whole_groups_leave_room():
    _, held = split(LABELS, 90, 18, 0, np.concatenate([np.arange(60) // 5, GROUPS[60:]]))
    assert np.bincount(LABELS[held]).tolist() == [10, 6]


def test_without_classes_groups_count_too():
    groups = np.arange(20) // 2
    train, held = split(None, 20, 6, 0, groups)
    assert len(held) == 6 and not set(groups[train]) & set(groups[held])


def test_a_class_whose_groups_are_all_too_large_is_named():
    with pytest.raises(ValueError, match="data.holdout: class 0 has no group of 12 images or fewer, its share of the holdout"):
        split(LABELS, 90, 18, 0, np.concatenate([np.arange(60) // 15, GROUPS[60:]]))


@pytest.fixture
def folder(tmp_path):
    """Two classes of four pictures; a and b of each are one group."""
    rows = ["file,group"]
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for name in "abcd":
            (tmp_path / kind / f"{name}.png").touch()
            rows.append(f"{kind}/{name}.png,{kind}{'ab' if name in 'ab' else name}")
    (tmp_path / "groups.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_groups_are_numbered_in_the_order_of_the_pictures(folder):
    assert load_groups("folder", str(folder)).tolist() == [0, 0, 1, 2, 3, 3, 4, 5]
    assert not list_folder(folder).left_out


def test_without_the_file_there_are_no_groups(folder):
    (folder / "groups.csv").unlink()
    assert load_groups("folder", str(folder)) is None and load_groups("digits", None) is None


@pytest.mark.parametrize(("before", "after", "message"), [
    ("file,group", "name;group", r"groups.csv begins with name;group; its first line is file,group"),
    ("dog/a.png,dogab\n", "", r"groups.csv gives no group to \S*dog/a.png"),
    ("dog/a.png,", "dog/z.png,z\ndog/a.png,", r"groups.csv names \S*dog/z.png, which is no picture of the folder"),
    ("dog/a.png,dogab", "cat/a.png,dogab", r"groups.csv, row 6: cat/a.png,dogab; a row names a file, once, and its group"),
    ("dog/a.png,dogab", "dog/a.png,", r"groups.csv, row 6: dog/a.png,; a row"),
    ("dog/a.png,dogab", "dog/a.png,dog,ab", r"groups.csv, row 6: dog/a.png,dog,ab; a row"),
    ("dog/a.png,dogab", "dog/a.png,catab", r"group catab lies in two classes, cat and dog"),
    ("dog/a.png,dogab", '"dog/a.png,dogab', r"groups.csv cannot be read as a table in UTF-8 \(unexpected end of data\)"),
])
def test_a_malformed_table_is_refused_with_its_row(folder, before, after, message):
    text = (folder / "groups.csv").read_text()
    (folder / "groups.csv").write_text(text.replace(before, after))
    with pytest.raises(ValueError, match="data.path: .*" + message):
        read_groups(folder, list_folder(folder))


def test_bytes_that_are_no_utf8_are_refused(folder):
    (folder / "groups.csv").write_bytes("file,group\ncät".encode("latin-1"))
    with pytest.raises(ValueError, match="cannot be read as a table in UTF-8"):
        read_groups(folder, list_folder(folder))


def test_preflight_knows_of_groups_too_large_before_a_picture_is_read(folder, monkeypatch):
    monkeypatch.setattr("tasks.data.preflight.check_headers", lambda files: None)
    for kind in ("cat", "dog"):
        for i in range(8):
            shutil.copy(folder / kind / "a.png", folder / kind / f"{i}.png")
    rows = [f"{file.relative_to(folder)},{file.parent.name}" for file in list_folder(folder).files]
    (folder / "groups.csv").write_text("\n".join(["file,group", *rows]))
    with pytest.raises(ValueError, match="data.holdout: class 0 has no group of 5 images or fewer"):
        expected("folder", str(folder), 8, 1, 10, 0)
