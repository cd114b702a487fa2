"""A run in memory, built from its configuration."""

from __future__ import annotations

from pathlib import Path

import torch

from agent.loop import Session
from agent.player import Agent
from agent.replay import Replay
from envs.errors import UserError
from envs.games import Games
from envs.spec import Spec
from runs.config import Config


def agent(config: Config, spec: Spec, device: str | torch.device = "cpu") -> Agent:
    """World model and policy, initialised by the configuration's seed."""
    torch.manual_seed(config.seed)
    try:
        world_model = config.model.build(spec)
        learner = config.policy.build(world_model.feature_size, spec)
    except ValueError as problem:
        raise UserError(f"The model cannot be built: {problem}") from problem
    made = Agent(world_model, learner).to(device)
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def session(config: Config, games: Games, folder: Path | None, device: str | torch.device = "cpu") -> Session:
    """Everything that trains; `folder` receives the episodes."""
    made = agent(config, games.spec, device)
    replay = Replay(folder, games.spec, config.replay, seed=config.seed)
    return Session(made, games, replay, config=config.train, dreams=config.policy, seed=config.seed)
