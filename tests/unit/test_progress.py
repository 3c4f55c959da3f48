"""Progress lines: the values that they show, in a log and in a terminal."""

from __future__ import annotations

import io
import threading

import pytest

from pipelines import progress, storage
from pipelines.progress import Bar, Line, StepProgress, follow, format_seconds, poll
from pipelines.storage import StorageError


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(("done", "filled", "left"), [(1, 2, "5:30"), (3, 8, "1:30")])
def test_a_bar_shows_share_note_and_time_left(clock, capsys, done, filled, left):
    with Bar("prepare laion") as bar:
        clock[0] += 30
        bar.update(done, 12, "rows 30 in")
        assert bar.seconds == 30
    shown = capsys.readouterr().err
    assert shown == f"prepare laion [{'#' * filled:.<30}] {done}/12  rows 30 in  left {left}\n"


def test_a_bar_that_just_began_has_lasted_a_little(clock):
    with Bar("x", quiet=True) as bar:
        assert bar.seconds == 1e-6


def test_a_log_gets_a_line_now_and_then_and_the_last_one(clock, capsys):
    with Bar("score") as bar:
        for done in range(1, 31):
            clock[0] += 1
            bar.update(done, 30)
    counts = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert counts == ["1/30", "11/30", "21/30", "30/30"]


def test_a_terminal_gets_one_line_that_changes(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    line = Line()
    line.show("a")
    line.show("b")
    line.show("b")
    assert capsys.readouterr().err == "\r\x1b[Ka\r\x1b[Kb", "at once, and only where it is new"
    line.show("b", last=True)
    assert capsys.readouterr().err == "\n"
    Line().show("", last=True)
    assert capsys.readouterr().err == "", "nothing was shown that could end"


def test_a_line_is_seen_at_once(clock, monkeypatch):
    seen = []

    class Stream(io.StringIO):
        def flush(self):
            seen.append(self.getvalue())

    monkeypatch.setattr(progress.sys, "stderr", Stream())
    Line().show("a")
    assert seen == ["a\n"]


def test_nothing_to_do_is_done(clock, capsys):
    with Bar("x") as bar:
        bar.update(0, 0)
    assert capsys.readouterr().err == f"x [{'#' * 30}] 0/0  left 0:00\n"


def test_quiet_says_nothing(capsys):
    with Bar("x", quiet=True) as bar:
        bar.update(1, 1)
    assert capsys.readouterr().err == ""


def test_steps_tell_what_is_left(clock):
    steps = StepProgress("stage 1", 10, 30)
    clock[0] += 20
    line = steps.line(20, 1.23456, 1e-4, 7.04, 0.125)
    assert line == ("stage 1: step 20/30  loss 1.235  lr 1.00e-04  7.0 samples/s  data wait 12%  left 0:20")


def test_poll_calls_once_more_at_the_end_whatever_happens():
    calls = []
    with poll(lambda: calls.append(1), every_s=60):
        assert calls == []
    assert calls == [1]
    with pytest.raises(KeyError), poll(lambda: calls.append(2), every_s=60):
        raise KeyError
    assert calls == [1, 2]


def test_poll_calls_until_the_end():
    calls, twice = [], threading.Event()

    def action():
        calls.append(threading.current_thread())
        if len(calls) == 2:
            twice.set()
        if len(calls) == 1:
            raise StorageError("away for a while")

    with poll(action, every_s=0.001):
        assert twice.wait(60)
    assert calls[0] is not threading.current_thread() is calls[-1] and not calls[0].is_alive()


def test_follow_shows_the_last_line_of_another_process(tmp_path, capsys):
    path = tmp_path / "progress.txt"
    path.write_text("old")
    with follow(str(path)):
        assert not path.exists(), "a line of an earlier run would mislead"
        path.write_text("step 7")
    assert capsys.readouterr().err.splitlines()[-1] == "step 7"


@pytest.mark.parametrize("root", ["local", "memory"])
def test_follow_reads_any_storage_and_ends_its_line(tmp_path, capsys, monkeypatch, root):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    asked, poll = [], progress.poll
    monkeypatch.setattr(progress, "poll", lambda action, every_s: asked.append(every_s) or poll(action, 60))
    place = str(tmp_path / "p.txt") if root == "local" else f"memory://followed/{tmp_path.name}"
    storage.write_atomically(place, b"old")
    with follow(place):
        assert not storage.exists(place)
        storage.write_atomically(place, b"step 7 caf\xe9")
    assert capsys.readouterr().err.endswith("\x1b[Kstep 7 caf\ufffd\n") and asked == [0.5 if root == "local" else 5.0]
    with follow(place + "-none", quiet=True):
        storage.write_atomically(place + "-none", b"step 8")
    assert capsys.readouterr().err == ""


def test_an_empty_line_is_not_shown_and_the_first_one_at_once(clock, capsys):
    clock[0] = 0.0
    line = Line(log_every_s=10)
    line.show("", last=True)
    line.show("a")
    assert capsys.readouterr().err == "", "ten seconds after the process began"
    clock[0] = 10.0
    line.show("a")
    line.show("a", last=True)
    assert capsys.readouterr().err == "a\n"


def test_what_polls_does_not_hold_up_the_end_of_the_process(monkeypatch):
    options, thread = [], progress.threading.Thread
    monkeypatch.setattr(progress.threading, "Thread", lambda **given: options.append(given) or thread(**given))
    with poll(lambda: None, every_s=60):
        pass
    assert options[0]["daemon"] is True


def test_the_first_step_tells_what_is_left(clock):
    steps = StepProgress("x", 10, 13)
    clock[0] += 4
    assert [steps.line(done, 1, 1, 1, 0).split("left ")[1] for done in (10, 11, 12, 13)] == [
        "0:12",
        "0:08",
        "0:02",
        "0:00",
    ]
