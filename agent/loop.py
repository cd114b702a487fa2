"""The loop: collect, train the world model, train the policy in its dream, again and again. One page."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from agent.collect import Collector
from agent.interrupt import deferred
from agent.player import Agent, Player
from agent.replay import Replay
from agent.show import show_dream
from agent.trainer import TrainConfig, Trainer
from envs.games import Games
from policies.imagine import imagine
from policies.interface import Dream, Policy
from world_model import trees
from world_model.interface import State, to_unit

STARTS, CONTEXT = 32, 9  # real contexts in a checkpoint, and the frames of each: 3.5 MB at 64x64 RGB


class Run(Protocol):
    """Where a run is written; `runs.run.Run` is one."""

    def log(self, step: int, scalars: dict[str, float]) -> None: ...
    def picture(self, step: int, name: str, image: np.ndarray) -> Any: ...
    def video(self, step: int, name: str, frames: np.ndarray, fps: float = 15) -> Any: ...
    def save_checkpoint(self, state: dict[str, Any], step: int) -> Any: ...


class Screen(Protocol):
    """What tells a person; `runs.progress.Progress` is one."""

    def phase(self, name: str) -> None: ...
    def update(self, step: int, **values: float | str | None) -> None: ...  # None removes a value
    def episode(self, ret: float, length: int) -> None: ...


class Dreams(Protocol):
    """How the policy's dreams are made; the policy's own configuration says it."""

    @property
    def starts(self) -> int: ...
    @property
    def horizon(self) -> int: ...
    @property
    def temperature(self) -> float: ...


def starts(replay: Replay) -> dict[str, torch.Tensor]:
    """Contexts of real play that a dream can go on from without the game: up to STARTS of CONTEXT frames.

    frame (S, T, C, H, W) uint8 and action (S, T - 1[, A]); empty while no episode is long enough. The replay's own
    random numbers are left as they were.
    """
    if not replay.frames("train"):
        return {}
    before, replay.rng = replay.rng, np.random.default_rng(replay.steps)
    try:
        batch = replay.sample(2 * STARTS, CONTEXT)
    finally:
        replay.rng = before
    usable = batch.acted.all(1)  # no dream goes on from where a game has ended
    return {"frame": batch.frame[usable][:STARTS].clone(), "action": batch.action[usable, :-1][:STARTS].clone()}


class Session:
    """One run in memory: everything that trains, and how it is saved."""

    def __init__(
        self, agent: Agent, games: Games, replay: Replay, *, config: TrainConfig, dreams: Dreams, seed: int
    ) -> None:
        self.agent, self.replay, self.config, self.dreams = agent, replay, config, dreams
        self.collector = Collector(games, replay, Player(agent), seed=seed)
        (self.stage,) = agent.world_model.stages()
        self.trainer = Trainer(
            (*self.stage.objectives, *agent.learner.objectives()),
            device=agent.device, precision=config.precision, compile=config.compile,
        )  # fmt: skip
        self.returns: list[float] = []  # of episodes since the last log
        self.updates = 0

    def train(self, steps: int, run: Run, screen: Screen) -> None:
        """Runs until the replay holds `steps` agent steps.

        Ctrl-C or SIGTERM ends the update under way, saves a checkpoint and raises KeyboardInterrupt.
        """
        with deferred() as asked_to_stop:
            self._prefill(run, screen, asked_to_stop)
            saved = time.monotonic()
            while self.replay.steps < steps and not asked_to_stop():
                self.collect(self.config.steps_per_update, screen)
                screen.phase("world model")
                states = self.train_world_model()
                screen.phase("policy")
                self.train_policy(states)
                self.updates += 1
                if self.updates % self.config.log_every == 0:
                    self._log(run, screen)
                if self.updates % self.config.show_every == 0:
                    screen.phase("pictures")
                    show_dream(self.agent.world_model, self.replay, run)
                if time.monotonic() - saved > self.config.save_every:
                    screen.phase("checkpoint")
                    self.save(run)
                    saved = time.monotonic()
            screen.phase("checkpoint")
            self.save(run)
            if asked_to_stop():
                raise KeyboardInterrupt

    def collect(self, steps: int, screen: Screen, *, at_random: bool = False) -> None:
        """Plays the real game."""
        screen.phase("collect")
        for episode in self.collector.collect(steps, at_random=at_random):
            self.returns.append(episode.score)
            screen.episode(episode.score, len(episode))
        screen.update(self.replay.steps, updates=self.updates)

    def train_world_model(self) -> State:
        """One update; returns the posterior states (B, T, ...) it passed through."""
        batch = self.replay.sample(self.stage.batch_size, self.stage.length).to(self.agent.device)
        (objective,) = self.stage.objectives
        states = self.trainer.update(objective, batch).states
        assert states is not None
        usable = batch.acted[:, self.config.burn_in :]  # no dream goes on from where a game has ended
        return trees.map(lambda leaf: leaf[:, self.config.burn_in :][usable], states)

    def train_policy(self, states: State) -> None:
        """One improvement in the dream, from a random choice of the states (S, ...)."""
        count = len(states.latent)
        dreams = self.dreams
        if dreams.starts and dreams.starts < count:
            states = trees.rows(states, torch.randperm(count, device=self.agent.device)[: dreams.starts])

        def rollout(policy: Policy) -> Dream:
            model = self.agent.world_model
            return imagine(model, policy, states, horizon=dreams.horizon, temperature=dreams.temperature)

        with self.trainer.mixed():
            metrics = self.agent.learner.improve(rollout, self.trainer.update)
        self.trainer.note({f"policy/{key}": value for key, value in metrics.items()})

    def _prefill(self, run: Run, screen: Screen, asked_to_stop: Callable[[], bool]) -> None:
        """Random play, one look at it, and the world model's first updates; goes on where a stopped run had come to."""
        while self.replay.steps < self.config.prefill and not asked_to_stop():
            self.collect(512, screen, at_random=True)
        pretrained = self.trainer.updates[self.stage.objectives[0].name]
        if not pretrained:
            frames = self.replay.sample(64, 16).frame.flatten(0, 1)
            self.agent.world_model.prepare(to_unit(frames.to(self.agent.device)))
        screen.phase("pretraining")
        for done in range(pretrained, self.config.pretrain):
            if asked_to_stop():
                return
            self.train_world_model()
            screen.update(self.replay.steps, pretraining=f"{done + 1} of {self.config.pretrain}")
            if (done + 1) % self.config.log_every == 0:
                run.log(self.replay.steps, self.trainer.report())
        screen.update(self.replay.steps, pretraining=None)

    def _log(self, run: Run, screen: Screen) -> None:
        scalars = self.trainer.report()
        if self.returns:
            scalars["episode/return"] = sum(self.returns) / len(self.returns)
            self.returns = []
        scalars["updates"] = self.updates
        run.log(self.replay.steps, scalars)
        shown = {"pixels": "world_model/pixels", "reward": "world_model/reward", "kl": "world_model/kl",
                 "entropy": "actor/entropy_nats", "dream": "policy/return"}  # fmt: skip
        screen.update(self.replay.steps, **{name: scalars[key] for name, key in shown.items() if key in scalars})

    # ---- saving ----
    def save(self, run: Run) -> None:
        """Writes a checkpoint, unless a loss has become non-finite since the last log (NonFiniteLoss)."""
        self.trainer.check()
        run.save_checkpoint(self.state_dict(), self.replay.steps)

    def state_dict(self) -> dict[str, Any]:
        """Everything the run needs to go on bit by bit."""
        return {
            "agent": self.agent.state_dict(),
            "trainer": self.trainer.state_dict(),
            "replay": self.replay.state_dict(),
            "collector": self.collector.state_dict(),
            "updates": self.updates,
            "returns": list(self.returns),
            "starts": starts(self.replay),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a `state_dict`; the current episodes are played again from their seeds."""
        self.agent.load_state_dict(state["agent"])
        self.trainer.load_state_dict(state["trainer"])
        self.collector.load_state_dict(state["collector"], state["replay"])
        self.updates, self.returns = state["updates"], list(state["returns"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
