"""Candidates of a population judged in the real game: whole episodes, the same ones for every candidate.

Shapes: K candidates of n numbers each, N rows of games; P candidates of a population on R seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.player import Agent, Player
from envs.games import Games
from policies.interface import Learner, Policy, Rollout, Trajectory, Update
from policies.linear import Linear, Population
from world_model.interface import Objective


class Task(NamedTuple):
    """One episode: who plays it, and the seed it begins with."""

    candidate: int
    seed: int


class Played(NamedTuple):
    """What every task brought, in their order."""

    returns: np.ndarray  # (tasks,) float64, in the game's units
    lengths: np.ndarray  # (tasks,) int64, agent steps


Play = Callable[[np.ndarray, Sequence[Task]], Played]


class FixedLearner(Learner):
    """A policy that is not improved here: a population's, which whoever sent it improves, or random play."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def objectives(self) -> tuple[Objective, ...]:
        return ()

    def plan(self, *, last: bool, only: str = "") -> tuple[tuple[str, int], ...]:
        return ()

    def improve(self, rollout: Rollout, update: Update) -> dict[str, Tensor]:
        raise RuntimeError("this policy is not improved here")


def play_tasks(agent: Agent, games: Games, candidates: np.ndarray, tasks: Sequence[Task]) -> Played:
    """Plays every task once, `games.num_envs` of them in lock step; a row that ends takes the next or idles.

    Candidates (K, n) replace the numbers of the agent's own policy, whose kind they are; they act greedily.
    Raises ValueError when that policy is not linear or has another n.
    """
    like, count = agent.learner.policy, len(tasks)
    if not isinstance(like, Linear):
        raise ValueError(f"candidates are numbers of a linear policy, and this agent's is {type(like).__name__}")
    returns, lengths = np.zeros(count), np.zeros(count, np.int64)
    if not count:
        return Played(returns, lengths)
    vectors = torch.from_numpy(np.ascontiguousarray(candidates, np.float32))
    row_task = list(range(games.num_envs))  # the task each row plays; past the last one it idles and does not count
    at_first = [tasks[min(number, count - 1)] for number in row_task]
    population = Population(like, vectors[[task.candidate for task in at_first]])
    player = Player(Agent(agent.world_model, FixedLearner(population)), greedy=True)
    frames, is_first = games.reset([task.seed for task in at_first]), np.ones(games.num_envs, bool)
    begun, finished = games.num_envs, 0
    while finished < count:
        brought = games.step(player.act(frames, is_first))
        frames, is_first = brought.frame, brought.done
        for row, number in enumerate(row_task):
            if number < count:
                returns[number] += float(brought.score[row])
                lengths[number] += 1
                finished += bool(brought.done[row])
        done = np.flatnonzero(brought.done).tolist()
        for row in done:
            row_task[row], begun = begun, begun + 1
        if done:
            following = [tasks[min(row_task[row], count - 1)] for row in done]
            for row, task in zip(done, following, strict=True):
                population.replace(row, vectors[task.candidate])
            frames = games.reset([task.seed for task in following], done)
    return Played(returns, lengths)


def rollout(play: Play, seeds: Sequence[int]) -> Rollout:
    """A population's rollout in the real game, every candidate on the same R seeds.

    The trajectory's rows (P * R) go candidate by candidate; each is one step whose reward is the whole return. What was
    seen and done is not kept: view (P * R, 0, 0), action (P * R, 0).
    """

    def judge(policy: Policy) -> Trajectory:
        if not isinstance(policy, Population):
            raise ValueError(f"only a population is judged in the real game, not {type(policy).__name__}")
        vectors = torch.cat([policy.weight.flatten(1), policy.bias], 1)  # (P, n)
        tasks = [Task(candidate, seed) for candidate in range(policy.population_size) for seed in seeds]
        returns = torch.from_numpy(play(vectors.cpu().numpy(), tasks).returns)
        reward = returns.to(vectors.device, torch.float32).unsqueeze(1)  # (P * R, 1)
        empty = reward.new_empty(len(tasks), 0)
        return Trajectory(view=empty.unsqueeze(2), action=empty, reward=reward, cont=torch.ones_like(reward))

    return judge
