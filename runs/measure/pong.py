"""Pong's ball in pictures of 64x64: where the console's memory and its full picture say it is, and where it is shown.

Positions are (x, y) of the ball's centre in pixels of the 64x64 picture; pixel (0, 0) has its centre at (0, 0).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from envs.atari import means
from envs.errors import UserError
from envs.games import GameConfig
from envs.gym import find
from runs.measure.atari import THINGS, WHITE, Emulator, find_pong_ball

SIZE = 64
SCALE = np.array([SIZE / 160, SIZE / 210])  # from the console's pixels, x and y
FIELD = slice(34, 194)  # the console's rows between the white walls
BALL = THINGS["pong"]["ball"]


class Truth(NamedTuple):
    """A ball that is in play and wholly visible."""

    centre: np.ndarray  # (2,) of its white pixels in the console's full picture
    memory_gap: float  # distance to where the console's memory says it is


class Mirror(Emulator):
    """The emulator of a run whose frames show the ball. Raises UserError for settings that it does not repeat."""

    def __init__(self, env: str, config: GameConfig, seed: int) -> None:
        asked = means(find(env, config.kwargs))
        if asked["game"] != "pong" or config.gray or config.frame_size != (SIZE, SIZE) or config.noops:
            wanted = f"of Pong with game.gray=false, game.size={SIZE} and no game.noops"
            raise UserError(f"The ball can be measured in runs {wanted}, not in this one of {env}.")
        super().__init__(env, config, seed)

    def ball(self) -> Truth | None:
        """The ball, if by the console's memory it is in play and a whole one is visible between the walls."""
        x, y = BALL.bytes
        assert y is not None
        if (self.memory[:, y] == 0).any():
            return None
        rows, columns = np.nonzero((self.picture[FIELD] == WHITE).all(-1))
        if len(rows) < 8:
            return None
        centre = np.array([columns.mean(), rows.mean() + FIELD.start])
        gap = np.linalg.norm((centre - self.memory[:, [x, y]].mean(0) - BALL.offset) * SCALE)
        return Truth(_to_small(centre), float(gap))


def find_ball(frame: np.ndarray) -> np.ndarray | None:
    """The ball in a picture (3, 64, 64) of pixels up to 255, anywhere between the walls; None when there is none."""
    found = find_pong_ball(frame)
    return _to_small(found[0]) if found else None


def _to_small(centre: np.ndarray) -> np.ndarray:
    return (centre + 0.5) * SCALE - 0.5
