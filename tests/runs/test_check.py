"""The command that says what a game offers: on games whose answers are known."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

import main
from tests.runs.test_odd_runs import Moody, moody

__all__ = ["moody"]  # a fixture: registers Moody-v0 and goes to an empty folder


def test_a_tiny_game_is_described_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["check", "env=Count-v0", "size=toy"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "2 actions, its observation as 64x64", "64x64 pixels", "EVEN, ODD", "1: EVEN, 2: ODD",
        "20 ended within 400 random steps (20 by game over), after 20 steps", "within 400 random steps, of 1",
        "yes: the same frames and rewards from the same seed",
    ):  # fmt: skip
        assert words in said, words
    shown = cv2.imread("runs/out/check-Count-v0.png")
    assert shown is not None and shown.shape == (2 * (210 + 16), 5 * (210 + 16), 3)
    assert shown.std() > 10


def test_what_is_strange_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Moody.lasts = None
    assert main.main(["check", "env=Moody-v0", "size=toy", "game.size=16"]) == 0
    assert "no: from step" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    Moody.lasts = 2
    monkeypatch.setattr(Moody, "picture", lambda self: np.zeros((16, 16, 3), np.uint8))
    assert main.main(["check", "env=Moody-v0", "size=toy", "game.size=16"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "The picture never changes" in said and "hardly anything to dream" in said
    Moody.played, Moody.fails_at = 0, 150
    assert main.main(["check", "env=Moody-v0", "size=toy", "game.size=16"]) == 2
    assert "Moody-v0 failed in step" in capsys.readouterr().err
    assert main.main(["check", "env=Moooody-v0"]) == 2
    assert "Did you mean Moody-v0?" in capsys.readouterr().err
    assert [path.name for path in Path("runs/out").iterdir()] == ["check-Moody-v0.png"]
