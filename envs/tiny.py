"""Tiny deterministic games for tests: one that counts, and one to catch falling blocks in."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

Info = dict[str, Any]
SIZE = 64  # pixels, both sides
BALL, PADDLE = (255, 255, 255), (160, 160, 160)


def register() -> None:
    """Makes Count-v0, Catch-v0 and CatchContinuous-v0 known to gymnasium."""
    for name in ("Count", "Catch", "CatchContinuous"):
        if f"{name}-v0" not in gymnasium.registry:
            gymnasium.register(id=f"{name}-v0", entry_point=f"envs.tiny:{name}")


class Count(gymnasium.Env[np.ndarray, Any]):
    """Shows the number of its step as 4 x 4 bits, black or white blocks, lowest bit first in reading order.

    The reward of the action taken on seeing number t is 1 when t + action is odd, else 0, so that recorded frames,
    actions and rewards show whether they belong together. It ends at `length` steps.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}
    action_names = ("EVEN", "ODD")

    def __init__(self, length: int = 20, render_mode: str | None = None) -> None:
        self.length = length
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(2)
        self.observation_space = spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.count = 0

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        """Begins at 0, whatever the seed."""
        super().reset(seed=seed)
        self.count = 0
        return self.render(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Info]:
        """Counts on by one."""
        reward = float((self.count + int(action)) % 2)
        self.count += 1
        return self.render(), reward, self.count >= self.length, False, {}

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Returns the picture of the current number, (64, 64, 3) uint8."""
        bits = (self.count >> np.arange(16)) & 1
        blocks = np.kron(bits.reshape(4, 4), np.ones((SIZE // 4, SIZE // 4)))
        return np.repeat((blocks * 255).astype(np.uint8)[:, :, None], 3, axis=2)


def counted(frame: np.ndarray) -> int:
    """Reads the number from a frame of Count-v0: (C, H, W) uint8 of any size, gray or RGB."""
    high, wide = (side // 4 for side in frame.shape[-2:])
    bits = frame[0, high // 2 :: high, wide // 2 :: wide][:4, :4].reshape(-1) > 127
    return int((bits << np.arange(16)).sum())


class Catch(gymnasium.Env[np.ndarray, Any]):
    """Catch blocks that fall down a board of 8 x 8 cells with a paddle one cell wide: +1 caught, -1 missed.

    A block falls one cell a step and shows where it lands for one frame; then the next one appears in a column drawn
    from the episode's seed. The paddle can always be there in time. An episode is 10 blocks, the best score is 10.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 8}
    action_names: tuple[str, ...] = ("LEFT", "STAY", "RIGHT")
    reach = 0.5  # cells between paddle and block up to which it is caught

    def __init__(self, cells: int = 8, blocks: int = 10, render_mode: str | None = None) -> None:
        self.cells = cells
        self.blocks = blocks
        self.render_mode = render_mode
        self.action_space: spaces.Space[Any] = spaces.Discrete(3)
        self.observation_space = spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        """Begins with the paddle in a random column."""
        super().reset(seed=seed)
        self.paddle = float(self.np_random.integers(self.cells))
        self.column = int(self.np_random.integers(self.cells))
        self.row, self.fallen = 0, 0
        return self.render(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, Info]:
        """Moves the paddle, then the block."""
        self.paddle = float(np.clip(self.paddle + self._move(action), 0, self.cells - 1))
        reward = 0.0
        if self.row == self.cells - 1:
            self.row, self.column = 0, int(self.np_random.integers(self.cells))
        else:
            self.row += 1
        if self.row == self.cells - 1:
            reward = 1.0 if abs(self.paddle - self.column) <= self.reach else -1.0
            self.fallen += 1
        return self.render(), reward, self.fallen >= self.blocks, False, {}

    def _move(self, action: Any) -> float:
        return float(int(action) - 1)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Returns the board, (64, 64, 3) uint8."""
        picture = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
        cell = SIZE // self.cells
        left = round(self.paddle * cell)
        picture[(self.cells - 1) * cell : self.cells * cell, left : left + cell] = PADDLE
        # The block is drawn over the paddle, smaller, so that a catch still shows both.
        top, edge = self.row * cell, max(1, cell // 4)
        picture[top : top + cell - edge, self.column * cell + edge : (self.column + 1) * cell - edge] = BALL
        return picture

    def get_keys_to_action(self) -> dict[tuple[str, ...], Any]:
        """Returns a and d to move, e to stay."""
        return {("a",): 0, ("e",): 1, ("d",): 2}


class CatchContinuous(Catch):
    """Catch with a paddle that moves by any part of a cell, up to one, a step."""

    action_names = ("velocity",)

    def __init__(self, cells: int = 8, blocks: int = 10, render_mode: str | None = None) -> None:
        super().__init__(cells, blocks, render_mode)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def _move(self, action: Any) -> float:
        return float(np.clip(np.asarray(action).reshape(-1)[0], -1, 1))

    def get_keys_to_action(self) -> dict[tuple[str, ...], Any]:
        """Returns a and d to move at full speed, e to stay."""
        return {(key,): np.array([speed], np.float32) for key, speed in (("a", -1), ("e", 0), ("d", 1))}
