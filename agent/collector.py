"""Collecting: N games are played in lock step and every step goes into the replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from agent.player import Player
from agent.replay import Replay
from agent.seeds import episode_seed
from envs.episode import Episode
from envs.games import GameFailed, Games
from policies.random import random_actions

BURST = 32  # steps of random play in the mean, when it takes over
ROUNDING = 2  # levels by which a pixel of a frame that was played again may differ
HOLDS = (1, 2, 4, 8, 16)  # steps for which random play holds an action in the mean, row by row


class Collector:
    """Plays the games with the player (or at random) and remembers everything.

    Every episode has its own seed, drawn from (seed, number of the episode): its actions are enough to rebuild it.
    `bursts` is the share of the player's steps that random play takes over, for `BURST` steps at a time in the mean.
    """

    def __init__(self, games: Games, replay: Replay, player: Player, *, seed: int, bursts: float = 0.0) -> None:
        self.games, self.replay, self.player, self.seed = games, replay, player, seed
        self.bursts, self.burst = bursts, torch.zeros(games.num_envs, dtype=torch.int64)  # steps left of each row's
        self.begun = 0
        self.frames: np.ndarray | None = None
        self.is_first = np.ones(games.num_envs, dtype=bool)
        self.held = random_actions(self.games.spec, self.games.num_envs)  # the last random actions

    def collect(self, steps: int, *, at_random: bool = False) -> list[Episode]:
        """Plays at least `steps` agent steps (a multiple of N); returns the episodes that ended."""
        ended: list[Episode] = []
        if self.frames is None:
            self._begin(list(range(self.games.num_envs)))
        for _ in range(-(-steps // self.games.num_envs)):
            assert self.frames is not None
            actions = self._random() if at_random else self._played()
            brought = self.games.step(actions)
            ended += self.replay.add_rows(actions, brought)
            self.frames, self.is_first = brought.frame, brought.done.copy()
            if brought.done.any():
                self._begin(np.flatnonzero(brought.done).tolist())
        return ended

    def abandon(self) -> None:
        """The open episodes are given up: their game cannot be played on."""
        self.replay.abandon()
        self.frames, self.is_first[:] = None, True

    def burn_in(self, length: int) -> None:
        """The player follows the last `length` frames of the open episodes anew; see `Player.burn_in`."""
        going = self.replay.open()
        contexts = []
        for row in range(self.games.num_envs):
            episode = going.get(row)
            steps = min(length, len(episode)) if episode is not None else 0
            if episode is None or not steps:
                contexts.append((np.zeros((0, *self.games.spec.frame), np.uint8), np.zeros(0)))
            else:
                contexts.append((episode.frame[-steps - 1 : -1], episode.action[-steps:]))
        self.player.burn_in(contexts)

    def _begin(self, rows: list[int]) -> None:
        seeds = [episode_seed(self.seed, self.begun + i) for i in range(len(rows))]
        self.begun += len(rows)
        self.frames = self.games.reset(seeds, rows)
        self.replay.begin_rows(rows, self.frames[rows], seeds)
        self.is_first[rows] = True

    def _played(self) -> np.ndarray:
        """The player's actions, and random ones in the rows where a burst of them is under way."""
        assert self.frames is not None
        actions = self.player.act(self.frames, self.is_first)
        if not self.bursts:
            return actions
        # Of a row without a burst one begins so often that the share of all steps is `bursts`.
        often = self.bursts / (BURST * (1 - self.bursts))
        begins = (self.burst == 0) & (torch.rand(self.games.num_envs) < often)
        length = torch.randint(1, 2 * BURST, (self.games.num_envs,))
        self.burst = torch.where(begins, length, (self.burst - 1).clamp(min=0))
        random = (self.burst > 0).numpy()
        if random.any():
            mask = random if self.games.spec.discrete else random[:, None]
            actions = np.where(mask, self._random(), actions)
            self.player.took(actions)
        return actions

    def _random(self) -> np.ndarray:
        """Any action, held for a while (as in temporally extended exploration, Dabney et al. 2021).

        Where the action changes at every step, nobody crosses a road or leaves a corridor, and a car whose wheel and
        pedals tremble does not leave its place. But a memory that has never seen them tremble dreams that it does, and
        a policy finds that out: so some rows hold theirs and others do not.
        """
        rows = torch.arange(self.games.num_envs).view(-1, *[1] * (self.held.ndim - 1))
        holds = torch.tensor(HOLDS)[rows % len(HOLDS)]
        changes = torch.rand(self.held.shape) < 1 / holds
        self.held = torch.where(changes, random_actions(self.games.spec, self.games.num_envs), self.held)
        return self.held.numpy()

    def state_dict(self) -> dict[str, Any]:
        """Counters and the player's memory; the frames are rebuilt by the games."""
        return {"begun": self.begun, "fresh": torch.from_numpy(self.is_first), "player": self.player.state_dict(),
                "held": self.held, "burst": self.burst}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], replay_state: dict[str, Any]) -> None:
        """Goes back to a `state_dict`: the games are played again from their seeds up to where they stood."""
        self.begun, self.is_first = state["begun"], state["fresh"].cpu().numpy().copy()
        self.player.load_state_dict(state["player"])
        held = state.get("held", self.held).cpu()
        self.held = held if held.shape == self.held.shape else self.held  # runs from before it was held have none
        self.burst = state.get("burst", self.burst).cpu()
        going = sorted(replay_state["open"], key=lambda entry: entry["row"])
        if not going:
            self.replay.load_state_dict(replay_state, _no_episode)
            return
        try:
            actions, past = [e["actions"].cpu().numpy() for e in going], [e.get("past", 0) for e in going]
            traces = self.games.restore([e["seed"] for e in going], actions, past)
            if self.games.done.any():
                raise ValueError(f"an episode of {self.games.env} ended with its recorded actions, which it had not")
            if any(_differ(entry, trace) for entry, trace in zip(going, traces, strict=True)):
                raise ValueError(f"an episode of {self.games.env} went another way with its recorded actions")
        except (GameFailed, ValueError) as problem:
            # A game that is no function of its seed, or has changed: what was finished is on disk, the rest is not.
            self.frames, self.is_first[:] = None, True
            self.replay.load_state_dict(replay_state | {"open": []}, _no_episode)
            self.replay.skipped.append(f"The {len(going)} open episodes are left out: {problem}.")
            return
        rebuilt = {
            entry["seed"]: Episode(
                trace.frame, taken[cut:], trace.reward, trace.terminated, trace.truncated,
                entry.get("score", float(trace.score.sum(dtype=np.float64))), entry["seed"],
                piece_of=entry.get("piece_of", entry["number"] if cut else -1),  # older runs do not tell of which
            )
            for entry, trace, taken, cut in zip(going, traces, actions, past, strict=True)
        }  # fmt: skip
        self.frames = np.stack([trace.frame[-1] for trace in traces])
        self.replay.load_state_dict(replay_state, lambda seed, actions: rebuilt[seed])


def _differ(entry: dict[str, Any], trace: Any) -> bool:
    """Whether a game that was played again stands elsewhere than the recorded one, or brought other rewards.

    Another machine's resizing may round a pixel otherwise.
    """
    if "frame" not in entry:  # of runs from before it was kept
        return False
    apart = np.abs(trace.frame[-1].astype(np.int16) - entry["frame"].cpu().numpy()).max()
    return bool(apart > ROUNDING or not np.isclose(float(trace.reward.sum()), entry["reward"]))


def _no_episode(seed: int, actions: np.ndarray) -> Episode:
    raise ValueError("the checkpoint names no episode in progress")
