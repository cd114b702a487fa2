"""CarRacing as gymnasium plays it, several times as fast: see `envs.car_rendering` for how it is drawn."""

from __future__ import annotations

import copy
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from envs.games import GameConfig
from envs.gym import GymGames, make_env


def is_car_racing(found: EnvSpec) -> bool:
    """Says whether an id is gymnasium's CarRacing, whatever its arguments."""
    return found.entry_point == "gymnasium.envs.box2d.car_racing:CarRacing"


class CarRacingGames(GymGames):
    """N copies of CarRacing with the frames and rewards of `GymGames`, byte for byte.

    Its episodes are as long, but a finished lap counts as a time limit and not as an ending: no picture tells how much
    of the lap is left, so an agent that learns that endings are worth nothing comes to fear good driving. (One did: it
    reached 900, finished its laps, and twice within 20,000 steps unlearned to drive.)

    A step of the game is gymnasium's own and draws nothing. The picture is drawn once an agent step, after all of its
    action repeats, by one renderer for all copies: its surfaces then stay in the processor's cache.
    """

    def __init__(self, env: str, num_envs: int, *, config: GameConfig) -> None:
        super().__init__(env, num_envs, config=config)
        # Only now: without Box2D the line above has already said so, and this module would not load.
        from envs.car_rendering import Renderer

        self._renderer = Renderer()

    def _open(self) -> gymnasium.Env[Any, Any]:
        unrendered = copy.copy(self._found)  # the same limits and arguments
        unrendered.entry_point = "envs.car_rendering:UnrenderedCarRacing"
        return make_env(unrendered)

    def _look(self) -> Literal["observation", "render"]:
        return "observation"  # which is drawn when it is asked for

    @property
    def aspect(self) -> float:
        """Of gymnasium's own window, 1000 x 800; what the agent sees and what is filmed are that view, squeezed."""
        return 1000 / 800

    @property
    def film_aspect(self) -> float:
        return self.aspect

    def _ending(self, terminated: bool, truncated: bool, info: dict[str, Any]) -> tuple[bool, bool]:
        finished = bool(info.get("lap_finished"))
        return terminated and not finished, truncated or finished

    def _picture(self, row: int, where: str = "") -> np.ndarray:
        game: Any = self._copies[row].unwrapped
        return self._renderer.render(game)
