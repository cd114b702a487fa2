"""The loop: collect, train the world model, train the policy in its dream, again and again. One page."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from agent.collect import Collector
from agent.desk import Desk, Dreams, Run, Screen
from agent.interrupt import deferred
from agent.player import Agent, Player
from agent.real_game import RealGame
from agent.replay import Replay
from agent.show import show_dream
from agent.trainer import TrainConfig, Trainer
from envs.errors import UserError
from envs.games import Games
from policies.imagine import imagine
from policies.interface import Dream, Policy, Rollout
from world_model import trees
from world_model.interface import Batch, Stage, State, to_unit

STARTS, CONTEXT = 32, 9  # real contexts in a checkpoint, and the frames of each: 3.5 MB at 64x64 RGB
PART = 512  # agent steps played, or frames encoded, without asking whether to stop
PLACES = ("dream", "real")  # where a policy learns
SHOWN = {  # to a person at the terminal, of what is logged
    "pixels": "world_model/pixels", "reward": "world_model/reward", "kl": "world_model/kl",
    "entropy": "actor/entropy_nats", "dream": "policy/return", "fitness": "policy/fitness",
    "best": "policy/fitness_best", "frames": "vision/pixels", "memory": "memory/nll",
}  # fmt: skip


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
    """One run in memory: everything that trains, and how it is saved.

    A round of the loop is: play, each stage of the world model for its updates, then the policy's plan. `reverie` has
    thousands of rounds of one update each, World Models has a few rounds of thousands. A round that was stopped goes on
    where it was: `done` holds how much of each of its parts is behind us.
    """

    def __init__(
        self, agent: Agent, games: Games, replay: Replay, *, config: TrainConfig, dreams: Dreams, seed: int,
        real: RealGame | None = None,
    ) -> None:  # fmt: skip
        self.agent, self.replay, self.config, self.dreams, self.real = agent, replay, config, dreams, real
        self.collector = Collector(games, replay, Player(agent), seed=seed)
        self.stages = agent.world_model.stages()
        objectives = [objective for stage in self.stages for objective in stage.objectives]
        self.trainer = Trainer(
            (*objectives, *agent.learner.objectives()),
            device=agent.device, precision=config.precision, compile=config.compile,
        )  # fmt: skip
        self.returns: list[float] = []  # of episodes since the last log
        self.updates = 0  # rounds that are behind us
        self.done: dict[str, int] = {}  # of the round under way
        self._saved = 0.0

    def train(self, steps: int, run: Run, screen: Screen) -> None:
        """Runs until the replay holds `steps` agent steps and what they allow has been learned.

        Ctrl-C or SIGTERM ends the update under way, saves a checkpoint and raises KeyboardInterrupt.
        """
        with deferred() as asked_to_stop:
            desk = Desk(run, screen, asked_to_stop)
            self._saved = time.monotonic()
            if self.real:
                self.real.stop = asked_to_stop
            self.prefill(run, screen, asked_to_stop)
            while not asked_to_stop() and (self.done or not self.updates or self.replay.steps < steps):
                self._round(steps, desk)
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

    def train_world_model(self, stage: Stage | None = None, encoded: Sequence[np.ndarray] = ()) -> State | None:
        """One update of a stage (the first one); the posterior states (S, ...) it passed through, if it tells them."""
        stage = stage or self.stages[0]
        batch = self.replay.sample(stage.batch_size, stage.length, encoded=encoded).to(self.agent.device)
        losses = [self.trainer.update(objective, batch) for objective in stage.objectives]
        return None if losses[-1].states is None else self._usable(losses[-1].states, batch)

    def train_policy(self, states: State | None = None, where: str = "dream") -> None:
        """One improvement, in the dream from a random choice of the states (S, ...), or in the real game."""
        if where == "real":
            if self.real is None:
                raise ValueError("this session was built without workers for the real game")
            rollout = self.real.rollout(self.agent, version=sum(self.trainer.updates.values()))
        else:
            rollout = self._dream(states)
        with self.trainer.mixed():
            metrics = self.agent.learner.improve(rollout, self.trainer.update)
        self.trainer.note({f"policy/{key}": value for key, value in metrics.items()})

    def _dream(self, states: State | None) -> Rollout:
        dreams, model, device = self.dreams, self.agent.world_model, self.agent.device
        states = self.states(dreams.starts) if states is None else states
        if dreams.starts and dreams.starts < len(states.latent):
            states = trees.rows(states, torch.randperm(len(states.latent), device=device)[: dreams.starts])

        def rollout(policy: Policy) -> Dream:
            every = trees.map(lambda leaf: leaf.repeat(policy.copies, *[1] * (leaf.dim() - 1)), states)
            seen = policy.copies == 1  # a population's views would fill gigabytes, and it learns from returns alone
            return imagine(
                model, policy, every, horizon=dreams.horizon, temperature=dreams.temperature, keep_views=seen
            )

        return rollout

    def states(self, count: int) -> State:
        """`count` states of real play, as the world model that has seen what came before knows them.

        Raises UserError when no episode is long enough.
        """
        batch = self.replay.sample(max(4, count), self.config.burn_in + 8).to(self.agent.device)
        with torch.no_grad(), self.trainer.mixed():
            states = self._usable(self.agent.world_model.observe(to_unit(batch.frame), batch.action), batch)
        if not len(states.latent):
            raise UserError(f"No episode is longer than train.burn_in={self.config.burn_in}: no dream can begin.")
        return trees.rows(states, torch.randint(len(states.latent), (count,), device=self.agent.device))

    def _usable(self, states: State, batch: Batch) -> State:
        usable = batch.acted[:, self.config.burn_in :]  # no dream goes on from where a game has ended
        return trees.map(lambda leaf: leaf[:, self.config.burn_in :][usable], states)

    # ---- a round ----
    def _round(self, steps: int, desk: Desk) -> None:
        """One round, or what is left of one; returns early when asked to stop in the middle of a long part."""
        states, screen = None, desk.screen
        parts = -(-self.config.steps_per_update // PART) if self.updates else 0  # the first one learns from the prefill
        size = min(PART, self.config.steps_per_update)
        if not self._repeat("collect", parts, lambda: self.collect(size, screen), desk):
            return
        for stage in self.stages:
            screen.phase(stage.name.replace("_", " "))
            encoded = self._encoded(stage)

            def learn(stage: Stage = stage, encoded: Sequence[np.ndarray] = encoded) -> None:
                nonlocal states
                states = self.train_world_model(stage, encoded)

            if not self._repeat(stage.name, stage.updates, learn, desk):
                return
        for where, count in self.agent.learner.plan(last=self.replay.steps >= steps):
            screen.phase("policy" if where == "dream" else f"policy in the {where} game")
            if not self.done.get(where):
                self.agent.learner.begin_phase(where)

            def improve(where: str = where) -> None:
                self.train_policy(states, where)

            if not self._repeat(where, count, improve, desk):
                return
        self.done = {}
        self.updates += 1
        self._tell(desk)

    def _repeat(self, part: str, count: int, work: Callable[[], None], desk: Desk) -> bool:
        """Works until this part of the round has been done `count` times; False when asked to stop before."""
        for done in range(self.done.get(part, 0), count):
            if count > 1 and desk.asked_to_stop():
                return False
            work()
            self.done[part] = done + 1
            if count == 1 or part == "collect":
                continue
            desk.screen.update(self.replay.steps, **{part: f"{done + 1:,} of {count:,}"})
            generation = part in PLACES
            if generation or (done + 1) % self.config.log_every == 0:
                self._log(desk)
            if generation or time.monotonic() - self._saved > self.config.save_every:
                self._save(desk)
        desk.screen.update(self.replay.steps, **{part: None})
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

    def _encoded(self, stage: Stage) -> list[np.ndarray]:
        """What a stage reads instead of the frames of each episode, if it does."""
        if stage.encode is None or self.done.get(stage.name, 0) >= stage.updates:
            return []
        device, found = self.agent.device, []
        with torch.no_grad(), self.trainer.mixed():
            for episode in self.replay.memory():
                parts = torch.from_numpy(episode.frame).split(PART)
                made = torch.cat([stage.encode(to_unit(part.to(device))) for part in parts])
                found.append(made.float().cpu().numpy())
        return found

    # ---- telling ----
    def _tell(self, desk: Desk) -> None:
        """After a round: numbers, pictures and a checkpoint, each when it is due."""
        if self.updates % self.config.log_every == 0:
            self._log(desk)
        if self.updates % self.config.show_every == 0:
            desk.screen.phase("pictures")
            show_dream(self.agent.world_model, self.replay, desk.run)
        if time.monotonic() - self._saved > self.config.save_every:
            desk.screen.phase("checkpoint")
            self._save(desk)

    def _log(self, desk: Desk) -> None:
        scalars = self.trainer.report()
        if self.returns:
            scalars["episode/return"] = sum(self.returns) / len(self.returns)
            self.returns = []
        scalars["updates"] = self.updates
        if self.real:
            scalars |= {f"real/{name}": count for name, count in self.real.state_dict().items()}
        desk.run.log(self.replay.steps, scalars)
        shown = {name: scalars[key] for name, key in SHOWN.items() if key in scalars}
        desk.screen.update(self.replay.steps, **shown)

    def _save(self, desk: Desk) -> None:
        self.save(desk.run)
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
        self.done = dict(state.get("done", {}))  # runs from before rounds had parts have none
        if self.real is not None and state.get("real"):
            self.real.load_state_dict(state["real"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
