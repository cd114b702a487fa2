"""Where the things of an Atari game are: by the console's memory, and by the pixels of a picture of any size.

Shapes: K the emulator frames a picture is made of (1 or 2), C H W picture. Places are (x, y) in the console's own
pixels, whose picture is 210 high and 160 wide; pixel (0, 0) has its centre at (0, 0). The bytes of the memory are those
that Anand et al. 2019 (AtariARI) name; where the thing is drawn from there was measured on frames, and a test holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ale_py
import cv2
import numpy as np
from ale_py import roms

from envs.atari import is_atari, means, rom, timing
from envs.errors import UserError
from envs.games import GameConfig
from envs.gym import find

HEIGHT, WIDTH = 210, 160
SECOND = 0.5  # of the first one's amount, from which on a person sees another
Find = Callable[[np.ndarray], list[np.ndarray]]


class Emulator:
    """A plain emulator that repeats an episode of `AtariGames` without no-ops, and whose memory can be read.

    An agent step's picture is the maximum of its last two frames, so what flies is as long as its way in one frame;
    its place is the mean of the two.
    """

    def __init__(self, env: str, config: GameConfig, seed: int) -> None:
        found = find(env, config.kwargs)
        if not is_atari(found, config):
            raise UserError(f"{env} with these settings is not what a plain emulator plays, so that no truth is known.")
        asked = means(found)
        repeat, sticky = timing(found, config)
        assert isinstance(repeat, int)  # see is_atari
        self.repeat = repeat
        self.size = config.frame_size
        self.console = ale_py.ALEInterface()
        self.console.setFloat("repeat_action_probability", sticky)
        self.console.setInt("random_seed", seed)
        path = roms.get_rom_path(asked["game"])
        assert path is not None  # the games play it
        self.console.loadROM(path)
        self.console.reset_game()
        full = asked["full_action_space"]
        self.actions = self.console.getLegalActionSet() if full else self.console.getMinimalActionSet()
        self.picture = self.console.getScreenRGB()  # (210, 160, 3): the maximum of the last two frames
        self.memory = self.console.getRAM()[None].astype(float)  # (K, 128) after each of them

    def step(self, action: int) -> None:
        """One agent step."""
        screens, memory, last = [self.picture], list(self.memory), min(self.repeat, 2)
        for left in reversed(range(self.repeat)):
            self.console.act(self.actions[action])
            if self.console.game_over():
                break
            if left < last:
                screens.append(self.console.getScreenRGB())
                memory.append(self.console.getRAM().astype(float))
        # The vector environment keeps its older picture where the game ends within the step.
        self.picture, self.memory = np.maximum.reduce(screens[-last:]), np.stack(memory[-last:])

    def frame(self) -> np.ndarray:
        """The picture in colour as the agent gets it, (3, H, W) uint8."""
        small = cv2.resize(self.picture, self.size[::-1], interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(small.transpose(2, 0, 1))


class Thing(NamedTuple):
    """Something of a game that has a place."""

    bytes: tuple[int, int | None]  # of the memory: x and y; without one it moves sideways only
    offset: tuple[float, float]  # from these bytes to its centre; the centre's y where there is no byte
    within: tuple[float, float, float, float]  # x from, x to, y from, y to: centres with which all of it is to be seen
    find: Find  # a picture (3, H, W) of pixels up to 255 -> its places, the likeliest first; empty when it is not there

    def place(self, memory: np.ndarray) -> np.ndarray:
        """Where it is by the memory (K, 128): (2,), NaN when it is not to be seen, or not as a whole."""
        x, y = self.bytes
        at = np.stack([memory[:, x], memory[:, y] if y is not None else np.zeros(len(memory))], 1) + self.offset
        left, right, top, bottom = self.within
        seen = (at[:, 0] >= left) & (at[:, 0] <= right) & (at[:, 1] >= top) & (at[:, 1] <= bottom)
        return at.mean(0) if seen.all() else np.full(2, np.nan)


def scale(frame: np.ndarray) -> np.ndarray:
    """Pixels of a frame (C, H, W) in one of the console's, x and y."""
    return np.array([frame.shape[2] / WIDTH, frame.shape[1] / HEIGHT])


def cutout(frame: np.ndarray, top: int, bottom: int, left: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (h, w, 3) that show nothing but these of the console's rows and columns, and (x, y) of the first."""
    width, height = scale(frame)
    rows = slice(int(np.ceil(top * height)), int(bottom * height))
    columns = slice(int(np.ceil(left * width)), int(right * width))
    return frame[:, rows, columns].transpose(1, 2, 0).astype(np.float64), np.array([columns.start, rows.start])


def to_console(place: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """A place in a frame's pixels as one in the console's."""
    return (place + 0.5) / scale(frame) - 0.5


def spots(amount: np.ndarray, least: float, window: tuple[int, int] = (3, 3)) -> list[np.ndarray]:
    """Places (x, y) of things in a map (h, w) of how much of one a pixel shows, the clearest first.

    `window`, odd numbers of pixels wide and high, is as large as a thing. Where most is in it, at least `least`, is the
    first one, at the centre of gravity; others are a window away from those before.
    """
    wide, high = window
    sums = cv2.boxFilter(amount, -1, window, normalize=False, borderType=cv2.BORDER_CONSTANT)
    padded, found = np.pad(amount, ((high // 2, high // 2), (wide // 2, wide // 2))), list[np.ndarray]()
    across, down = np.arange(wide) - wide // 2, np.arange(high) - high // 2
    while True:
        y, x = np.unravel_index(sums.argmax(), sums.shape)
        if sums[y, x] < least:
            return found
        least = max(least, SECOND * sums[y, x] if not found else 0.0)
        part = padded[y : y + high, x : x + wide].clip(0)
        found.append(np.array([x, y]) + np.array([part.sum(0) @ across, part.sum(1) @ down]) / part.sum())
        sums[max(0, y - high) : y + high + 1, max(0, x - wide) : x + wide + 1] = -np.inf


# ---- Pong ----
BALL = 2 * 4  # of the console's pixels, as in Breakout
FLOOR, WHITE = np.array([144.0, 72, 17]), np.array([236.0, 236, 236])
PADDLES = np.array([[213.0, 130, 74], [92, 186, 92]])
# Pixels are mixtures of these four colours. This direction of colour space is 0 for floor and paddles, 1 for white.
WHITENESS = np.cross(PADDLES[0] - FLOOR, PADDLES[1] - FLOOR)
WHITENESS /= (WHITE - FLOOR) @ WHITENESS
LEAST = 1 / 3  # of a thing at rest, from which on there is one


def find_pong_ball(frame: np.ndarray) -> list[np.ndarray]:
    """Anywhere between the white walls; paddles are not white."""
    pixels, corner = cutout(frame, 34, 194, 0, 160)
    white = (pixels - FLOOR) @ WHITENESS
    return [to_console(place + corner, frame) for place in spots(white, BALL * scale(frame).prod() * LEAST)]


PADDLE, FLIGHT = 4 * 16, 16  # of the console's pixels, and how far it flies in a frame


def find_pong_paddle(frame: np.ndarray) -> list[np.ndarray]:
    """The agent's, along the columns that are its own; where it flies, green over floor is as green as at rest."""
    pixels, corner = cutout(frame, 34, 194, 136, 148)
    green = ((pixels[..., 1] - FLOOR[1]) / (PADDLES[1] - FLOOR)[1]).clip(0, 1)
    tall = 2 * int((16 + FLIGHT) * scale(frame)[1] // 2) + 1
    found = spots(green, PADDLE * scale(frame).prod() * LEAST, (2 * (pixels.shape[1] // 2) + 1, tall))
    return [to_console(place + corner, frame) for place in found]


# ---- Breakout ----
def _red(pixels: np.ndarray) -> np.ndarray:
    """1 for ball, paddle and the upper bricks (200, 72, 72), 0 for the black ground and the gray walls."""
    return np.asarray((pixels[..., 0] - pixels[..., 1]) / 128)


def find_breakout_ball(frame: np.ndarray) -> list[np.ndarray]:
    """Between the bricks and the paddle; above, it has the bricks' colour."""
    pixels, corner = cutout(frame, 94, 189, 8, 152)
    return [to_console(place + corner, frame) for place in spots(_red(pixels), BALL * scale(frame).prod() * LEAST)]


def find_breakout_paddle(frame: np.ndarray) -> list[np.ndarray]:
    """Along the row that is its own."""
    width, height = scale(frame)
    row = round(191 * height - 0.5)
    columns = slice(int(np.ceil(8 * width)), int(152 * width))
    there = np.flatnonzero(_red(frame[:, row, columns].T.astype(np.float64)) > 0.4)
    parts = sorted(np.split(there, np.flatnonzero(np.diff(there) > 1) + 1), key=len, reverse=True)
    least = max(8 * width / 2, SECOND * len(parts[0]))  # a ball that passes beside it is shorter
    places = [np.array([part.mean() + columns.start, row]) for part in parts if len(part) >= least]
    return [np.array([to_console(place, frame)[0], 191.0]) for place in places]


# ---- Boxing ----
BOXER = 320  # of the console's pixels: the smallest that either is drawn with
BODY = np.array([17.0, 43.0])  # wide and high, without the arm that is stretched out


def _find_boxer(frame: np.ndarray, *, white: bool) -> list[np.ndarray]:
    pixels, corner = cutout(frame, 36, 178, 30, 130)
    blue, green = pixels[..., 2], pixels[..., 1]
    amount = (blue - 66) / (214 - 66) if white else (156 - green) / 156  # the ring is (110, 156, 66)
    wide, high = (2 * int(side // 2) + 1 for side in BODY * scale(frame))
    found = spots(amount.clip(0, 1), BOXER * scale(frame).prod() * LEAST, (wide, high))
    return [to_console(place + corner, frame) for place in found]


def find_white_boxer(frame: np.ndarray) -> list[np.ndarray]:
    """The agent's boxer."""
    return _find_boxer(frame, white=True)


def find_black_boxer(frame: np.ndarray) -> list[np.ndarray]:
    """The opponent."""
    return _find_boxer(frame, white=False)


ANYWHERE = (0.0, float(WIDTH), 0.0, float(HEIGHT))
THINGS: dict[str, dict[str, Thing]] = {  # by the console's name of the game
    "pong": {
        "ball": Thing((49, 54), (-48.5, -12.5), (1, 158, 36, 192), find_pong_ball),
        "paddle": Thing((46, 51), (-46.5, -6.0), (0, 255, 42, 184), find_pong_paddle),
    },
    "breakout": {
        "ball": Thing((99, 101), (-48.5, 10.5), (10, 150, 97, 186), find_breakout_ball),
        "paddle": Thing((72, None), (-39.5, 191), (16, 143, 191, 191), find_breakout_paddle),
    },
    "boxing": {
        "white": Thing((32, 34), (11.2, 60.7), ANYWHERE, find_white_boxer),
        "black": Thing((33, 35), (9.7, 60.0), ANYWHERE, find_black_boxer),
    },
}


def things(env: str, channels: int) -> dict[str, Thing]:
    """What can be followed in a game; nothing in other games, or without colours."""
    return THINGS.get(rom(env), {}) if channels == 3 else {}


def places(env: str, config: GameConfig, seed: int, actions: np.ndarray, frames: np.ndarray) -> dict[str, np.ndarray]:
    """Where every thing is along an episode whose frames (n + 1, 3, H, W) the games have shown: (n + 1, 2) each.

    Raises RuntimeError when the emulator that tells does not show what the games show.
    """
    emulator, named = Emulator(env, config, seed), things(env, frames.shape[1])
    found = {name: np.full((len(frames), 2), np.nan) for name in named}
    for t in range(len(frames)):
        if t:
            emulator.step(int(actions[t - 1]))
        if t % 50 == 0 and not np.array_equal(emulator.frame(), frames[t]):
            raise RuntimeError(f"a frame of {env} is not what the plain emulator shows")
        for name, thing in named.items():
            found[name][t] = thing.place(emulator.memory)
    return found
