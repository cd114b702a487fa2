"""What is decided for a person who did not say: the size by the device, endings by the protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import main
from agent.collector import Collector
from agent.evaluate import evaluate_policy
from agent.replay import Replay, ReplayConfig
from envs import PROTOCOLS, GameConfig
from envs.make import make_games
from runs.cli import commands, compose
from runs.config import Config
from tests.opened import opened


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What would have been trained."""
    calls: list[Config] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "train", lambda config, folder: calls.append(config))
    return calls


@pytest.mark.parametrize(("device", "size"), [("cpu", "xs"), ("cuda", "s")])
def test_a_size_that_the_device_chose_is_said_in_one_line(
    device: str, size: str, trained: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compose, "choose_device", lambda name: device)
    assert main.main(["env=Catch-v0"]) == 0
    said = capsys.readouterr().out
    if size == "xs":  # that of the published results: the run's own first line names it
        assert not said
    else:
        assert said.count("\n") == 1 and said.startswith(f"size={size} was chosen by the device")
        assert "the published results are of size=xs" in said
    assert main.main(["env=Catch-v0", "size=s"]) == 0
    assert main.main(["--cfg", "job", "env=Catch-v0"]) == 0
    assert "chosen by the device" not in capsys.readouterr().out, "what was given, and YAML that somebody may read on"
    assert [config.size for config in trained] == [size, "s"]


def test_atari100k_ends_at_a_lost_life_unless_a_person_says_otherwise(trained: list[Config]) -> None:
    for words in (["protocol=atari100k"], ["game.life_loss=false", "protocol=atari100k"], []):
        assert main.main([*words, "size=toy"]) == 0
    assert [config.game.life_loss for config in trained] == [True, False, False]


class Held:
    """Plays noise that is the same for the same step."""

    def __init__(self) -> None:
        self.steps = 0

    def act(self, frames: np.ndarray, fresh: np.ndarray) -> np.ndarray:
        self.steps += 1
        return np.random.default_rng(self.steps // 4).integers(0, 4, len(frames))


def test_a_run_under_atari100k_learns_five_endings_of_a_game_and_counts_one_return() -> None:
    found = []
    for life_loss in (True, False):
        config = GameConfig(**{**PROTOCOLS["atari100k"], "life_loss": life_loss})
        games = opened(make_games("ALE/Breakout-v5", config, 1))
        replay = Replay(None, games.spec, ReplayConfig(), seed=0)
        collector = Collector(games, replay, Held(), seed=1)  # type: ignore[arg-type]
        found.append(next(ended for ended in (collector.collect(50) for _ in range(40)) if ended)[0])
    lives, whole = found
    assert (lives.terminated.sum(), whole.terminated.sum()) == (5, 1) and lives.terminated[-1]
    assert lives.score == whole.score > 0 and len(lives) == len(whole)


def test_an_evaluation_under_atari100k_plays_whole_games() -> None:
    """Breakout has five lives: the same games, returns and lengths with endings at each and without."""
    found: list[tuple[Any, ...]] = []
    for life_loss in (True, False):
        settings = {**PROTOCOLS["atari100k"], "life_loss": life_loss}
        found.append(
            evaluate_policy(Held(), opened(make_games("ALE/Breakout-v5", GameConfig(**settings), 2)), 3, seed=0)[:2]
        )
    assert found[0] == found[1]
    assert min(found[0][1]) > 100, "a single life is shorter"
