"""Evaluation: whole episodes of the real game, every one of them waited for, so that short games do not count more."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from agent.seeds import evaluation_seed
from envs.games import Games

LONG = 30_000  # steps after which an episode without an end is strange: half an hour of Atari has 27,000
FILMED = 5_000  # steps of an episode that are filmed at most
FILM_BYTES = 5e8  # of a film's pictures at most, about as much as 5,000 of Atari's


class Evaluation(NamedTuple):
    """Returns in the game's units and lengths in agent steps, in the order in which the episodes were begun."""

    returns: list[float]
    lengths: list[int]
    film: np.ndarray  # (T, H, W, 3) uint8: the first episode as the game draws it, if asked for, up to those bounds

    def summary(self) -> dict[str, float | list[float] | int]:
        """Mean, standard deviation (population), median and everything they are made of."""
        values = np.array(self.returns)
        return {
            "episodes": len(values), "mean": float(values.mean()), "std": float(values.std()),
            "median": float(np.median(values)), "mean_length": float(np.mean(self.lengths)), "returns": self.returns,
        }  # fmt: skip


class Acting(Protocol):
    """Whoever plays N games at once; `Player` is one."""

    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray: ...


def evaluate_policy(
    player: Acting, games: Games, episodes: int, *, seed: int, film: bool = False,
    tell: Callable[[int, float | None, int], None] = lambda done, mean, longest: None,
) -> Evaluation:  # fmt: skip
    """Plays exactly `episodes` episodes, numbered 0.. and begun in that order; rows without work play on unrecorded.

    After every step `tell` hears how many have ended, their mean, and how many steps the longest one still played has.
    """
    returns, lengths = [0.0] * episodes, [0] * episodes
    row_episode = list(range(games.num_envs))  # the episode each row plays; past the last one it does not count
    begun, pictures, finished = games.num_envs, list[np.ndarray](), list[float]()
    frames = games.reset([evaluation_seed(seed, number) for number in row_episode])
    is_first = np.ones(games.num_envs, dtype=bool)
    while len(finished) < episodes:
        if film and row_episode[0] == 0 and len(pictures) < FILMED:
            pictures.append(games.render(0))
            film = pictures[0].nbytes * (len(pictures) + 1) <= FILM_BYTES
        brought = games.step(player.act(frames, is_first))
        frames, is_first = brought.frame, brought.done
        for row, number in enumerate(row_episode):
            if number >= episodes:
                continue
            returns[number] += float(brought.score[row])
            lengths[number] += 1
            if brought.done[row]:
                finished.append(returns[number])
        going = [lengths[number] for row, number in enumerate(row_episode) if number < episodes and not is_first[row]]
        tell(len(finished), sum(finished) / len(finished) if finished else None, max(going, default=0))
        done = np.flatnonzero(brought.done).tolist()
        if done:
            for row in done:
                row_episode[row], begun = begun, begun + 1
            frames = games.reset([evaluation_seed(seed, row_episode[row]) for row in done], done)
    return Evaluation(returns, lengths, np.array(pictures, np.uint8))
