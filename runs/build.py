"""A run in memory, built from its configuration."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from agent.loop import NO_STARTS, Loop, declared_metrics
from agent.player import Agent
from agent.population import FixedLearner
from agent.precision import check_trainable
from agent.ray_pool import Cluster
from agent.real_game import RealGame
from agent.replay import Replay
from agent.seeds import episode_seed
from agent.team import Team
from agent.workers import CHUNK, EvaluationPool, Workers
from envs.errors import UserError
from envs.games import Games
from envs.make import make_games
from envs.spec import Spec
from policies.cma_es import Evolution
from policies.interface import Learner
from policies.random import RandomPolicy
from runs.config import Config
from runs.folder.system import cores
from runs.report.diagnostics import diagnostics
from world_model.interface import Metric
from world_model.noise import forked_rng


def agent(config: Config, spec: Spec, device: str | torch.device = "cpu") -> Agent:
    """World model and policy, initialised by the configuration's seed."""
    torch.manual_seed(config.seed)
    try:
        world_model = config.model.build(spec)
        learner = config.policy.build(world_model.feature_size, spec) if config.train.policy else no_policy(spec)
    except ValueError as problem:
        raise UserError(f"The model cannot be built: {problem}") from problem
    if not (world_model.gives_states or getattr(config.policy, "starts", 1)):
        raise UserError(NO_STARTS)
    made = Agent(world_model, learner).to(device)
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def no_policy(spec: Spec) -> Learner:
    """Random play, which nobody improves: of a world model that is trained alone."""
    return FixedLearner(RandomPolicy(spec))


def loop(
    config: Config, games: Games, folder: Path | None, device: str | torch.device = "cpu", team: Team | None = None
) -> Loop:
    """Everything that trains; `folder` receives the episodes.

    In a team each process has random numbers of its own, and the model that the configuration's seed makes.
    Raises UserError for a population in a team, and for a number format that this machine cannot train in.
    """
    made, team = agent(config, games.spec, device), team or Team()
    check_trainable(made, made.device, config.train.precision)
    if team.size > 1 and isinstance(made.learner, Evolution):
        raise UserError(
            "torchrun is for policies that learn by gradients; a population is judged by workers=N or cluster=ADDRESS."
        )
    seed = episode_seed(config.seed, 10**9 + team.rank) if team.rank else config.seed
    if team.rank:
        torch.manual_seed(seed)
    replay = Replay(folder, games.spec, config.replay, seed=seed)
    return Loop(
        made, games, replay, config=config.train, dreams=config.policy, seed=seed, team=team,
        real=_real_game(config, made, folder and folder.parent),
        diagnostics=partial(diagnostics, action_names=games.action_names),
    )  # fmt: skip


def metrics(config: Config) -> dict[str, Metric]:
    """What each number that such a run logs means, by its logged name; builds no game.

    Torch's generator is left alone.
    """
    spec = Spec(config.game.frame_shape, 2, True)  # the names do not depend on the game
    with forked_rng():
        made = agent(config, spec, "meta")
        return declared_metrics(made.world_model.stages(), made.learner)


def agent_and_games(config: Config) -> tuple[Agent, Games]:
    """What a worker needs to play for a population."""
    games = make_games(config.env, config.game, CHUNK)
    with forked_rng():  # on one core the worker is the run's own process
        return agent(config, games.spec), games


def _real_game(config: Config, made: Agent, folder: Path | None) -> RealGame | None:
    """Who plays the real game for a population; nobody is started before that is asked for."""
    if not isinstance(made.learner, Evolution):
        return None
    make = partial(agent_and_games, config)
    crew: EvaluationPool
    if config.cluster:
        crew = Cluster(make, config.workers or None, address=None if config.cluster == "local" else config.cluster)
    else:
        crew = Workers(make, config.workers or (cores() if cores() > 1 else 0), folder=folder)
    return RealGame(crew, rollouts=config.policy.real_rollouts, seed=config.seed)
