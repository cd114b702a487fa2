"""Games of very different lengths in which every action counts, an agent that plays them, and ways for it to fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from agent.player import Agent
from agent.population import FixedLearner
from envs.errors import UserError
from envs.games import GameConfig, Games, Played, Transition
from envs.spec import Spec
from policies.linear import Linear
from runs.recipes import RECIPES

SPEC = Spec((1, 64, 64), 3, True)


def length(seed: int) -> int:
    """Steps of the episode with that seed."""
    return 2 + seed % 13


class Uneven(Games):
    """Shows blocks drawn from (seed, step); an action scores itself times the step. `trap` is called at every step."""

    spec = SPEC

    def __init__(self, num_envs: int, trap: Callable[[int], None] = lambda steps: None) -> None:
        super().__init__("Uneven", num_envs, config=GameConfig())
        self.seeds, self.at, self.trap, self.steps = [0] * num_envs, [0] * num_envs, trap, 0

    def _restart(self, rows: list[int], seeds: list[int]) -> np.ndarray:
        for row, seed in zip(rows, seeds, strict=True):
            self.seeds[row], self.at[row] = seed, 0
        return self._frames()

    def _play(self, actions: np.ndarray) -> Played:
        self.at = [at + 1 for at in self.at]
        done = np.array([at == length(seed) for at, seed in zip(self.at, self.seeds, strict=True)])
        never = np.zeros(self.num_envs, bool)
        return Played(self._frames(), (actions * self.at).astype(np.float32), done, never, never)

    def _frames(self) -> np.ndarray:
        where = zip(self.seeds, self.at, strict=True)
        drawn = [np.random.default_rng(place).integers(256, size=(1, 8, 8)) for place in where]
        return np.stack(drawn).astype(np.uint8).repeat(8, 2).repeat(8, 3)

    def step(self, actions: np.ndarray) -> Transition:
        self.steps += 1
        self.trap(self.steps)
        return super().step(actions)

    def render(self, row: int = 0) -> np.ndarray:
        return self._frames()[row].transpose(1, 2, 0).repeat(3, 2)

    def close(self) -> None: ...


def agent(seed: int = 0) -> Agent:
    """A world model nobody has trained, and a linear policy."""
    torch.manual_seed(seed)
    world_model = RECIPES["reverie"]("toy").model.build(SPEC)
    return Agent(world_model, FixedLearner(Linear(world_model.feature_size, SPEC)))


def make(num_envs: int = 3, trap: str = "", folder: Path = Path()) -> tuple[Agent, Games]:
    """What a process plays with. Traps: "dies" once, "hangs" in its first step and says so, "refuses"."""
    if trap == "refuses":
        raise UserError("This game cannot be played here.")
    here = folder / str(os.getpid())

    def dies(steps: int) -> None:
        if steps == 60 and not any(folder.iterdir()):
            here.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def hangs(steps: int) -> None:
        here.touch()
        while True:
            pass

    return agent(), Uneven(num_envs, {"dies": dies, "hangs": hangs, "": lambda steps: None}[trap])
