"""The measuring command with made-up steps: rows are kept as they are taken, and a run goes on where it was stopped."""

import subprocess

import pytest

from benchmarks.results import read, write
from benchmarks.spine.measure import (
    AUTHOR,
    COLUMNS,
    STEPS,
    Step,
    execute,
    head,
    killed_in,
    locked_outs,
    measure_all,
    processes_in,
    same_outs,
    timed,
)

MACHINE = {"cpu": "Example CPU", "cores": 2}
LOCK = """
schema: '2.0'
stages:
  data: {cmd: x, outs: [{path: artifacts/data, md5: DATA}]}
  distill:
    cmd: x
    deps: [{path: artifacts/profile, md5: DEP}]
    outs: [{path: artifacts/distill, md5: b}, {path: r.json, md5: c}]
"""


@pytest.fixture
def source(tmp_path):
    """A repository with one commit."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "file").write_text("content")
    for command in (["init", "--quiet"], ["add", "file"], [*AUTHOR, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def steps(calls, fail=()):
    def step(variant, metric, value):
        def measure(work):
            calls.append(metric)
            if metric in fail:
                raise ValueError("stopped")
            return value
        return Step(variant, metric, measure, f"how {metric} is measured")

    return [step("first", "a_s", 1.234), step("second", "a_s", 2.0), step("", "same_outs", {"data": 1.0, "distill": 0.0})]


def test_each_clone_is_of_the_commit_and_each_row_says_so(source, tmp_path):
    results, commit = tmp_path / "results.csv", head(source)
    measure_all(steps([]), commit, MACHINE, tmp_path / "work", results, source)
    assert (tmp_path / "work" / "second" / "file").read_text() == "content"
    rows = read(results)
    assert [(row["variant"], row["metric"], row["value"]) for row in rows] == [
        ("first", "a_s", "1.23"), ("second", "a_s", "2.0"), ("data", "same_outs", "1.0"), ("distill", "same_outs", "0.0")]
    assert rows[0]["machine"] == "2 cores, Example CPU"
    assert rows[0]["protocol"] == f"how a_s is measured; commit {commit}"


def test_it_goes_on_where_it_was_stopped(source, tmp_path):
    results, commit, calls = tmp_path / "results.csv", head(source), []
    with pytest.raises(ValueError, match="stopped"):
        measure_all(steps(calls, fail=["same_outs"]), commit, MACHINE, tmp_path / "work", results, source)
    measure_all(steps(calls), commit, MACHINE, tmp_path / "work", results, source)
    assert calls == ["a_s", "a_s", "same_outs", "same_outs"]
    assert len(read(results)) == 4


def test_new_clones_start_afresh_and_keep_other_machines(source, tmp_path):
    results, calls = tmp_path / "results.csv", []
    other = {"machine": "another", "variant": "first", "seed": 0, "metric": "a_s", "value": 9, "protocol": "x; commit y"}
    write(results, [other], COLUMNS)
    for name in ("work", "elsewhere"):
        measure_all(steps(calls), head(source), MACHINE, tmp_path / name, results, source)
    assert calls == ["a_s", "a_s", "same_outs"] * 2
    assert [row["machine"] for row in read(results)] == ["another", *["2 cores, Example CPU"] * 4]


def test_outs_are_compared_not_what_they_were_made_from(tmp_path):
    for clone, dep in (("first", "p"), ("second", "q")):
        (tmp_path / clone).mkdir()
        (tmp_path / clone / "dvc.lock").write_text(LOCK.replace("DEP", dep))
    assert same_outs(tmp_path) == {"data": 1.0, "distill": 1.0}
    (tmp_path / "second" / "dvc.lock").write_text(LOCK.replace("DATA", "other"))
    assert same_outs(tmp_path) == {"data": 0.0, "distill": 1.0}
    assert locked_outs(tmp_path / "first" / "dvc.lock")["distill"] == {"artifacts/distill": "b", "r.json": "c"}


def test_a_command_that_fails_is_no_measurement(tmp_path):
    clone = tmp_path / "first"
    clone.mkdir()
    with pytest.raises(ValueError, match="exit status 3; its output is at the end of .*log.txt"):
        timed(("sh", "-c", "echo why >&2; exit 3"), clone)
    assert (tmp_path / "log.txt").read_text() == "$ sh -c echo why >&2; exit 3\nwhy\n"


def test_every_stage_is_killed_once_with_all_that_it_started(tmp_path):
    """The stages here are seconds of sleep in a child of their own group; what was run to its end is not run again."""
    clone, killed = tmp_path / "first", []
    clone.mkdir()
    (tmp_path / "log.txt").write_text("─" * 200 + "\n")  # three bytes a character, as of an earlier run's table
    script = ('for s in data fid; do [ -e $s ] && continue; echo "$s: running"; '
              'setsid -w sh -c "echo >> $s.started; sleep 1.5; touch $s"; done')
    while (stage := killed_in(("sh", "-c", script), clone, killed, {"data": 1.0, "fid": 1.0})) is not None:
        assert not processes_in(clone)
        killed.append(stage)
    assert killed == ["data", "fid"]
    assert [(clone / f"{stage}.started").read_text().count("\n") for stage in killed] == [2, 2]


def test_a_killed_run_that_then_fails_is_no_measurement(tmp_path):
    (tmp_path / "first").mkdir()
    with pytest.raises(ValueError, match="exit status 3"):
        killed_in(("sh", "-c", "exit 3"), tmp_path / "first", (), {})


def test_a_clone_runs_in_its_own_environment(tmp_path):
    clone = tmp_path / "first"
    clone.mkdir()
    assert execute(("sh", "-c", "echo $PATH"), clone).startswith(str(clone / ".venv" / "bin"))


def test_a_folder_without_commits_is_named(tmp_path):
    with pytest.raises(ValueError, match="a commit is what gets cloned"):
        head(tmp_path)


def test_each_step_finds_what_the_one_before_it_left():
    order = [step.metric for step in STEPS if step.variant == "first"]
    assert order == ["make_test_s", "make_run_s", "make_run_again_s", "noop_repro_s", "clean_after_noop", "checkout_restores"]
    assert STEPS[-1].metric == "same_outs"
