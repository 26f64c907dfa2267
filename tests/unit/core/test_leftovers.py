"""What a kill leaves: parts go, and a result that was put aside for a new one comes back if the new one never came."""

import pytest

from tasks.core import leftovers


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for path in ("artifacts/data/x", "artifacts/.data.stale/x", "artifacts/.fid.partial/x", "artifacts/.fid.stale/x",
                 "reports/fid.json", "reports/.fid.json.partial", "runs/checkpoints/fid/k.pt", "runs/checkpoints/fid/k.partial",
                 "runs/promoted/.abc.partial/x", "params.yaml", ".params.yaml.partial", "my.partial"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_parts_go_and_all_else_stays(repository):
    leftovers.clear(leftovers.OF_RUNS)
    assert files(repository) == {"artifacts/data/x", "artifacts/fid/x", "reports/fid.json", "runs/checkpoints/fid/k.pt",
                                 "params.yaml", "my.partial"}
    assert (repository / "artifacts/fid/x").read_text() == "artifacts/.fid.stale/x"


def test_a_stage_clears_what_stages_left(repository):
    before = files(repository)
    leftovers.clear(leftovers.OF_STAGES)
    assert before - files(repository) == {"artifacts/.data.stale/x", "artifacts/.fid.partial/x", "artifacts/.fid.stale/x"}
