"""`game.size=48x32` through a whole run of the command line: trained, evaluated and filmed."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

import main
from runs.folder.run import Run

QUICK = "size=toy env=Catch-v0 threads=1 steps=440 train.prefill=400 train.pretrain=2 episodes=1"


SLOW = [pytest.param(f"{recipe} train.show_every=2", marks=pytest.mark.slow) for recipe in ("world_models_ac", "iris")]


@pytest.mark.parametrize("recipe", ["reverie", *SLOW])
def test_a_whole_run_with_frames_of_height_x_width(recipe: str, tmp_path: Path) -> None:
    folder, film = tmp_path / "run", tmp_path / "film.mp4"
    words = [*QUICK.split(), *f"recipe={recipe}".split(), "game.max_steps=20"]  # two rounds, the last with pictures
    assert main.main([*words, "game.size=48x32", f"hydra.run.dir={folder}"]) == 0
    assert Run.open(folder).config.game.frame_size == (48, 32)
    assert main.main(["play", f"run={folder}", f"record={film}", "steps=3", "device=cpu"]) == 0
    picture = cv2.VideoCapture(str(film)).read()[1]
    assert picture.shape[:2] == (240, 160), "five times as large"
