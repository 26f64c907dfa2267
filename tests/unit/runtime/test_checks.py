"""Files are what their manifest says and lie where it is; JSON is read strictly; each mistake is one line with the file."""

import os
import time

import pytest

from tasks.core.artifacts import MANIFEST, read_json, validate, write_json, write_manifest
from tasks.runtime import checks
from tasks.runtime.checks import check_file, check_manifest, check_name, file_facts, read_object

HASH = "0" * 32


@pytest.mark.parametrize("content, message", [
    (b'{"a": 1', "not JSON at line 1, column 8"), (b"", "not JSON at line 1, column 1"), (b"{'a': 1}", "not JSON at line 1"),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands there twice"), (b'{"a": NaN}', "NaN is no number"),
    (b'{"a": [-Infinity]}', "-Infinity is no number"), (b'{"a": 1e999}', "1e999 is more than a float can hold"),
    (b'{"a": "\xff"}', "byte 7 is not UTF-8"), (b"\xef\xbb\xbf{}", "not JSON at line 1"), (b"1" * 5000, "not JSON: Exceeds"),
    (b"[" * 100_000, "nested too deep"), (b"[1, 2]", "holds list, expected an object"), (b"null", "holds NoneType"),
])
def test_damaged_json_is_one_line_with_the_file(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_object(tmp_path / "x.json")
    assert str(caught.value).startswith(f"{tmp_path}/x.json: ") and "\n" not in str(caught.value)


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: cannot be read: Is a directory"):
        read_json(tmp_path)
    with pytest.raises(ValueError, match="no.json: not found"):
        read_json(tmp_path / "no.json")


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "a/..", ".", "", "./a", "a//b", "a/", "C:a", "c:/a",
                                  "C:\\a", "..\\a", "a\\b", "\\\\host\\share\\a", "a\0b", "//host/a"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="manifest.json: .* is not a file inside the folder"):
        check_name(tmp_path / "manifest.json", name)


@pytest.mark.parametrize("name", ["a", "a/b.json", ".hidden", "a b/ü.bin", "...", "a..b"])
def test_a_plain_name_is_taken(tmp_path, name):
    check_name(tmp_path, name)


@pytest.mark.parametrize("entry", [5, None, [], {}, {"bytes": 1}, {"bytes": 1, "blake2b": HASH, "more": 1},
                                   {"bytes": True, "blake2b": HASH}, {"bytes": -1, "blake2b": HASH},
                                   {"bytes": 1.0, "blake2b": HASH}, {"bytes": "1", "blake2b": HASH},
                                   {"bytes": 1, "blake2b": None}, {"bytes": 1, "blake2b": "0" * 31},
                                   {"bytes": 1, "blake2b": "Z" * 32}])
def test_an_entry_of_another_shape_is_refused(tmp_path, entry):
    with pytest.raises(ValueError, match="package.json: .*a.bin"):
        check_manifest(tmp_path / "package.json", {"a.bin": entry})


@pytest.fixture
def file(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_bytes(b"12345")
    return tmp_path / "in" / "a.bin"


def test_a_link_out_of_the_folder_is_refused_but_into_a_store_of_contents(file, tmp_path):
    facts = file_facts(file)
    for place, allowed in (("elsewhere/a.bin", False), ("files/md5/82/7ccb0eea8a706c4c34a16891f84e7b", True),
                           (f"blobs/{'0' * 64}", True), ("blobs/a.bin", False), ("files/md5/../a.bin", False)):
        target = tmp_path / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"12345")
        file.unlink()
        file.symlink_to(target)
        if allowed:
            check_file(file.parent, "a.bin", facts)
        else:
            with pytest.raises(ValueError, match="a.bin: leads out of the folder, to"):
                check_file(file.parent, "a.bin", facts)
    (file.parent / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="sub/a.bin: leads out of the folder"):
        check_file(file.parent, "sub/a.bin", facts)


def test_what_is_no_file_is_refused(file):
    (file.parent / "folder").mkdir()
    os.mkfifo(file.parent / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match=f"{name}: is not a file"):
            check_file(file.parent, name, {"bytes": 0, "blake2b": HASH})


def test_a_file_is_hashed_once_until_it_is_written(file, monkeypatch):
    hashed = []
    monkeypatch.setattr(checks, "file_facts", lambda path: hashed.append(path) or file_facts(path))
    facts = file_facts(file)
    for _ in range(2):  # written just now: its times would not show another write
        check_file(file.parent, "a.bin", facts)
    assert len(hashed) == 2
    monkeypatch.setattr(checks, "SETTLED_NS", 0)
    for _ in range(3):
        check_file(file.parent, "a.bin", facts)
    assert len(hashed) == 3
    time.sleep(0.02)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(b"12346")
    os.utime(file, ns=times)  # as a careful copy does
    with pytest.raises(ValueError, match="a.bin: expected 5 bytes with blake2b .*, found 5 bytes"):
        check_file(file.parent, "a.bin", facts)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "deep", "C:\\x"])
def test_an_artifact_names_nothing_outside_itself(tmp_path, name):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "outside").write_text("x")
    write_manifest(folder, {}, {})
    write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), "files": {name: file_facts(tmp_path / "outside")}})
    with pytest.raises(ValueError, match="is not a file"):
        validate(folder)


def test_infinities_are_read_where_they_may_be_and_nan_nowhere(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"lambda_min_clipped": -Infinity}')
    assert read_json(path, infinities=True) == {"lambda_min_clipped": float("-inf")}
    path.write_text('{"norm_eps": NaN}')
    with pytest.raises(ValueError, match="NaN is no number of JSON"):
        read_json(path, infinities=True)
