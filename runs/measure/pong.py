"""Pong's ball: where the console's memory and its full picture say it is, and where a 64x64 picture shows it.

Positions are (x, y) of the ball's centre in pixels of the 64x64 picture; pixel (0, 0) has its centre at (0, 0).
"""

from __future__ import annotations

from typing import NamedTuple

import ale_py
import cv2
import gymnasium
import numpy as np
from ale_py import roms

from envs.errors import UserError
from envs.games import GameConfig

SIZE = 64
SCALE = np.array([SIZE / 160, SIZE / 210])  # from the console's pixels, x and y
FIELD = slice(34, 194)  # the console's rows between the white walls
ROWS = slice(11, 59)  # the rows of the small picture that show nothing but these
RAM_X, RAM_Y = 49, 54  # bytes of the console's memory; y is 0 while no ball is in play
RAM_TO_CENTRE = np.array([-48.5, -12.5])  # from these bytes to the ball's centre in the console's pixels
BALL_AREA = 2 * 4 * SCALE.prod()  # of a ball at rest, in small pixels: 0.98

FLOOR, WHITE = np.array([144.0, 72, 17]), np.array([236.0, 236, 236])
PADDLES = np.array([[213.0, 130, 74], [92, 186, 92]])
# Pixels are mixtures of these four colours. This direction of colour space is 0 for floor and paddles, 1 for white.
WHITENESS = np.cross(PADDLES[0] - FLOOR, PADDLES[1] - FLOOR)
WHITENESS /= (WHITE - FLOOR) @ WHITENESS
LEAST = BALL_AREA / 3  # whiteness, summed over 3 x 3 pixels, from which on there is a ball


class Truth(NamedTuple):
    """A ball that is in play and wholly visible."""

    centre: np.ndarray  # (2,) of its white pixels in the console's full picture
    memory_gap: float  # distance to where the console's memory says it is


class Mirror:
    """A plain emulator that repeats an episode of `AtariGames`, and whose memory can be read.

    An agent step's picture is the maximum of its last two frames, so a flying ball is as long as its way in one frame;
    its centre is the middle of the two places.

    Raises UserError for settings that it does not repeat.
    """

    def __init__(self, env: str, config: GameConfig, seed: int) -> None:
        asked = gymnasium.spec(env).kwargs
        if asked.get("game") != "pong" or config.gray or config.frame_size != (SIZE, SIZE) or config.noops:
            wanted = f"of Pong with game.gray=false, game.size={SIZE} and no game.noops"
            raise UserError(f"The ball can be measured in runs {wanted}, not in this one of {env}.")
        self.repeat = config.action_repeat or asked["frameskip"]
        self.console = ale_py.ALEInterface()
        sticky = asked["repeat_action_probability"] if config.sticky is None else config.sticky
        self.console.setFloat("repeat_action_probability", sticky)
        self.console.setInt("random_seed", seed)
        path = roms.get_rom_path("pong")
        assert path is not None  # the games play it
        self.console.loadROM(path)
        self.console.reset_game()
        full = asked["full_action_space"]
        self.actions = self.console.getLegalActionSet() if full else self.console.getMinimalActionSet()
        self.picture = self.console.getScreenRGB()  # (210, 160, 3): the maximum of the last two frames
        self.memory = np.zeros((1, 2))  # the bytes x and y after each of them

    def step(self, action: int) -> None:
        """One agent step."""
        screens, memory, last = [self.picture], list(self.memory), min(self.repeat, 2)
        for left in reversed(range(self.repeat)):
            self.console.act(self.actions[action])
            if self.console.game_over():
                break
            if left < last:
                screens.append(self.console.getScreenRGB())
                memory.append(self.console.getRAM()[[RAM_X, RAM_Y]].astype(float))
        # The vector environment keeps its older picture where the game ends within the step.
        self.picture, self.memory = np.maximum.reduce(screens[-last:]), np.stack(memory[-last:])

    def frame(self) -> np.ndarray:
        """The picture as the agent gets it, (3, 64, 64) uint8."""
        small = cv2.resize(self.picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(small.transpose(2, 0, 1))

    def ball(self) -> Truth | None:
        """The ball, if by the console's memory it is in play and a whole one is visible between the walls."""
        if (self.memory[:, 1] == 0).any():
            return None
        rows, columns = np.nonzero((self.picture[FIELD] == WHITE).all(-1))
        if len(rows) < 8:
            return None
        centre = np.array([columns.mean(), rows.mean() + FIELD.start])
        gap = np.linalg.norm((centre - self.memory.mean(0) - RAM_TO_CENTRE) * SCALE)
        return Truth(_to_small(centre), float(gap))


def find_ball(frame: np.ndarray) -> np.ndarray | None:
    """The ball in a picture (3, 64, 64) of pixels up to 255, anywhere between the walls; None when there is none.

    Looks for the 3 x 3 pixels with most white in them and takes their centre of gravity. It is told nothing about
    where the ball should be, and paddles are not white.
    """
    white = (frame.transpose(1, 2, 0).astype(np.float64) - FLOOR)[ROWS] @ WHITENESS
    sums = cv2.boxFilter(white, -1, (3, 3), normalize=False, borderType=cv2.BORDER_CONSTANT)
    y, x = np.unravel_index(sums.argmax(), sums.shape)
    if sums[y, x] < LEAST:
        return None
    part = np.pad(white, 1)[y : y + 3, x : x + 3].clip(0)
    around = np.arange(-1, 2)
    offset = np.array([part.sum(0) @ around, part.sum(1) @ around]) / part.sum()
    return np.array([x, y + ROWS.start]) + offset


def _to_small(centre: np.ndarray) -> np.ndarray:
    return (centre + 0.5) * SCALE - 0.5
