"""The flow's machinery on a toy pipeline: streaming, time limits, failures in one line, what is put back, what is fresh."""

import fcntl
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from prefect.logging import disable_run_logger
from prefect.states import Completed, Failed

from flows import compress, freshness, nightly, search, stages
from flows.child import run_child
from flows.screen import SHOWN, Screen
from tasks.core.params import STAGES

BAR = "fid [######------------------] 25/100  5.1/s  ETA 0:15"

PIPELINE = """
stages:
  one:
    cmd: python one.py
    deps: [one.py]
    outs: [artifacts/one]
    metrics: [reports/one.json]
  two:
    cmd: python two.py
    deps: [artifacts/one, two.py]
    outs: [artifacts/two]
  three:
    cmd: python three.py
    deps: [artifacts/two, three.py]
    outs: [artifacts/three]
"""
WRITES = """
import json, pathlib
for name in ("artifacts/{0}", "reports"):
    pathlib.Path(name).mkdir(parents=True, exist_ok=True)
pathlib.Path("artifacts/{0}/x").write_text("{1}")
pathlib.Path("reports/{0}.json").write_text(json.dumps({{"a": {{"b": {1}}}}}))
print("wrote {1}")
"""
CLUSTER = {"address": None, "workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0, "max_attempts": 3, "max_object_mb": 64,
           "storage_uri": None, "connect_timeout_s": 20, "start_timeout_s": 60}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A repository with three stages; Prefect's server is not needed, so what a stage publishes is only recorded."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.py").write_text(WRITES.format(name, 1))
    published = []
    monkeypatch.setattr(stages, "publish", published.append)
    with disable_run_logger():
        yield published


def run(stage, timeout_s=60.0):
    return stages.run_stage.fn(stage, timeout_s)


# ---- the child

def test_every_line_arrives_while_the_child_still_runs():
    seen = []
    code = "import time; print('first', flush=True); time.sleep(0.4); print('second')"
    assert run_child([sys.executable, "-c", code], lambda line: seen.append((line, time.monotonic())), 20) == 0
    (first, early), (second, late) = seen
    assert (first, second) == ("first", "second") and late - early > 0.2


def test_time_limit_ends_the_whole_group(tmp_path):
    """The grandchild ignores SIGTERM and holds the pipe open: what a blocked read would wait for, for ever."""
    pid = tmp_path / "pid"
    grandchild = ("import os, signal, time; signal.signal(15, signal.SIG_IGN)\n"
                  f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}]); time.sleep(60)"
    started = time.monotonic()
    assert run_child([sys.executable, "-c", code], print, timeout_s=2.0, grace_s=0.5) is None
    assert time.monotonic() - started < 10
    assert ended(int(pid.read_text()))


def ended(pid: int) -> bool:
    """Gone, or a zombie that its new parent has yet to collect."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_threads_sleep_while_they_wait_but_where_time_is_measured(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert {stage for stage in STAGES if "OMP_WAIT_POLICY" not in stages.environment(stage)} == {"profile", "benchmark"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert stages.environment("distill")["OMP_WAIT_POLICY"] == "active", "the user's own word counts"


def test_a_busy_machine_is_said_before_the_first_stage(monkeypatch):
    said = []
    monkeypatch.setattr(compress, "prepare", lambda *_: compress.Plan("quick", {"data": ()}, {"data"}))
    monkeypatch.setattr(compress, "run_stages", lambda *_: said.append("stages") or Failed(message="as planned"))
    monkeypatch.setattr(compress, "say", said.append)
    monkeypatch.setattr(compress.load, "warning", lambda: "1.9 of 2 CPUs are busy with other work")
    compress.bring_up_to_date(None, None, 1.0)
    assert said[1:] == ["1.9 of 2 CPUs are busy with other work", "stages"]


def test_interruption_ends_the_child(monkeypatch):
    started = []
    original = subprocess.Popen.wait

    def interrupted(self, timeout=None):
        if not started:
            started.append(self)
            raise KeyboardInterrupt
        return original(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", "import time; time.sleep(60)"], print, 60, grace_s=1)
    assert started[0].poll() is not None


# ---- the screen

class Terminal(io.StringIO):
    def isatty(self):
        return True


def record(line, **extra):
    return logging.makeLogRecord({"msg": line, "levelno": logging.INFO, **extra})


def test_bars_move_in_place_on_a_terminal_only():
    lines = ["wrote 1", BAR, BAR.replace("25/", "26/"), "done"]
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        screen = Screen(stream)
        for line in lines:
            screen.emit(record(line, **{SHOWN: True}))
    assert file.getvalue() == "".join(f"{line}\n" for line in lines)
    assert terminal.getvalue() == f"wrote 1\n\r\x1b[K{BAR}\r\x1b[K{BAR.replace('25/', '26/')}\r\x1b[Kdone\n"


def test_framework_messages_are_not_shown():
    stream = io.StringIO()
    Screen(stream).emit(record("Finished in state Completed()"))
    assert stream.getvalue() == ""


def test_bars_are_recognised_as_progress_writes_them():
    from flows.screen import is_progress
    from tasks.core.progress import format_line
    assert is_progress(format_line("fid: dense", 3, 10, 2.0)) and not is_progress("kept [3] of 4/5")


# ---- a stage

def test_a_stage_runs_then_is_fresh(toy):
    assert freshness.dag() == {"one": (), "two": ("one",), "three": ("two",)}
    assert freshness.to_run(freshness.dag()) == {"one", "two", "three"}
    assert run("one").name == "Completed"
    assert toy == ["one"]
    assert freshness.to_run({"one": ()}) == set()
    assert run("one").name == "Cached"


def test_only_what_a_change_can_reach_is_run(toy, tmp_path):
    assert all(run(stage).is_completed() for stage in ("one", "two", "three"))
    assert freshness.to_run(freshness.dag()) == set()
    (tmp_path / "two.py").write_text(WRITES.format("two", 2))
    assert freshness.to_run(freshness.dag()) == {"two", "three"}
    assert freshness.to_run(freshness.dag("one")) == set()


def test_timing_anew_runs_what_is_fresh_and_all_that_reads_it(toy, tmp_path, monkeypatch):
    """What was timed elsewhere is no reason for DVC to run: it is forced, by name."""
    assert all(run(stage).is_completed() for stage in ("one", "two", "three"))
    monkeypatch.setattr(compress.machine, "TIMED", ("two",))
    monkeypatch.setattr(compress, "validate_all", lambda: {"scale": "quick", "cluster": CLUSTER})
    monkeypatch.setattr(freshness, "check_paths", lambda params: None)
    assert compress.prepare().stale == set()
    plan = compress.prepare(retime=True)
    assert (plan.stale, plan.forced) == ({"two", "three"}, ("two",))
    assert stages.command("two", force=True)[-2:] == ["-f", "two"]
    assert stages.run_stage.fn("two", 60.0, force=True).name == "Completed"  # neither fresh nor from the run cache


def test_what_changed_behind_a_runs_back_is_told_at_its_end(toy, tmp_path, monkeypatch):
    """Stage two is done when its code changes: what came after it was not made from what it would make now."""
    assert all(run(stage).is_completed() for stage in ("one", "two", "three"))
    monkeypatch.setattr(compress, "validate_all", lambda: {"scale": "quick", "cluster": CLUSTER})
    monkeypatch.setattr(freshness, "check_paths", lambda params: None)
    monkeypatch.setattr(compress, "run_stages", lambda *_: (tmp_path / "two.py").write_text("#") and Completed())
    state = compress.bring_up_to_date(None, None, 1.0)
    assert state.is_failed() and "changed while this ran: two, three would run anew" in state.message


def test_an_unknown_last_stage_is_named(toy):
    with pytest.raises(ValueError, match="until: 'four' is not one of one, two, three"):
        freshness.dag("four")


def test_failure_is_the_stages_last_word_and_its_results_come_back(toy, tmp_path):
    assert run("one").is_completed()
    complaint = "params.yaml: one.x: 5 is not between 0 and 1"
    (tmp_path / "one.py").write_text(f"import sys; print('so far'); sys.exit('error: {complaint}')")
    state = run("one")
    assert state.is_failed() and state.message == f"one: {complaint}"
    assert (tmp_path / "artifacts/one/x").read_text() == "1"
    assert (tmp_path / "reports/one.json").read_text() == '{"a": {"b": 1}}'


def put_back_after(damage=lambda: None) -> str | None:
    """What is said when stage one, which succeeded, fails once DVC has deleted its outs and `damage` was done to the cache."""
    assert run("one").is_completed()
    damage()
    shutil.rmtree("artifacts/one")
    Path("reports/one.json").unlink()
    return freshness.put_back("one", stood=True)


def cached(text: str) -> Path:
    """The file of DVC's cache that holds `text`."""
    return next(p for p in Path(".dvc/cache/files").rglob("*") if p.is_file() and p.read_text() == text)


@pytest.mark.parametrize("links", ["copy", "hardlink", "symlink"])
def test_what_comes_back_is_checked_whatever_links_the_cache_has(toy, links):
    Path(".dvc/config").write_text(f"[core]\n    analytics = false\n[cache]\n    type = {links}\n")
    assert put_back_after() is None
    assert Path("artifacts/one/x").read_text() == "1"
    assert Path("artifacts/one/x").is_symlink() == (links == "symlink")


@pytest.mark.parametrize("damage, said", [
    (lambda: cached("1").unlink(), "artifacts/one is missing"),
    (lambda: cached('{"a": {"b": 1}}').unlink(), "reports/one.json is missing"),
    (lambda: shutil.rmtree(".dvc/cache"), "artifacts/one is missing, reports/one.json is missing"),
    (lambda: (cached("1").chmod(0o644), cached("1").write_text("2")), "artifacts/one is not what it was")],
    ids=["a file", "the report", "all of it", "a flipped bit"])
def test_what_the_cache_lacks_is_said(toy, damage, said):
    assert f"one: the previous result could not be put back ({said}; " in put_back_after(damage)


def test_a_disk_that_fills_up_while_a_stages_outs_are_gone_is_said(toy, monkeypatch):
    """DVC's checkout says nothing, and leaves nothing."""
    said = []
    monkeypatch.setattr(stages, "say", said.append)
    Path("artifacts").mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "artifacts"]
    if subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        Path("one.py").write_text(WRITES.format("one", 1) + "pathlib.Path('artifacts/one/y').write_text('1' * 30_000)\n")
        assert run("one").is_completed()
        Path("one.py").write_text("open('artifacts/ballast', 'w').write('0' * 50_000); import sys; sys.exit('error: no')")
        assert run("one").message == "one: no"
        assert "one: the previous result could not be put back (artifacts/one is missing; 0 MB are free)" in said[-1]
        assert not Path("artifacts/one").exists() and Path("reports/one.json").exists()
    finally:
        subprocess.run(["umount", "--lazy", "artifacts"], check=True)


def test_nothing_is_missed_that_was_not_there(toy):
    """A fresh clone: dvc.lock knows a result whose files are nowhere."""
    assert "could not be put back" in put_back_after(lambda: shutil.rmtree(".dvc/cache"))
    assert freshness.put_back("one", stood=False) is None


def test_the_hash_of_what_is_there_is_dvcs_own(toy):
    Path("one.py").write_text(WRITES.format("one", 1) + "pathlib.Path('artifacts/one/a b').mkdir()\n"
                              "for name in ('Z', 'a b/é', 'a-'): pathlib.Path('artifacts/one', name).write_text(name)\n")
    assert run("one").is_completed()
    outs = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["one"]["outs"]
    assert {out["path"]: out["md5"] for out in outs} == {name: freshness.dvc_md5(Path(name))
                                                         for name in ("artifacts/one", "reports/one.json")}


def test_a_missing_dependency_is_named(toy):
    state = run("two")
    assert state.is_failed() and "artifacts/one" in state.message and "\n" not in state.message


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])  # DVC runs commands under $SHELL; dash adds a line "Killed"
def test_a_stage_that_a_signal_ended_is_worth_another_try(toy, tmp_path, monkeypatch, shell):
    monkeypatch.setenv("SHELL", shell)
    (tmp_path / "one.py").write_text("import os; print('step 3', flush=True); os.kill(os.getpid(), 9)")
    state = run("one")
    assert state.name == stages.KILLED and "step 3" in state.message
    assert stages.worth_another_try(None, None, state)


def test_a_stage_over_its_time_is_stopped_and_not_tried_again(toy, tmp_path):
    (tmp_path / "one.py").write_text("import time; time.sleep(60)")
    started = time.monotonic()
    state = run("one", timeout_s=6)
    assert state.name == "TimedOut" and time.monotonic() - started < 30
    assert not stages.worth_another_try(None, None, state)


def test_numbers_become_rows():
    assert stages.rows({"a": {"b": 1, "c": 2.5}, "d": None}) == [
        {"number": "a.b", "value": 1}, {"number": "a.c", "value": 2.5}, {"number": "d", "value": None}]


# ---- the preflight, and the night

def test_scale_changes_one_line_of_params(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "goal:\n  scale: no  # not this one\nscale: quick              # quick | full\n"
    (tmp_path / "params.yaml").write_text(text)
    compress.set_scale("full")
    assert (tmp_path / "params.yaml").read_text() == text.replace("scale: quick", "scale: full")
    with pytest.raises(ValueError, match="did you mean full"):
        compress.set_scale("ful")
    (tmp_path / "params.yaml").write_text("scale: 'quick'\n")
    compress.set_scale("full")
    assert (tmp_path / "params.yaml").read_text() == "scale: full\n"
    (tmp_path / "params.yaml").write_text("{scale: quick}\n")
    with pytest.raises(ValueError, match="params.yaml: no line `scale: quick`"):
        compress.set_scale("full")


def test_a_users_mistake_is_one_line_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("goal: {}\nscale: quik\n")
    assert compress.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: params.yaml") and error.count("\n") == 1


def test_a_lock_file_with_conflict_markers_is_one_line(toy, tmp_path, monkeypatch, capsys):
    (tmp_path / "dvc.lock").write_text("<<<<<<< ours\nschema: '2.0'\n=======\n>>>>>>> theirs\n")
    monkeypatch.setattr(compress, "validate_all", lambda: {"scale": "quick"})
    monkeypatch.setattr(freshness, "check_paths", lambda params: None)
    assert compress.main([]) == 2
    error = capsys.readouterr().err
    assert "dvc.lock" in error and error.count("\n") == 1


@pytest.mark.parametrize("half", ["", '{"artifacts/one": {"wri'])
def test_a_list_of_locks_that_a_kill_cut_short_stops_no_later_run(toy, tmp_path, half):
    locks = tmp_path / ".dvc/tmp/rwlock"
    assert run("one").is_completed()
    locks.write_text(half)
    assert "RWLock-file" in run("two").message, "DVC itself goes no further"
    with compress.one_at_a_time(print):
        assert run("two").is_completed()
    kept = '{"artifacts/one": {"write": null, "read": []}}'
    locks.write_text(kept)
    freshness.clear_broken_lock()
    assert locks.read_text() == kept


def test_files_that_did_not_reach_the_cache_are_no_success(toy):
    line = f"{stages.NOT_CACHED}'0a1b' - [Errno 28] No space left on device: 'a' -> 'b'"
    state = stages.done("one", ["wrote 1", line], 1.0)
    assert state.is_failed() and "1 of its files did not get into DVC's cache ([Errno 28] No space" in state.message


def test_the_second_run_waits_for_the_first_and_changes_nothing_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "params.yaml").write_text("scale: quick\n")
    seen = []
    code = ("import fcntl, time; lock = open('runs/run.lock', 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
            "print('held', flush=True); time.sleep(1)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        monkeypatch.setattr(compress, "validate_all", lambda: seen.append(first.wait(10)) or {})
        monkeypatch.setattr("builtins.print", lambda line, **_: seen.append((line, Path("params.yaml").read_text())))
        with pytest.raises(KeyError):  # of {}, which is not looked at before the lock is had
            compress.run(compress.argparse.Namespace(scale="full", retime=False), None)
    (line, params), status = seen
    assert "waiting" in line and params == "scale: quick\n" and status == 0
    assert (tmp_path / "params.yaml").read_text() == "scale: full\n"


def test_a_closed_gate_says_why():
    good = {"met": True}
    assert nightly.gates(good, {"compressed": {}}) == []
    assert len(nightly.gates({"met": False}, {})) == 2
    assert nightly.gates(good | {"worth_compressing": True}, {"compressed": {}}) == []
    assert nightly.gates(good | {"worth_compressing": False}, {"compressed": {}}) == [
        "the teacher is not worth compressing: see the first line of the report"]


@pytest.mark.parametrize("met", [True, False])
def test_the_night_judges_before_it_pushes_and_a_failed_push_loses_nothing(tmp_path, monkeypatch, met):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts/package/compressed").mkdir(parents=True)
    (tmp_path / "artifacts/package/manifest.json").write_text("{}")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/report.json").write_text(json.dumps({"met": met}))
    (tmp_path / "reports/fid.json").write_text(json.dumps({"compressed": {}}))
    monkeypatch.setattr(nightly, "validate", lambda folder: folder)
    monkeypatch.setattr(nightly, "bring_up_to_date", lambda *_: Completed())
    monkeypatch.setattr(freshness, "has_remote", lambda: True)

    def refused(*_):
        with pytest.raises(BlockingIOError), open("runs/run.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise RuntimeError("dvc push: no route to host")

    monkeypatch.setattr(freshness, "exchange", refused)
    with disable_run_logger():
        state = nightly.nightly.fn()
    assert state.is_failed() and "no route to host" in state.message
    assert state.message.startswith("Promoted" if met else "NotPromoted")
    assert Path("runs/promoted/current").exists() == met


def test_promotion_is_whole_and_happens_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "artifacts/package"
    (package / "compressed").mkdir(parents=True)
    (package / "compressed/recipe.json").write_text("{}")
    (package / "manifest.json").write_text("{}")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/fid.json").write_text("{}")
    first = nightly.promote(package, tmp_path / "promoted")
    again = nightly.promote(package, tmp_path / "promoted")
    assert first == again and (tmp_path / "promoted/current").resolve() == first
    assert sorted(p.name for p in first.iterdir()) == ["recipe.json", "report_fid.json"]
    (package / "manifest.json").write_text('{"files": {}}')
    newer = nightly.promote(package, tmp_path / "promoted")
    assert newer != first and first.exists() and (tmp_path / "promoted/current").resolve() == newer


@pytest.mark.parametrize("command, said", [
    ("fetch", "error: dvc fetch: no route"),
    ("push", "error: what the search has found stays here: dvc push: no route")])
def test_a_job_whose_remote_is_away_ends_in_one_line(tmp_path, monkeypatch, capsys, command, said):
    def exchange(asked, *_):
        if asked == command:
            raise RuntimeError(f"dvc {asked}: no route")

    monkeypatch.setenv(search.INSIDE, "null")  # so that it is taken back
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(freshness, "has_remote", lambda: True)
    monkeypatch.setattr(freshness, "exchange", exchange)
    monkeypatch.setattr(search, "main", lambda arguments, until: 0)
    assert search.entry(["--job"]) == 1
    assert capsys.readouterr().err.strip() == said
