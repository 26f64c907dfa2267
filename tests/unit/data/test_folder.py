"""Which files of a folder are pictures of which class: links, hidden files, nesting, suffixes, empty classes, names."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.data.folder import SUFFIXES, list_folder, shown
from tasks.data.images import check_headers, load_images, split

SHADES = {"cat": 40, "dog": 200}


def paint(file: Path, shade: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file


@pytest.fixture
def folder(tmp_path):
    for name, shade in SHADES.items():
        for i in range(3):
            paint(tmp_path / "pictures" / name / f"{i}.png", shade)
    return tmp_path / "pictures"


def read(folder: Path) -> list[tuple[int, int]]:
    """-> (shade, label) of each picture."""
    images, labels = load_images("folder", str(folder), 8, 1)
    return list(zip(images[:, 0, 0, 0].tolist(), [None] * len(images) if labels is None else labels.tolist(), strict=True))


PLAIN = [(40, 0)] * 3 + [(200, 1)] * 3


def test_sub_folders_are_classes(folder):
    assert read(folder) == PLAIN


# --- links

def test_a_link_to_a_class_folder_is_refused_since_dvc_does_not_look_behind_it(folder, tmp_path):
    (folder / "dog").rename(tmp_path / "elsewhere")
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"data.path: \S*/dog is a link to a folder, and DVC does not see .*cp -rsL"):
        list_folder(folder)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-rsL", folder.absolute(), copy], check=True)  # what the message says
    assert read(copy) == PLAIN


@pytest.mark.slow
def test_dvc_itself_does_not_see_what_changes_behind_a_link_to_a_folder(folder, tmp_path):
    """The reason for the refusal: when DVC sees it, linked folders can be taken."""
    for name in ("dog", "cat"):
        (folder / name).rename(tmp_path / f"real_{name}")
    (folder / "dog").symlink_to(tmp_path / "real_dog")
    (folder / "cat").mkdir()
    for file in (tmp_path / "real_cat").iterdir():
        (folder / "cat" / file.name).symlink_to(file)
    (tmp_path / "dvc.yaml").write_text("stages:\n  a:\n    cmd: python -c pass\n    deps: [pictures]\n")

    def dvc(*words: str) -> str:
        return subprocess.run([sys.executable, "-m", "dvc", *words], cwd=tmp_path, check=True, capture_output=True, text=True,
                              env={**os.environ, "DVC_NO_ANALYTICS": "1"}).stdout

    dvc("init", "--no-scm", "-q")
    dvc("repro", "-q")
    paint(tmp_path / "real_dog/0.png", 7)
    assert "up to date" in dvc("status")
    paint(tmp_path / "real_cat/0.png", 7)
    assert "modified:           pictures" in dvc("status")


@pytest.mark.parametrize("target", [".", ".."])
def test_a_link_that_leads_back_is_refused(folder, target):
    (folder / "cat" / "loop").symlink_to(target)
    with pytest.raises(ValueError, match="cat/loop is a link to a folder"):
        list_folder(folder)


def test_links_to_files_and_to_the_whole_folder_are_followed(folder, tmp_path):
    (folder / "dog" / "0.png").rename(tmp_path / "outside")
    (folder / "dog" / "0.png").symlink_to(tmp_path / "outside")
    (tmp_path / "link").symlink_to(folder)
    assert read(tmp_path / "link") == PLAIN


@pytest.mark.parametrize("name", ["cat/gone.png", "gone", ".gone"])
def test_a_link_to_nothing_is_named(folder, name):
    (folder / name).symlink_to("nowhere")
    with pytest.raises(ValueError, match=rf"data.path: \S*{name} is a link to nothing"):
        list_folder(folder)


def test_what_is_neither_file_nor_folder_is_refused_and_never_opened(folder):
    os.mkfifo(folder / "cat" / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png is neither a file nor a folder"):
        list_folder(folder)


# --- hidden

@pytest.mark.parametrize("name", [".cache/a.png", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/cat/._0.png", "cat/._0.png",
                                  "cat/.hidden/a.png", "@eaDir/a.png", ".git/a.png", "._b.png", "$RECYCLE.BIN/a.png"])
def test_what_is_hidden_is_no_class_and_no_picture(folder, name):
    paint(folder / name, 99)
    assert read(folder) == PLAIN


@pytest.mark.parametrize("name", ["Thumbs.db", "desktop.ini", ".DS_Store", "cat/Thumbs.db"])
def test_files_of_an_operating_system_are_left_out(folder, name):
    (folder / name).write_bytes(b"x")
    assert read(folder) == PLAIN and set(list_folder(folder).left_out) == {"hidden"}


def test_a_folder_may_itself_be_hidden(folder, tmp_path):
    folder.rename(tmp_path / ".data")
    assert read(tmp_path / ".data") == PLAIN


# --- nesting

def test_the_class_is_the_folder_at_the_top_however_deep_a_picture_lies(folder):
    paint(folder / "cat" / "a" / "b" / "deep.png", 41)
    paint(folder / "dog" / "a" / "deep.png", 201)
    assert read(folder) == [(40, 0)] * 3 + [(41, 0)] + [(200, 1)] * 3 + [(201, 1)]


def test_a_picture_beside_class_folders_is_refused(folder):
    paint(folder / "stray.png")
    with pytest.raises(ValueError, match=r"data.path: \S*/stray.png lies beside the folders cat, dog"):
        list_folder(folder)


def test_pictures_beside_a_folder_without_pictures_have_no_classes(folder):
    (folder / "cat" / "notes").mkdir()
    (folder / "cat" / "notes" / "a.txt").write_text("x")
    assert read(folder / "cat") == [(40, None)] * 3 and list_folder(folder / "cat").left_out == {".txt": 1}


def test_one_sub_folder_alone_is_no_class_and_it_is_said(folder, capsys):
    for file in (folder / "dog").iterdir():
        file.unlink()
    (folder / "dog").rmdir()
    assert read(folder) == [(40, None)] * 3
    assert "data.path: one sub-folder holds pictures, cat (3): no classes\n" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "val"), ("train",)])
def test_splits_are_not_classes(tmp_path, names):
    for name in names:
        for i in range(2):
            paint(tmp_path / name / "cat" / f"{i}.png")
    with pytest.raises(ValueError, match="which are splits, not classes; name one of them"):
        list_folder(tmp_path)


# --- suffixes

@pytest.mark.parametrize("suffix", [".gif", ".avif", ".heic", ".jp2", ".ppm", ".tga", ""])
def test_a_class_of_files_that_are_not_read_is_refused_by_name_and_suffix(folder, suffix):
    for file in (folder / "dog").iterdir():
        file.rename(file.with_suffix(suffix))
    what = suffix or "without a suffix"
    with pytest.raises(ValueError, match=rf"class \S*/dog holds no picture, but 3 {what}; read are .bmp, "):
        list_folder(folder)


def test_files_that_are_not_read_are_counted_and_said(folder, capsys):
    for name in ("cat/a.gif", "cat/b.GIF", "dog/a.txt", "labels.csv", "dog/none"):
        (folder / name).write_text("x")
    assert read(folder) == PLAIN
    said = capsys.readouterr().out
    assert "data.path: not read as pictures: 2 .gif, 1 .csv, 1 .txt, 1 without a suffix; read are .bmp, .jpeg, " in said
    assert "data.path: 2 classes, in this order: cat (3), dog (3)\n" in said


def test_suffixes_count_in_any_case_and_mixed(tmp_path):
    for i, suffix in enumerate((*SUFFIXES, ".PNG", ".JpEg", ".TIF")):
        paint(tmp_path / f"{i}{suffix}", 40)
    assert len(list_folder(tmp_path).files) == len(SUFFIXES) + 3
    assert read(tmp_path) == [(40, None)] * 10


# --- empty, small, many

def test_an_empty_class_is_refused(folder):
    (folder / "fox").mkdir()
    with pytest.raises(ValueError, match=r"class \S*/fox holds no picture, but nothing; read are"):
        list_folder(folder)
    (folder / "fox" / ".keep").touch()
    with pytest.raises(ValueError, match="fox holds no picture"):
        list_folder(folder)


def test_one_picture_in_a_class_is_refused(folder):
    paint(folder / "fox" / "a.png")
    with pytest.raises(ValueError, match=r"class fox holds one picture, \S*a.png; train and holdout need one each"):
        list_folder(folder)
    with pytest.raises(ValueError, match="the folder holds one picture"):
        list_folder(folder / "fox")


def test_an_empty_folder_a_file_and_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"holds no image \(.bmp.*\), but nothing"):
        list_folder(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"holds no image \(.bmp.*\), but 1 .zip"):
        list_folder(tmp_path)
    for path in (tmp_path / "a.zip", tmp_path / "gone"):
        with pytest.raises(ValueError, match="data.path: .* is not a folder"):
            list_folder(path)


def test_files_are_listed_without_being_opened_and_counted_for_the_split(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(30):
            (tmp_path / name / f"{i:02d}.png").touch(mode=0o000)
    listing = list_folder(tmp_path)
    assert [file.name for file in listing.files] == [f"{i:02d}.png" for i in range(30)] * 2
    assert np.bincount(listing.labels).tolist() == [30, 30]
    train, held = split(listing.labels, len(listing.files), 10, seed=0)
    assert np.bincount(listing.labels[held]).tolist() == [5, 5] and len(train) == 50


# --- names

def test_classes_are_in_the_order_of_their_text_and_numbers_are_warned_of(tmp_path, capsys):
    for number in ("10", "9", "1"):
        for i in range(2):
            paint(tmp_path / number / f"{i}.png", int(number))
    assert read(tmp_path) == [(1, 0), (1, 0), (10, 1), (10, 1), (9, 2), (9, 2)]
    said = capsys.readouterr().out
    assert "in this order: 1 (2), 10 (2), 9 (2)" in said and "order of their names as text" in said


def test_names_that_differ_in_case_are_two_classes_and_files_may_be_namesakes(tmp_path):
    for name, shade in (("a", 1), ("A", 2), ("ä", 3), ("日本", 4)):
        for i in range(2):
            paint(tmp_path / name / f"{i}.png", shade)
    assert read(tmp_path) == [(2, 0), (2, 0), (1, 1), (1, 1), (3, 2), (3, 2), (4, 3), (4, 3)]


def test_names_that_look_alike_are_refused(tmp_path):
    for name in ("caf\u00e9", "cafe\u0301"):
        for i in range(2):
            paint(tmp_path / name / f"{i}.png")
    with pytest.raises(ValueError, match=r"look alike, 'cafe\\u0301' and 'caf\\xe9'"):
        list_folder(tmp_path)


def test_a_message_is_one_line_whatever_a_file_is_called(tmp_path):
    odd = os.fsdecode(b"a\nb\xff.png")
    (tmp_path / odd).write_bytes(b"no picture")
    paint(tmp_path / "b.png")
    with pytest.raises(ValueError) as error:
        load_images("folder", str(tmp_path), 8, 1)
    assert r"a\nb\xff.png" in str(error.value) and str(error.value).isprintable()
    assert shown("日本 é.png") == "日本 é.png"


# --- what is in the files

def test_headers_are_checked_without_decoding(folder):
    files = list_folder(folder).files
    check_headers(files)
    Image.new("I", (8, 8)).save(files[4], "TIFF")
    with pytest.raises(ValueError, match=r"data.path: 1 of 6 files cannot be read: \S*dog/1.png \(signed integers; taken are"):
        check_headers(files)


def test_what_pictures_have_is_said_once_with_the_first_of_them(folder, capsys):
    for i in (1, 2):
        Image.new("LA", (8, 8), (200, 0)).save(folder / "dog" / f"{i}.png")
    assert read(folder) == [(40, 0)] * 3 + [(200, 1), (255, 1), (255, 1)]
    assert f"data.path: 2 of 6 pictures, {folder / 'dog/1.png'} first, have nothing but transparency" in capsys.readouterr().out
