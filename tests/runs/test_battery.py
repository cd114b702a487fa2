"""The battery (`python -m tests.battery`) at a hundredth: it finds nothing, and it can find something."""

from __future__ import annotations

from pathlib import Path

import pytest

from envs.episode import Episode
from tests import trained
from tests.battery import damage, words
from tests.battery.report import Report


def test_command_lines_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "WHOLE", 0)
    monkeypatch.chdir(tmp_path)
    trained.make(tmp_path / "runs/out/toy")
    report = Report(quiet=True)
    told = words.lines(15, 2, report)
    assert report.faults == [] and set(told["exit_codes"]) == {"0", "2"}


def test_no_absurd_value_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = Report(quiet=True)
    words.absurd(6, 1, report)
    assert report.faults == [] and words.undeclared() == ["game.size"], "which is also 84x64"


def test_damaged_files_are_sentences(tmp_path: Path) -> None:
    report = Report(quiet=True)
    told = damage.measure(12, 3, tmp_path, report)
    assert report.faults == [] and len(told) == 9
    assert all(row["damages"] == 12 for row in told.values())


def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that reads what it finds, and one that takes every word."""
    known = Episode.load
    monkeypatch.setattr(Episode, "load", staticmethod(lambda path: known(tmp_path / "other.npz")))
    report = Report(quiet=True)
    made = trained.make(tmp_path / "source")
    episode = known(made / "episodes/000000.npz")
    episode.save(tmp_path / "other.npz")
    damage.measure(2, 0, tmp_path / "damaged", report, only="episode")
    assert report.faults == [], "whatever the file holds, the right episode"
    episode.reward[0] += 1
    kind = damage.Kind(tmp_path / "other.npz", lambda: damage._same_episode(tmp_path / "other.npz", episode))
    assert damage._outcome("episode", kind, b"damaged", b"whole", report) == "silently wrong"
    assert words._unlike(["seed=5"], [trained.small("Catch-v0")]) == "seed is 7, asked for was '5'"
