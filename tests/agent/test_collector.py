"""Random play takes over for a while now and then, and whoever follows the game is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.collector import BURST, HOLDS, Collector
from agent.replay import Replay
from agent.replay_config import ReplayConfig
from envs.games import GameConfig
from envs.make import make_games
from envs.tiny import register
from tests.opened import opened


class Left:
    """Plays the first action for ever."""

    def __init__(self) -> None:
        self.told: list[np.ndarray] = []

    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        self.told.append(np.zeros(len(frames), np.int64))
        return self.told[-1]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def took(self, actions: np.ndarray) -> None:
        self.told[-1] = actions


def played(bursts: float, steps: int = 2_000, rows: int = 8) -> np.ndarray:
    """The actions (steps, rows) of a run of Catch, as the player was told them and as the replay has them."""
    register()
    games = opened(make_games("Catch-v0", GameConfig(), rows))
    player, replay = Left(), Replay(None, games.spec, ReplayConfig(), seed=0)
    collector = Collector(games, replay, player, seed=0, bursts=bursts)  # type: ignore[arg-type]
    kept = np.concatenate([episode.action[: len(episode)] for episode in collector.collect(steps * rows)])
    told = np.array(player.told)
    assert abs((kept != 0).mean() - (told != 0).mean()) < 0.03  # episodes under way are not among the kept
    return told


@pytest.mark.parametrize("what", ["frame", "reward"])
def test_a_game_that_goes_another_way_when_it_is_played_again_is_left_out(what: str, tmp_path: Path) -> None:
    register()
    games = opened(make_games("Count-v0", GameConfig(size=16), 2))
    collector = Collector(games, Replay(tmp_path, games.spec, ReplayConfig(), seed=0), Left(), seed=0)  # type: ignore[arg-type]
    collector.collect(20)
    state, known = collector.state_dict(), collector.replay.state_dict()
    collector.load_state_dict(state, known)
    assert len(collector.replay.open()) == 2 and not collector.replay.skipped
    known["open"][1][what] = known["open"][1][what] + 7
    collector.load_state_dict(state, known)
    assert not collector.replay.open() and "went another way" in collector.replay.skipped[0]
    collector.collect(4)
    assert len(collector.replay.open()) == 2, "new ones begin"


def test_a_share_of_the_steps_is_random_for_a_while_each_time() -> None:
    actions = played(0.2)
    assert (actions != 0).mean() == pytest.approx(0.2 * 2 / 3, abs=0.03)  # of three actions, all alike
    assert set(np.unique(actions)) == {0, 1, 2}
    quiet = [len(run) for row in actions.T for run in "".join("x" if one else " " for one in row).split("x") if run]
    assert np.median(quiet) < 4, "within a burst the player's action seldom comes often in a row"
    assert max(quiet) > 2 * BURST, "and bursts lie apart"


def test_without_bursts_the_player_plays() -> None:
    assert not played(0.0, steps=200).any()
    assert played(0.9, steps=200).any(0).all()


@pytest.mark.parametrize("env", ["Catch-v0", "CatchContinuous-v0"])
def test_random_play_holds_its_actions_in_some_rows_and_not_in_others(env: str) -> None:
    register()
    games = opened(make_games(env, GameConfig(size=16), len(HOLDS) + 1))
    replay = Replay(None, games.spec, ReplayConfig(), seed=0)
    collector = Collector(games, replay, Left(), seed=0)  # type: ignore[arg-type]
    taken = np.array([collector._random().copy() for _ in range(4_000)])
    taken = taken.reshape(4_000, len(HOLDS) + 1, -1)[..., 0]
    kinds = games.spec.action_size if games.spec.discrete else np.inf  # by chance a new one may be the old one
    changes = (taken[1:] != taken[:-1]).mean(0) / (1 - 1 / kinds)
    assert changes == pytest.approx([1 / hold for hold in (*HOLDS, HOLDS[0])], abs=0.03)
