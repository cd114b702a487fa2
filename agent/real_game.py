"""The real game as a place where a population learns: new tracks each generation, the same for every candidate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from agent.player import Agent
from agent.population import Played, Task, rollout
from agent.seeds import TRACK_SEED, episode_seed
from agent.workers import EvaluationPool, weights_of
from policies.interface import Rollout


class RealGame:
    """Judges populations in the real game, by `rollouts` episodes a candidate.

    `episodes` and `steps` count what was played for it: none of it goes into the replay.
    """

    def __init__(self, crew: EvaluationPool, *, rollouts: int, seed: int) -> None:
        self.crew, self.rollouts, self.seed = crew, rollouts, seed
        self.generations = self.episodes = self.steps = 0
        self.stop: Callable[[], bool] = lambda: False

    def rollout(self, agent: Agent, version: int) -> Rollout:
        """What judges the next generation. `version` names the world model's weights: others, another number."""
        first = self.generations * self.rollouts
        seeds = [episode_seed(self.seed + TRACK_SEED, first + number) for number in range(self.rollouts)]

        def play(candidates: np.ndarray, tasks: Sequence[Task]) -> Played:
            played = self.crew.play(weights_of(agent.world_model), version, candidates, tasks, stop=self.stop)
            self.generations += 1
            self.episodes += len(tasks)
            self.steps += int(played.lengths.sum())
            return played

        return rollout(play, seeds)

    def state_dict(self) -> dict[str, int]:
        """The counters, of which the first decides about the next tracks."""
        return {"generations": self.generations, "episodes": self.episodes, "steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes back to a `state_dict`."""
        self.generations, self.episodes, self.steps = state["generations"], state["episodes"], state["steps"]

    def close(self) -> None:
        """Ends whoever plays."""
        self.crew.close()
