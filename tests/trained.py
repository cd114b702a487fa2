"""A run that has played a little and was saved as every run is, for tests of what is made of runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from envs.make import make_games
from runs import build
from runs.cli import commands
from runs.config import Config
from runs.folder import pretrained
from runs.folder.run import Run
from runs.recipes import RECIPES

STEPS = 400


def small(env: str, recipe: str = "reverie") -> Config:
    config = RECIPES[recipe]("toy")
    return replace(config, env=env, game=replace(config.game, num_envs=2), seed=7)


def make(folder: Path, recipe: str = "reverie", gray: bool = False, **model: Any) -> Path:
    """The folder of a new run of Catch with a checkpoint and an evaluation; `model`: settings of the world model."""
    config = small("Catch-v0", recipe)
    config = replace(config, model=replace(config.model, **model), game=replace(config.game, gray=gray))
    run = Run.create(config, folder)
    games = make_games(config.env, config.game)
    loop = build.loop(config, games, run.episodes_folder)
    run.note(**commands.about(games))
    loop.collector.collect(STEPS, at_random=True)
    loop.save(run)
    step = {"env_steps": run.step, "hours": 0.1, "command": "python main.py evaluate"}
    run.result(
        "evaluation-sampled", {"policy": "sampled", "returns": [1.0], **dict.fromkeys(pretrained.SCORE, 1)} | step
    )
    path = run.folder / "results" / "evaluation-sampled.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"env_steps": run.step}))
    run.close()
    games.close()
    return run.folder


def copied(folder: Path, to: Path) -> Path:
    """The run without its recorded episodes."""
    for name in ("config.json", "meta.json"):
        (to / name).write_text((folder / name).read_text())
    (to / "checkpoints").mkdir()
    for path in (folder / "checkpoints").iterdir():
        (to / "checkpoints" / path.name).write_bytes(path.read_bytes())
    return to
