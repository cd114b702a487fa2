"""N copies of one game in lock step: the interface, and the settings that mean the same in every game.

Shapes: N rows (copies of the game), C H W picture, A action size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from envs import settings
from envs.errors import UserError
from envs.settings import setting
from envs.spec import Spec

# What protocol=... on the command line means for the fields of GameConfig.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "default": {},
    "atari100k": {"sticky": 0.0, "noops": 30, "life_loss": True},
}


class GameFailed(UserError):
    """The game's own code went wrong while it was played, or gave what no game may give; a sentence that says where."""


class Transition(NamedTuple):
    """What one step of N games brought. All arrays have N rows and belong to the caller."""

    frame: np.ndarray  # (N, C, H, W) uint8, the picture after the action, also when the episode is done
    reward: np.ndarray  # (N,) float32, as the agent learns it: clipped when so configured
    score: np.ndarray  # (N,) float32, in the game's own units
    terminated: np.ndarray  # (N,) bool, the target of the continuation head: game over, or a life lost with life_loss
    truncated: np.ndarray  # (N,) bool, a time limit, which is not an ending
    done: np.ndarray  # (N,) bool, the row must be reset; a lost life alone does not end it


class Played(NamedTuple):
    """What a game itself brought, before the settings (clipping, life loss, time limit) are applied."""

    frame: np.ndarray  # (N, C, H, W) uint8
    score: np.ndarray  # (N,) float32
    game_over: np.ndarray  # (N,) bool
    life_lost: np.ndarray  # (N,) bool
    truncated: np.ndarray  # (N,) bool


class Trace(NamedTuple):
    """One row's episode so far, rebuilt from its seed and its n actions."""

    frame: np.ndarray  # (n + 1, C, H, W) uint8
    reward: np.ndarray  # (n,) float32
    score: np.ndarray  # (n,) float32
    terminated: np.ndarray  # (n,) bool
    truncated: np.ndarray  # (n,) bool


@dataclass(frozen=True)
class GameConfig:
    """How the game is shown and played; `None` keeps what the gymnasium id itself means."""

    size: int | str = setting(64, help="frame size in pixels: one number for both sides, or height x width like 84x64")
    gray: bool = setting(True, help="grayscale frames, one channel instead of three (grayscale_obs)")
    sticky: float | None = setting(
        None,
        0,
        1,
        help="sticky actions: probability that the emulator repeats the previous action; not given: "
        "the id's, 0.25 of Atari's v5",
    )
    noops: int | None = setting(
        None,
        0,
        1000,
        help="no-op starts: a game begins with 1 to so many no-ops, in emulator frames, drawn from its seed (noop_max)",
    )
    action_repeat: int | None = setting(
        None, 1, 100, help="emulator frames of an agent step (frame_skip); not given: the id's, 4 of Atari's v5"
    )
    life_loss: bool = setting(
        False,
        help="a lost life is terminal for learning (terminal_on_life_loss); the game goes on, and "
        "scores are of whole games",
    )
    clip_rewards: bool = setting(
        False, help="learn from rewards clipped to [-1, 1], which dreams then pay; scores stay in the game's units"
    )
    max_steps: int | None = setting(
        None, 1, resumable=True, help="time limit of an episode, in agent steps (max_episode_steps)"
    )
    num_envs: int = setting(8, 1, 4096, help="parallel environments, stepped together")
    kwargs: dict[str, Any] = setting({}, help="arguments of gymnasium.make, as {name: value, ...}")

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels. Raises UserError when `size` names none."""
        sides = str(self.size).split("x")
        if len(sides) > 2 or not all(side.isdecimal() and 8 <= int(side) <= 1024 for side in sides):
            form = "one number for both sides, or height x width like 84x64"
            raise UserError(f'game.size must be between 8 and 1024 pixels, {form}, not "{self.size}".')
        return int(sides[0]), int(sides[-1])

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a frame. Raises UserError when `size` names no height and width."""
        return (1 if self.gray else 3, *self.frame_size)

    @property
    def picture(self) -> str:
        """The frame for a person: "64x64 gray", height x width."""
        height, width = self.frame_size
        return f"{height}x{width} {'gray' if self.gray else 'RGB'}"

    def check(self) -> None:
        """Raises UserError naming the first setting that is out of range."""
        _ = self.frame_size
        settings.check(self, "game.")


class Games(ABC):
    """N copies of one game. Never resets a row by itself; an episode is a pure function of (seed, actions).

    Subclasses set the public attributes below and give `_restart` and `_play`; the settings that mean the same in
    every game (reward clipping, life loss, time limit) are applied here, once.
    """

    spec: Spec
    description: str  # for a person: "4 frames a step, sticky 0.25, 6 actions, 64x64 gray"
    action_names: tuple[str, ...]  # one per choice, or one per continuous dimension
    action_low: np.ndarray | None = None  # (A,) in its own type, the game's bounds of continuous actions
    action_high: np.ndarray | None = None

    def __init__(self, env: str, num_envs: int, *, config: GameConfig) -> None:
        self.env = env
        self.num_envs = num_envs
        self.config = config
        self._length = np.zeros(num_envs, dtype=np.int64)
        self._done = np.ones(num_envs, dtype=bool)  # nothing has begun

    @abstractmethod
    def _restart(self, rows: list[int], seeds: list[int]) -> np.ndarray:
        """Restarts the rows, one seed in [0, 2**31) each; returns all rows' current frames (N, C, H, W) uint8."""

    @abstractmethod
    def _play(self, actions: np.ndarray) -> Played:
        """Plays one checked action in every row."""

    @abstractmethod
    def render(self, row: int = 0) -> np.ndarray:
        """Returns the game's own full colour picture of a row, (H, W, 3) uint8."""

    @abstractmethod
    def close(self) -> None:
        """Frees the emulators."""

    @property
    def aspect(self) -> float:
        """Width by height at which a screen shows what the agent sees, however many pixels that has."""
        return 1.0

    @property
    def film_aspect(self) -> float:
        """The same of what `render` gives."""
        return self.aspect

    def keys_to_action(self) -> dict[tuple[str, ...], Any] | None:
        """Returns which keys held together mean which action (as `step` takes it), or None when the game names none."""
        return None

    @property
    def done(self) -> np.ndarray:
        """Which rows (N,) bool must be reset before the next step."""
        return self._done.copy()

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Restarts the named rows (all when None), one seed each; the others are left alone.

        Returns the current frames of all rows, (N, C, H, W) uint8.
        """
        chosen = list(range(self.num_envs)) if rows is None else [int(row) for row in rows]
        assert len(seeds) == len(chosen), f"{len(seeds)} seeds for {len(chosen)} rows"
        frames = self._restart(chosen, [int(seed) % 2**31 for seed in seeds])
        self._length[chosen] = 0
        self._done[chosen] = False
        return frames

    def step(self, actions: np.ndarray) -> Transition:
        """Plays one action in every row: (N,) int64, or (N, A) float32 in [-1, 1]."""
        if self._done.any():
            raise RuntimeError(f"rows {np.flatnonzero(self._done).tolist()} are done and must be reset first")
        played = self._play(self._checked(actions))
        self._length += 1
        late = self._length >= self.config.max_steps if self.config.max_steps else np.zeros(self.num_envs, dtype=bool)
        truncated = (played.truncated | late) & ~played.game_over
        terminated = played.game_over | played.life_lost if self.config.life_loss else played.game_over.copy()
        self._done = played.game_over | truncated
        reward = np.clip(played.score, -1, 1) if self.config.clip_rewards else played.score.copy()
        return Transition(played.frame, reward, played.score, terminated, truncated, self._done.copy())

    def restore(
        self, seeds: Sequence[int], actions: Sequence[np.ndarray], since: Sequence[int] | None = None
    ) -> list[Trace]:
        """Brings every row to where `actions[row]` (n, ...) from `seeds[row]` lead, and returns what they brought.

        Of a row only the steps from `since[row]` on are returned, and kept on the way. Rows of different lengths end
        together: a shorter one waits, playing anything, and is reset in time.
        Raises ValueError when a row's episode ends before its actions do.
        """
        longest = max(len(taken) for taken in actions)
        begin = [longest - len(taken) for taken in actions]
        kept = [start + skipped for start, skipped in zip(begin, since or [0] * self.num_envs, strict=True)]
        dtype = np.dtype(np.int64 if self.spec.discrete else np.float32)
        idle = np.zeros(() if self.spec.discrete else self.spec.action_size, dtype)
        frames = self.reset(seeds)
        first = list(frames)
        brought: list[Transition] = []
        for t in range(longest + 1):
            late = [begin[row] > t and self._done[row] for row in range(self.num_envs)]
            begins = [row for row in range(self.num_envs) if begin[row] == t > 0 or late[row]]
            if begins:
                frames = self.reset([seeds[row] for row in begins], begins)
            first = [frames[row] if kept[row] == t else first[row] for row in range(self.num_envs)]
            if t == longest:
                break
            if self._done.any():
                raise ValueError(f"an episode of {self.env} ended before its recorded actions did")
            now = [actions[row][t - begin[row]] if t >= begin[row] else idle for row in range(self.num_envs)]
            step = self.step(np.stack([np.asarray(action, dtype) for action in now]))
            frames = step.frame
            if t >= min(kept):
                brought.append(step)
        return [_trace(first[row], brought[kept[row] - min(kept) :], row) for row in range(self.num_envs)]

    def _checked(self, actions: np.ndarray) -> np.ndarray:
        shape = (self.num_envs,) if self.spec.discrete else (self.num_envs, self.spec.action_size)
        assert actions.shape == shape, f"actions {actions.shape}, expected {shape}"
        if not self.spec.discrete:
            return np.clip(actions.astype(np.float32), -1, 1)
        assert ((actions >= 0) & (actions < self.spec.action_size)).all(), f"no such action: {actions}"
        return actions.astype(np.int64)


def to_bounds(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Actions (..., A) in [-1, 1] as the game has them: within its bounds (A,), in their type."""
    return (low + (actions.astype(low.dtype) + 1) / 2 * (high - low)).clip(low, high)


def from_bounds(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The reverse, float32; of a dimension that cannot be moved 0."""
    span = np.where(high > low, high - low, 1)
    return np.where(high > low, (np.asarray(actions, np.float64) - low) / span * 2 - 1, 0).astype(np.float32)


def _trace(first: np.ndarray, brought: list[Transition], row: int) -> Trace:
    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(step, name)[row] for step in brought], dtype)

    frame = np.stack([first, *(step.frame[row] for step in brought)])
    kinds = {"reward": np.float32, "score": np.float32, "terminated": bool, "truncated": bool}
    return Trace(frame, **{name: column(name, dtype) for name, dtype in kinds.items()})
