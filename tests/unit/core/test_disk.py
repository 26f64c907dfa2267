"""A disk without room: what is said, what stays whole, and that work goes on where it can."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.core import disk
from tasks.core.artifacts import write_json
from tasks.core.checkpoint import Checkpoint
from tests.contract.reading import ROOT

ROOM = 1 << 20  # bytes; less than every write below
LIMITED = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
          f"resource.setrlimit(resource.RLIMIT_FSIZE, ({ROOM}, {ROOM}))\n"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one MiB; skipped where mounting is not allowed. The tests with a limit on file sizes run everywhere."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", tmp_path], capture_output=True,
                             check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)  # a failed writer may still hold its file


def save_openvino(folder):
    import openvino as ov
    x = ov.opset13.parameter([1, 1000], np.float32)
    weight = ov.opset13.constant(np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32))
    ov.save_model(ov.Model([ov.opset13.matmul(x, weight, False, False)], [x]), folder / "0.xml", compress_to_fp16=False)


def save_safetensors(folder):
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(10**6)}, folder / "a.safetensors")


WRITERS = {
    "torch": lambda folder: torch.save({"a": torch.zeros(10**6)}, folder / "a.pt"),
    "safetensors": save_safetensors,
    "numpy": lambda folder: np.save(folder / "a.npy", np.zeros(10**6)),
    "text": lambda folder: (folder / "a.json").write_text("x" * 4 * ROOM),
    "openvino": save_openvino,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writers_complaint_is_known_and_one_line(small_disk, writer):
    with pytest.raises((OSError, RuntimeError, Exception)) as failure:
        WRITERS[writer](small_disk)
    assert disk.is_full(failure.value)
    line = disk.describe(failure.value, small_disk)
    assert line.startswith(str(small_disk)) and "MB are free there" in line and "\n" not in line


def test_other_failures_are_not_taken_for_it():
    assert not disk.is_full(FileNotFoundError(errno.ENOENT, "No such file"))
    assert not disk.is_full(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2000x3 and 4x5)"))


def test_a_file_is_never_left_half_written(small_disk):
    path = small_disk / "params.yaml"
    path.write_text("scale: quick\n")
    with pytest.raises(OSError, match="No space left"):
        disk.write_whole(path, "x" * 4 * ROOM)
    assert path.read_text() == "scale: quick\n" and list(small_disk.iterdir()) == [path]


def test_training_outlives_a_checkpoint_that_finds_no_room(small_disk, capsys):
    checkpoint = Checkpoint(small_disk, "key", every_s=0)
    checkpoint.save({"step": 1})
    for _ in range(2):
        checkpoint.save_if_due(lambda: {"step": 2, "weights": torch.zeros(10**6)})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("warning: no checkpoint") and str(checkpoint.path) in said[0]
    assert checkpoint.load() == {"step": 1} and list(small_disk.iterdir()) == [checkpoint.path]
    checkpoint.save({"step": 3})
    assert checkpoint.load() == {"step": 3}


def test_a_checkpoint_beyond_a_limit_on_files_is_a_warning(tmp_path):
    run = in_child(tmp_path, "import torch\nfrom pathlib import Path\nfrom tasks.core.checkpoint import Checkpoint\n"
                             "kept = Checkpoint(Path('.'), 'key')\nkept.save({'step': 1})\n"
                             "kept.save({'w': torch.zeros(10**6)})\nprint(kept.load())")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("warning: no checkpoint: key.pt: cannot be written") and run.stdout.endswith("{'step': 1}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["key.pt"]


def test_what_cannot_be_saved_for_another_reason_is_an_error(tmp_path):
    with pytest.raises(Exception, match="pickle|lambda"):
        Checkpoint(tmp_path, "key").save({"f": lambda: 0})


@pytest.mark.parametrize("write", [
    "np.save(out / 'a.npy', np.zeros(10**6))", "torch.save(torch.zeros(10**6), out / 'a.pt')",
    "from safetensors.torch import save_file; save_file({'a': torch.zeros(10**6)}, out / 'a.safetensors')"])
def test_a_stage_without_room_ends_in_one_line_and_keeps_the_previous_result(tmp_path, write):
    previous = tmp_path / "artifacts/toy"
    previous.mkdir(parents=True)
    write_json(previous / "manifest.json", {})
    run = in_child(tmp_path, f"""
import types, numpy as np, torch
from dataclasses import dataclass
from tasks.core import shell
@dataclass(frozen=True, kw_only=True)
class Params:
    seed: int
def run(params, inputs, out):
    {write}
stage = types.ModuleType("tasks.toy.stage")
stage.__file__, stage.INPUTS, stage.Params, stage.run = "tasks/toy/stage.py", (), Params, run
cluster = dict(address=None, workers=1, cpus_per_worker=1, gpus_per_worker=0, max_attempts=3, max_object_mb=64,
               storage_uri=None, connect_timeout_s=20, start_timeout_s=60)
shell.read_params = lambda: dict(toy=dict(seed=1), cluster=cluster, resources=None)
shell.main(stage)
""")
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("error: artifacts/toy: cannot be written, ") and "MB are free there" in run.stderr
    assert [p.name for p in (tmp_path / "artifacts").iterdir()] == ["toy"] and (previous / "manifest.json").exists()


def test_a_device_that_is_always_full_is_known():
    with pytest.raises(OSError) as failure, open("/dev/full", "w") as full, contextlib.closing(full):
        full.write("x")
        full.flush()
    assert disk.is_full(failure.value)


def in_child(folder: Path, code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", LIMITED + code], cwd=folder, env=environment, capture_output=True, text=True,
                          check=False, timeout=120)
