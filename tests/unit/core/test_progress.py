"""Progress that carries more than a count."""

from tasks.core import progress
from tasks.core.progress import format_line, track


def test_a_note_stands_behind_the_line():
    assert format_line("evolve", 5, 10, 2.5, "best 1.2").endswith("5/10  2.0/s  ETA 0:02  best 1.2")
    assert format_line("evolve", 5, 10, 2.5).endswith("ETA 0:02")


def test_a_note_is_asked_for_only_when_a_line_is_written(monkeypatch, capsys):
    """Four items of two seconds each, a line every five seconds."""
    clock = iter([0.0, 2.0, 4.0, 6.0, 8.0, 8.0, 8.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("DIFFPRESS_PROGRESS_S", "5")
    asked, told = [], []
    for item in track(range(4), 4, "t", note=lambda: asked.append(len(told)) or "so far"):
        told.append(item)
    assert asked == [3], "with all that was told until then"
    assert capsys.readouterr().out.splitlines() == [
        "t [##################------] 3/4  2.0 s each  ETA 0:02  so far", "t: 4 done in 8 s"]
