"""What is published is what dvc.lock says that one run wrote, whole; the README follows, and nothing else changes."""

import hashlib

import pytest
import yaml

from tasks.core.artifacts import write_json, write_manifest
from tasks.core.params import STAGES
from tasks.report import publish
from tasks.report.picture import PICTURE
from tasks.report.table import BEGIN, END, FIRST, LAST
from tests.unit.report.example import benchmark_reports, fid_report


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A repository after a run at scale quick. -> lock(changes): dvc.lock, stage -> what it holds otherwise."""
    monkeypatch.chdir(tmp_path)
    costs, timings = benchmark_reports()
    (tmp_path / "reports/quick").mkdir(parents=True)
    known = {"fid": fid_report(), "benchmark": costs, "benchmark.timings": timings,
             "report": {"backend": "openvino", "batch": 1, "met": False}}
    (tmp_path / "artifacts/report").mkdir(parents=True)
    (tmp_path / "artifacts/report" / PICTURE).write_bytes(b"a picture")
    write_manifest(tmp_path / "artifacts/report", {}, {})
    for name in {*STAGES, *known}:
        write_json(f"reports/{name}.json", known.get(name, {"a": 1}))
    (tmp_path / "README.md").write_text(f"# x\n{BEGIN.format('reports/quick')}\n{END}\n"
                                        f"{FIRST.format('reports/quick')}\n{LAST}\n")

    def lock(changes=None):
        def outs(stage):
            found = [f"reports/{stage}.json"] + [f"reports/{stage}.timings.json"] * (stage == "benchmark")
            return [{"path": path, "md5": hashlib.md5((tmp_path / path).read_bytes()).hexdigest()} for path in found]
        stages = {stage: {"params": {"params.yaml": {"scale": "quick"}}, "outs": outs(stage)} for stage in STAGES}
        (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {**stages, **(changes or {})}}))
    lock()
    return lock


def test_the_runs_reports_are_copied_and_the_readme_follows(run, tmp_path, capsys):
    (tmp_path / "reports/quick/gone.json").write_text("{}")
    publish.main()
    there, here = ({p.name: p.read_bytes() for p in (tmp_path / folder).glob("*.json")}
                   for folder in ("reports/quick", "reports"))
    assert there == here
    assert (tmp_path / "reports/quick" / PICTURE).read_bytes() == b"a picture"
    readme = (tmp_path / "README.md").read_text()
    assert "| `compressed` |" in readme and f"(reports/quick/{PICTURE})" in readme
    assert "The goal in `params.yaml` was not met." in readme
    assert capsys.readouterr().out.startswith("reports/quick holds the reports of the last run")


@pytest.mark.parametrize("change, message", [
    (lambda lock: write_json("reports/fid.json", {"a": 2}), "reports/fid.json: is not what dvc.lock says that the run wrote"),
    (lambda lock: publish.Path("reports/evolve.json").unlink(), "reports/evolve.json: not found; `dvc checkout` or make run"),
    (lambda lock: lock({"fid": {"params": {"params.yaml": {"scale": "full"}}, "outs": []}}), ".*at scale quick, fid at"),
    (lambda lock: publish.Path("dvc.lock").write_text("stages: {data: {}}"), ".*pretrain_load, .* never ran here"),
    (lambda lock: publish.Path("dvc.lock").unlink(), "dvc.lock: not found")])
def test_what_is_no_whole_run_is_refused_and_nothing_is_copied(run, tmp_path, change, message):
    change(run)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        publish.main()
    assert not list((tmp_path / "reports/quick").iterdir())
