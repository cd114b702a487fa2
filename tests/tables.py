"""Tables of untrained toy models for the tests of play, with Catch as the real game."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

import envs  # noqa: F401  makes Catch known
from envs.controls import Controls
from envs.episode import Episode, Recording
from envs.games import Games, Transition
from envs.make import make_games
from play.session import GameSession
from play.snapshot import Parts
from runs import build
from runs.recipes import preset
from world_model.dream.batch import Starts, World
from world_model.interface import WorldModel
from world_model.token_world import TokenWorld

CONTEXT = 4  # frames of a start
WAYS: tuple[list[str], ...] = (
    ["d"],
    ["a"],
    ["right"],
    [],
    ["e"],
    ["left", "d"],
    ["d"],
    ["a"],
)  # keys held, step by step


def seen(made: GameSession) -> list[np.ndarray]:
    """What is shown now."""
    return list(made.now.pictures().values())


def follow(made: GameSession, ways: tuple[list[str], ...] = WAYS) -> list[list[np.ndarray]]:
    """The pictures after each step."""
    shown = []
    for held in ways:
        made.step(held)
        shown.append(seen(made))
    return shown


def game(env: str, recipe: str = "reverie", size: int | str = 64) -> Games:
    """One copy of a tiny game, as the recipe sees it, but for the size of its frames."""
    return make_games(env, replace(preset(recipe, "toy").game, size=size), 1)


def played(env: str, steps: int, seed: int = 0, recipe: str = "reverie", size: int | str = 64) -> Episode:
    """A random game of so many steps."""
    games, rng = game(env, recipe, size), np.random.default_rng(seed)
    recording = Recording(games.spec, games.reset([seed])[0], seed=seed)
    for _ in range(steps):
        if games.spec.discrete:
            action = rng.integers(games.spec.action_size, size=1)
        else:
            action = rng.uniform(-1, 1, (1, games.spec.action_size)).astype(np.float32)
        recording.append(action[0], Transition(*(values[0] for values in games.step(action))))
    games.close()
    return recording.finish()


def parts(
    env: str = "Catch-v0", *, starts: int = 3, recipe: str = "reverie", size: int | str = 64
) -> Parts:  # fmt: skip
    """An untrained model of the game, with noise on every parameter so that nothing it says is 0."""
    games = game(env, recipe, size)
    agent = build.agent(preset(recipe, "toy"), games.spec)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sooner(agent.world_model, -20)  # else its dreams would end at once
    whole = played(env, 40, recipe=recipe, size=size)
    cuts = range(0, 4 * starts, 4)
    frame = torch.from_numpy(np.stack([whole.frame[at : at + CONTEXT] for at in cuts]))
    action = torch.from_numpy(np.stack([whole.action[at : at + CONTEXT - 1] for at in cuts]))
    controls = Controls.of(games)
    games.close()
    world = World(agent.world_model, Starts(frame, action), controls)
    return Parts(env, world, agent.learner, partial(game, env, recipe, size))


def sooner(model: WorldModel, by: float) -> None:
    """Makes dreams end sooner, by so many logits a step."""
    made: Any = model
    with torch.no_grad():
        if isinstance(model, TokenWorld):
            made.transformer.end[-1].bias[1] += by
        else:
            made.cont[-1].bias -= by


def table(
    mode: str = "dream", env: str = "Catch-v0", seed: int = 0, recipe: str = "reverie", size: int = 64
) -> GameSession:
    """A table of a model made for it."""
    made = GameSession(parts(env, recipe=recipe, size=size), seed=seed)
    made.set_mode(mode)
    return made
