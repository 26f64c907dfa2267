"""Manifests: whatever happens to a file of an artifact, its reader says which and how."""

import json

import pytest

from tasks.core.artifacts import MANIFEST, digest, read_json, validate, write_json, write_manifest


@pytest.fixture
def artifact(tmp_path):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.npy").write_bytes(b"12345")
    (folder / "deep" / "b.json").write_text("{}")
    write_manifest(folder, {"seed": 0}, {})
    return folder


def test_a_whole_artifact_is_valid_and_its_manifest_deterministic(artifact):
    before = (artifact / MANIFEST).read_bytes()
    write_manifest(artifact, {"seed": 0}, {})
    assert validate(artifact) == artifact and (artifact / MANIFEST).read_bytes() == before
    assert set(json.loads(before)["files"]) == {"a.npy", "deep/b.json"}


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "a.npy").unlink(), "a.npy: missing; the manifest names it with 5 bytes"),
    (lambda f: (f / "a.npy").write_bytes(b"123"), "a.npy: 3 bytes, the manifest says 5"),
    (lambda f: (f / "a.npy").write_bytes(b"12346"), "a.npy: blake2b .* the manifest says"),
    (lambda f: (f / "more").write_text(""), "more is not in the manifest"),
    (lambda f: (f / MANIFEST).unlink(), "manifest.json: not found"),
    (lambda f: (f / MANIFEST).write_text('{"files": '), "manifest.json: not JSON at line 1"),
])
def test_damage_is_named(artifact, damage, message):
    damage(artifact)
    with pytest.raises(ValueError, match=message):
        validate(artifact)


def test_lineage_follows_the_inputs(artifact, tmp_path):
    down = tmp_path / "fid"
    down.mkdir()
    write_manifest(down, {}, {"data": artifact})
    first = read_json(down / MANIFEST)["inputs"]["data"]
    (artifact / "a.npy").write_bytes(b"54321")
    write_manifest(artifact, {"seed": 0}, {})
    write_manifest(down, {}, {"data": artifact})
    assert read_json(down / MANIFEST)["inputs"]["data"] != first


def test_digest_ignores_the_order_of_keys_only():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"fid": float("nan")})


@pytest.mark.parametrize("content", ["{}", "[]", '{"files": [1]}', '{"files": {"a.npy": 5}}'])
def test_a_manifest_of_another_shape_is_one_line(artifact, content):
    (artifact / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match="manifest.json: is not a manifest"):
        validate(artifact)
