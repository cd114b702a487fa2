"""Runs side by side: processes of their own, whose logs are told, and which end in good order."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from runs.cli import side_by_side

PROGRAM = """
import os, pathlib, signal, sys, time
kind, place = sys.argv[1], pathlib.Path(sys.argv[2])
(place / f"{kind}.begun").touch()
print("first line", flush=True)
if kind == "fails":
    sys.exit("the reason why")
if kind == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "waits":
    def end(*_):
        time.sleep(0.3)
        (place / "saved").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, end)
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(side_by_side, "PROGRAM", tmp_path / "program.py")
    monkeypatch.setattr(side_by_side, "LOOK", 0.02)
    return tmp_path


def test_one_that_fails_is_told_and_the_others_go_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = side_by_side.run({name: [name, str(place)] for name in ("fails", "ends", "ends too")}, 1, place)
    assert failed == [1]
    said = capsys.readouterr().out
    assert "fails: failed: the reason why" in said and "ends: finished" in said and "ends too: finished" in said
    assert (place / "ends.log").read_text() == "first line\n"
    assert said.index("fails: failed") < said.index("ends: begun")  # one at a time


def test_ctrl_c_is_passed_on_and_waited_for(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "TELL", 0.05)

    def interrupt() -> None:
        while "at work" not in (place / "waits.log").read_text():
            pass
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    (place / "waits.log").touch()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        side_by_side.run({"waits": ["waits", str(place)], "later": ["later", str(place)]}, 1, place)
    assert (place / "saved").exists() and not (place / "later.begun").exists()
    assert "waits: at work" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_what_a_signal_ended_is_not_told_as_its_last_words(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    side_by_side.run({"killed": ["killed", str(place)]}, 1, place)
    assert "killed: ended by signal 9, after: first line" in capsys.readouterr().out


def test_nobody_is_left_behind_when_the_output_has_no_reader(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*words: object, **_: object) -> None:
        while "at work" not in (place / "waits.log").read_text():
            pass
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(BrokenPipeError):
        side_by_side.run({"waits": ["waits", str(place)]}, 1, place)
    assert (place / "saved").exists()
