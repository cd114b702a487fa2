"""The models that ship play as well as is published beside them, in the real game."""

from __future__ import annotations

import json
import math

import pytest
import torch

from agent.evaluate import evaluate_policy
from agent.player import Player
from envs.make import make_games
from runs import dreams

EPISODES = 8


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chance"), [("pong", -20), ("kungfumaster", 300)])
def test_the_published_score_holds(name: str, chance: float) -> None:
    """Within four standard errors of the mean of so many episodes, by the published spread; chance plays far below."""
    loaded = dreams.load_parts(name)
    told = json.loads(dreams.PRETRAINED.with_name(f"{name}.json").read_text())["score"]
    assert told["policy"] == "sampled" and told["episodes"] == len(told["returns"]) >= 100
    assert told["mean"] == sum(told["returns"]) / told["episodes"]
    games = make_games(loaded.config.env, loaded.config.game, EPISODES)
    torch.manual_seed(0)
    try:
        found = evaluate_policy(Player(loaded.agent), games, EPISODES, seed=loaded.config.seed).summary()
    finally:
        games.close()
    error = 4 * told["std"] / math.sqrt(EPISODES)
    assert abs(float(found["mean"]) - told["mean"]) < error, found  # type: ignore[arg-type]
    assert told["mean"] - error > chance
