"""The loop: collect, train the world model, train the policy in its dream, again and again. One page."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from agent.context import Context, ImaginationConfig, Run, Screen
from agent.dream_video import show_dream
from agent.interrupt import deferred
from agent.player import Agent
from agent.real_game import RealGame
from agent.replay import Replay
from agent.trainer import TrainConfig
from agent.work import PART, Work, starts
from envs.errors import UserError
from envs.games import Games
from world_model.interface import Stage, to_unit

PLACES = ("dream", "real")  # where a policy learns
SHOWN = {  # to a person at the terminal, of what is logged
    "pixels": "world_model/pixels", "reward": "world_model/reward", "kl": "world_model/kl",
    "entropy": "actor/entropy_nats", "dream": "policy/return", "fitness": "policy/fitness",
    "best": "policy/fitness_best", "frames": "vision/pixels", "memory": "memory/nll",
    "tokenizer": "tokenizer/l1", "tokens": "world_model/tokens",
}  # fmt: skip


class Session(Work):
    """One run in memory: everything that trains, and how it is saved.

    A round of the loop is: play, each stage of the world model for its updates, then the policy's plan. `reverie` has
    thousands of rounds of one update each, World Models has a few rounds of thousands. A round that was stopped goes on
    where it was: `done` holds how much of each of its parts is behind us.
    """

    def __init__(
        self, agent: Agent, games: Games, replay: Replay, *, config: TrainConfig, dreams: ImaginationConfig, seed: int,
        real: RealGame | None = None,
    ) -> None:  # fmt: skip
        super().__init__(agent, games, replay, config=config, dreams=dreams, seed=seed, real=real)
        self.updates = 0  # rounds that are behind us
        self.done: dict[str, int] = {}  # of the round under way
        self.only = ""  # the one part that is done instead of a round
        self._saved = 0.0

    @property
    def parts(self) -> tuple[str, ...]:
        """What a round consists of, by name."""
        return ("collect", *(stage.name for stage in self.stages), "dream", *(("real",) if self.real else ()))

    def train(self, steps: int, run: Run, screen: Screen, only: str = "") -> None:
        """Runs until the replay holds `steps` agent steps and what they allow has been learned.

        With `only` one part of a round is done once more instead. Ctrl-C or SIGTERM ends the update under way, saves a
        checkpoint and raises KeyboardInterrupt. Raises UserError for an unknown part, or in the middle of another.
        """
        self._choose(only)
        with deferred() as asked_to_stop:
            context = Context(run, screen, asked_to_stop)
            self._saved = time.monotonic()
            if self.real:
                self.real.stop = asked_to_stop
            self.prefill(run, screen, asked_to_stop)
            while not asked_to_stop() and (
                self.only or not only and (self.done or not self.updates or self.replay.steps < steps)
            ):
                self._round(steps, context)
            screen.phase("checkpoint")
            self.save(run)
            if asked_to_stop():
                raise KeyboardInterrupt

    # ---- a round ----
    def _choose(self, only: str) -> None:
        if only and only not in self.parts:
            raise UserError(f'Unknown part only="{only}": choose one of {", ".join(self.parts)}.')
        if only and self.done and only != self.only:
            raise UserError(
                f"The run was stopped within a round, at {', '.join(self.done)}: finish it first, without only=."
            )
        self.only = only or self.only

    def _round(self, steps: int, context: Context) -> None:
        """One round, or what is left of one; returns early when asked to stop in the middle of a long part."""
        states, screen = None, context.screen
        screen.update(self.replay.steps, updates=self.updates)
        # The first round learns from the prefill.
        parts = -(-self.config.steps_per_update // PART) if self.updates or self.only else 0
        size = min(PART, self.config.steps_per_update)
        # What the player remembers is told by weights that many updates have left behind: after the pretraining, and
        # after every round of a system that learns in long ones. `reverie` takes one small step a round, and a
        # burn-in would cost four times as much as the acting.
        long = any(stage.updates > 1 for stage in self.stages)
        if parts and not self.done and (long or self.updates == 1):
            self.collector.burn_in(self.config.burn_in)
        if not self._repeat("collect", parts, lambda: self.collect(size, screen), context):
            return
        for stage in self.stages:
            screen.phase(stage.name.replace("_", " "))
            due = self.done.get(stage.name, 0) < stage.updates and self.only in ("", stage.name)
            encoded = self.encoded(stage) if due else []

            def learn(stage: Stage = stage, encoded: Sequence[np.ndarray] = encoded) -> None:
                nonlocal states
                states = self.train_world_model(stage, encoded)

            if not self._repeat(stage.name, stage.updates, learn, context):
                return
        for where, count in self.agent.learner.plan(last=self.replay.steps >= steps, only=self.only):
            screen.phase("policy" if where == "dream" else f"policy in the {where} game")
            if not self.done.get(where) and self.only in ("", where):
                self.agent.learner.begin_phase(where)

            def improve(where: str = where) -> None:
                self.train_policy(states, where)

            if not self._repeat(where, count, improve, context):
                return
        self.updates += not self.only
        self.done, self.only = {}, ""
        self._tell(context)

    def _repeat(self, part: str, count: int, work: Callable[[], None], context: Context) -> bool:
        """Works until this part of the round has been done `count` times; False when asked to stop before."""
        for done in range(self.done.get(part, 0), count if self.only in ("", part) else 0):
            if count > 1 and context.asked_to_stop():
                return False
            work()
            self.done[part] = done + 1
            if count == 1 or part == "collect":
                continue
            context.screen.update(self.replay.steps, **{part: f"{done + 1:,} of {count:,}"})
            generation = part in PLACES and self.agent.learner.logs_each_update
            if generation or (done + 1) % self.config.log_every == 0:
                self._log(context)
            if generation or time.monotonic() - self._saved > self.config.save_every:
                self._save(context)
        context.screen.update(self.replay.steps, **{part: None})
        return True

    def prefill(self, run: Run, screen: Screen, asked_to_stop: Callable[[], bool] = lambda: False) -> None:
        """Random play, one look at it, and the world model's first updates; goes on where a stopped run had come to."""
        while self.replay.steps < self.config.prefill and not asked_to_stop():
            self.collect(min(PART, self.config.prefill - self.replay.steps), screen, at_random=True)
        pretrained = self.trainer.updates[self.stages[0].objectives[0].name]
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

    # ---- telling ----
    def _tell(self, context: Context) -> None:
        """After a round: numbers, pictures and a checkpoint, each when it is due."""
        rounds_are_long = any(stage.updates > 1 for stage in self.stages)
        if rounds_are_long or self.updates % self.config.log_every == 0:
            self._log(context)
        if self.updates % self.config.show_every == 0:
            context.screen.phase("pictures")
            show_dream(self.agent.world_model, self.replay, context.run)
        if time.monotonic() - self._saved > self.config.save_every:
            context.screen.phase("checkpoint")
            self._save(context)

    def _log(self, context: Context) -> None:
        scalars = self.trainer.report()
        if self.returns:
            scalars["episode/return"] = sum(self.returns) / len(self.returns)
            self.returns = []
        scalars["updates"] = self.updates
        if self.real:
            scalars |= {f"real/{name}": count for name, count in self.real.state_dict().items()}
        context.run.log(self.replay.steps, scalars)
        shown = {name: scalars[key] for name, key in SHOWN.items() if key in scalars}
        context.screen.update(self.replay.steps, **shown)

    def _save(self, context: Context) -> None:
        self.save(context.run)
        self._saved = time.monotonic()

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
            "done": dict(self.done),
            "only": self.only,
            "real": {} if self.real is None else self.real.state_dict(),
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
        self.done, self.only = dict(state.get("done", {})), state.get("only", "")  # older runs have none
        if self.real is not None and state.get("real"):
            self.real.load_state_dict(state["real"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
