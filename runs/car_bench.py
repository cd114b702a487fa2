"""What a step of CarRacing costs on one core: `python -m runs.car_bench [steps=600] [seed=0]`.

Three ways to the same frames: gymnasium's own environment, any game's way in `envs.gym`, and CarRacing's own in
`envs.car_racing`, alone and with an action repeat. Counted is the processor time of this process and not the clock, so
that other work on the machine changes little. The ways take turns on the same actions, and the best turn counts.
Writes runs/out/car-racing.json.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from rich.console import Console

from envs.errors import UserError
from envs.games import GameConfig, Games
from envs.gym import GymGames
from runs import compose
from runs.progress import as_table
from runs.run import keep

ENV = "CarRacing-v3"
REPEAT = 4  # of the last row

Play = Callable[[np.ndarray], None]  # one action, (3,) float32 in [-1, 1]


@dataclass(frozen=True)
class BenchConfig:
    """What the command takes."""

    steps: int = 600  # of the agent, in each way
    seed: int = 0  # of the track and of the actions
    turns: int = 6

    def check(self) -> None:
        """Raises UserError for values out of range."""
        if not (1 <= self.turns <= 100 and self.turns <= self.steps <= 900):
            raise UserError("turns must be between 1 and 100, steps between turns and 900 (an episode has 1000).")


def own(seed: int) -> Play:
    """Gymnasium's environment as it is, with its 96x96 observation."""
    game = gymnasium.make(ENV, render_mode="rgb_array", disable_env_checker=True)
    game.reset(seed=seed)

    def play(action: np.ndarray) -> None:
        ended = game.step(np.array([action[0], *(action[1:] + 1) / 2], np.float32))[2]
        if ended:
            game.reset(seed=seed)

    return play


def through(games: Games, seed: int) -> Play:
    """One row of any `Games`."""
    games.reset([seed])

    def play(action: np.ndarray) -> None:
        if games.step(action[None]).over[0]:
            games.reset([seed])

    return play


def measure(asked: BenchConfig) -> list[dict[str, Any]]:
    """One row a way: milliseconds of processor time a game step, steps a second, how many times gymnasium's speed."""
    config, repeated = GameConfig(gray=False), f"CarRacing, action repeat {REPEAT}"
    ways = {
        "gymnasium": own(asked.seed),
        "any game": through(GymGames(ENV, 1, config=config), asked.seed),
        "CarRacing": through(config.build(ENV, 1), asked.seed),
        repeated: through(GameConfig(gray=False, action_repeat=REPEAT).build(ENV, 1), asked.seed),
    }
    rng = np.random.default_rng(asked.seed)
    held = rng.uniform(-1, [1, 1, -0.5], (asked.steps // 8 + 1, 3)).astype(np.float32)  # the brake is mostly off
    turns = np.array_split(np.repeat(held, 8, axis=0)[: asked.steps], asked.turns)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for actions in turns:
        for name, play in ways.items():
            began = time.process_time()
            for action in actions:
                play(action)
            steps = len(actions) * (REPEAT if name == repeated else 1)  # of the game
            taken[name].append((time.process_time() - began) / steps)
    # The first turn shows the whole field and zooms in: slower in every way, and so in the mean and not in the best.
    base = min(taken["gymnasium"])
    return [
        {
            "way": name,
            "cpu_ms_per_step": round(1e3 * min(each), 3),
            "cpu_ms_per_step_mean": round(1e3 * sum(each) / len(each), 3),
            "steps_per_cpu_second": round(1 / min(each), 1),
            "times_gymnasium": round(base / min(each), 2),
        }
        for name, each in taken.items()
    ]


def main(words: Sequence[str]) -> None:
    """Measures, prints and writes; raises UserError without Box2D."""
    asked = compose.changed(BenchConfig(), words)
    GameConfig().build(ENV, 1).close()  # says in one sentence what is missing
    before = os.getloadavg()
    rows = measure(asked)
    found = {"threads": 1, "load_before": [round(load, 2) for load in before], "rows": rows}
    path = keep(None, "car-racing", {"env": ENV, "seed": asked.seed} | found)
    console = Console(highlight=False)
    console.print(as_table(f"{ENV}, one copy, one core", rows))
    console.print(f"written to {path}", soft_wrap=True)


if __name__ == "__main__":
    from runs.guard import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
