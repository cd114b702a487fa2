"""The work of a run, without the when: play, one update of the world model, one improvement of the policy.

Shapes: B segments, T indices, S states, N frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch

from agent.collector import Collector
from agent.context import ImaginationConfig, Screen
from agent.player import Agent, Player
from agent.real_game import RealGame
from agent.replay import Replay
from agent.trainer import TrainConfig, Trainer
from envs.errors import UserError
from envs.games import Games
from policies.imagination import imagine
from policies.interface import Policy, Rollout, Trajectory
from world_model import trees
from world_model.interface import Batch, Stage, State, to_unit
from world_model.trees import Tree

STARTS, CONTEXT = 32, 9  # real contexts in a checkpoint, and the frames of each: 3.5 MB at 64x64 RGB
FEWEST = 16  # contexts drawn at least, lest all of a few happen to be where a game has ended
PART = 512  # agent steps played, or frames encoded, without asking whether to stop


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
    usable = batch.has_action.all(1)  # no dream goes on from where a game has ended
    return {"frame": batch.frame[usable][:STARTS].clone(), "action": batch.action[usable, :-1][:STARTS].clone()}


class Work:
    """Everything that plays and trains; `agent.loop.Session` says when."""

    def __init__(
        self, agent: Agent, games: Games, replay: Replay, *, config: TrainConfig, dreams: ImaginationConfig, seed: int,
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
        self._codes: dict[str, tuple[tuple[int, ...], dict[int, np.ndarray]]] = {}  # see `encoded`

    def collect(self, steps: int, screen: Screen, *, at_random: bool = False) -> None:
        """Plays the real game."""
        screen.phase("collect")
        for episode in self.collector.collect(steps, at_random=at_random):
            self.returns.append(episode.score)
            screen.episode(episode.score, len(episode))
        screen.update(self.replay.steps)

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
        dreams, model, policy = self.dreams, self.agent.world_model, self.agent.learner.policy
        memory: Tree | None = None
        if states is None or policy.is_recurrent:  # what the policy remembers, only a context of its own can tell
            states, known = self._begun(dreams.starts)
            memory = known if policy.is_recurrent else None
        elif dreams.starts and dreams.starts < len(states.latent):
            states = trees.rows(states, torch.randperm(len(states.latent), device=self.agent.device)[: dreams.starts])

        def rollout(policy: Policy) -> Trajectory:
            every = trees.map(lambda leaf: leaf.repeat(policy.population_size, *[1] * (leaf.dim() - 1)), states)
            seen = (
                policy.population_size == 1
            )  # a population's views would fill gigabytes, and it learns from returns alone
            return imagine(
                model, policy, every, horizon=dreams.horizon, temperature=dreams.temperature, keep_views=seen,
                memory=memory,
            )  # fmt: skip

        return rollout

    def states(self, count: int) -> State:
        """`count` states of real play: `train.at_start` of them first ones, the others known from what came before.

        Raises UserError when no episode is long enough, or when `count` is 0.
        """
        return self._begun(count)[0]

    @torch.no_grad()
    def _begun(self, count: int) -> tuple[State, Tree]:
        """`states`, and the policy's memory before each of them; () when it remembers nothing."""
        if not count:
            raise UserError("policy.starts must be at least 1: this recipe draws the states that dreams begin from.")
        first, length = round(self.config.at_start * count), self.config.burn_in + 1
        parts = []
        with self.trainer.mixed():
            if first:
                parts.append(self._followed(self.replay.sample(first, 1, first=True)))
            if count > first:
                batch = self.replay.sample(max(FEWEST, count - first), length)
                # No dream goes on from where a game has ended.
                usable = batch.has_action.all(1).nonzero()[: count - first, 0]
                if not len(usable):
                    raise UserError(f"No episode is longer than train.burn_in={length - 1}: no dream can begin.")
                known = self._followed(Batch(*(leaf[usable] for leaf in batch)))
                parts.append(trees.rows(known, torch.arange(count - first, device=self.agent.device) % len(usable)))
        return trees.map(lambda *leaves: torch.cat(leaves), *parts)  # type: ignore[no-any-return]

    def _followed(self, batch: Batch) -> tuple[State, Tree]:
        """The states (B, ...) at the end of real contexts, and the policy's memory before them; see `Player.act`."""
        model, policy, batch = self.agent.world_model, self.agent.learner.policy, batch.to(self.agent.device)
        frame = to_unit(batch.frame)
        if not policy.is_recurrent:
            return model.start(frame, batch.action), ()
        state, memory = model.start(frame[:, :1]), policy.initial(len(frame))
        for t in range(1, frame.shape[1]):
            memory = policy.act(model.features(state), memory, greedy=True)[1]
            state = model.step(state, batch.action[:, t - 1], frame[:, t]).state
        return state, memory

    def _usable(self, states: State, batch: Batch) -> State:
        usable = batch.has_action[:, self.config.burn_in :]  # no dream goes on from where a game has ended
        return trees.map(lambda leaf: leaf[:, self.config.burn_in :][usable], states)

    def encoded(self, stage: Stage) -> list[np.ndarray]:
        """What a stage reads instead of the frames of each episode, if it does.

        Kept by the episode's number for as long as the stages before, which train the encoder, take no further step:
        then only frames that are new are encoded.
        """
        if stage.encode is None:
            return []
        before = takewhile(lambda earlier: earlier.name != stage.name, self.stages)
        version = tuple(self.trainer.updates[part.name] for earlier in before for part in earlier.objectives)
        known = self._codes.get(stage.name, ((), {}))
        codes = known[1] if known[0] == version else {}
        found: dict[int, np.ndarray] = {}
        with torch.no_grad(), self.trainer.mixed():
            for number, episode in self.replay.memory().items():
                old = codes.get(number, np.zeros(0))
                parts = torch.from_numpy(episode.frame[len(old) :]).split(PART) if len(old) < len(episode.frame) else ()
                made = [stage.encode(to_unit(part.to(self.agent.device))).float().cpu().numpy() for part in parts]
                found[number] = np.concatenate([*([old] if len(old) else []), *made]) if made else old
        self._codes[stage.name] = version, found
        return list(found.values())
