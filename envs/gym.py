"""Any gymnasium environment that has pictures, as its observation or as an rgb_array render."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from typing import Any

import cv2
import gymnasium
import numpy as np
from gymnasium import error, spaces
from gymnasium.envs.registration import EnvSpec

from envs.errors import UserError, nearest
from envs.games import GameConfig, Games, Played
from envs.spec import Spec

SMALLEST_PICTURE = 16  # pixels; a smaller uint8 array is a board or a memory, not a picture


def find(env: str) -> EnvSpec:
    """Returns gymnasium's record of an id; "module:Name-v0" imports the module that registers it first.

    Raises UserError with the nearest id when there is none.
    """
    module, colon, name = env.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except ImportError as problem:
            raise UserError(f'The module of the environment "{env}" cannot be imported: {problem}.') from problem
    try:
        return gymnasium.spec(name)
    except error.Error as problem:
        hint = nearest(name, _choices(name)) or "Any gymnasium id with pictures will do, for example ALE/Pong-v5."
        raise UserError(f'There is no environment "{env}". {hint}') from problem


def _choices(name: str) -> list[str]:
    """Leaves out Atari's old ids (Pong-v0, PongNoFrameskip-v4), unless it looks as if one of them is meant."""
    old_style = "frameskip" in name.casefold() or name.endswith(("-v0", "-v4"))
    records = gymnasium.registry.items()
    return [i for i, r in records if old_style or "/" in i or r.entry_point != "ale_py.env:AtariEnv"]


class GymGames(Games):
    """N copies of a gymnasium environment, stepped one after the other in this process.

    Within an action repeat the rewards add up, and only the last picture is drawn when the picture is a render.
    """

    def __init__(self, env: str, num: int, *, config: GameConfig) -> None:
        super().__init__(env, num, config=config)
        for name in ("sticky", "noops", "life_loss"):
            if getattr(config, name):
                raise UserError(f"game.{name} is for Atari games with a fixed frame skip, and {env} is not one.")
        self._repeat = config.action_repeat or 1
        self._copies = [self._open()]
        try:
            self._read_actions(self._copies[0].action_space)
            self._draws = not _is_picture(self._copies[0].observation_space)
            self._copies[0].reset(seed=0)
            if self._draws:
                _draw(self._copies[0], env)
        except BaseException:
            self.close()
            raise
        self._copies += [self._open() for _ in range(num - 1)]
        self.spec = Spec(config.frame_shape, len(self.action_names), self.action_low is None)
        self._frames = np.zeros((num, *self.spec.frame), dtype=np.uint8)
        self._observed: list[Any] = [None] * num
        self.description = ", ".join(self._described())

    def _open(self) -> gymnasium.Env[Any, Any]:
        """Makes one copy. Raises UserError when a package is missing."""
        return make_env(self.env)

    def _described(self) -> list[str]:
        means = gymnasium.spec(self.env.rpartition(":")[2]).kwargs
        skip, count = means.get("frameskip"), self.spec.action_size
        return [
            *([f"{self._repeat} game steps a step"] if self._repeat > 1 else []),
            *([f"{skip[0]} to {skip[1] - 1} frames a step at random"] if isinstance(skip, tuple) else []),
            *([f"sticky {means['repeat_action_probability']:g}"] if "repeat_action_probability" in means else []),
            f"{count} {'' if self.spec.discrete else 'continuous '}action{'' if count == 1 else 's'}",
            self.config.picture,
        ]

    def _read_actions(self, space: spaces.Space[Any]) -> None:
        game: Any = self._copies[0].unwrapped
        meanings = getattr(game, "get_action_meanings", None)
        named = meanings() if meanings else getattr(game, "action_names", None)
        if isinstance(space, spaces.Discrete):
            self._first, count = int(space.start), int(space.n)
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            if not space.is_bounded():
                raise UserError(f"{self.env} has continuous actions without bounds to scale [-1, 1] to.")
            self._shape, count = space.shape, int(np.prod(space.shape))
            self.action_low = space.low.reshape(-1).astype(np.float32)
            self.action_high = space.high.reshape(-1).astype(np.float32)
        else:
            raise UserError(f"{self.env} has {type(space).__name__} actions; Discrete or Box actions are needed.")
        self.action_names = tuple(named) if named else tuple(f"action {i}" for i in range(count))

    def _restart(self, rows: list[int], seeds: list[int]) -> np.ndarray:
        for row, seed in zip(rows, seeds, strict=True):
            self._observed[row], _ = self._copies[row].reset(seed=seed)
            self._frames[row] = self._frame(row)
        return self._frames.copy()

    def _play(self, actions: np.ndarray) -> Played:
        score = np.zeros(self.num, dtype=np.float32)
        terminated = np.zeros(self.num, dtype=bool)
        truncated = np.zeros(self.num, dtype=bool)
        for row, copy in enumerate(self._copies):
            action = self._native(actions[row])
            for _ in range(self._repeat):
                self._observed[row], reward, ended, late, info = copy.step(action)
                ended, late = self._ending(bool(ended), bool(late), info)
                score[row] += float(reward)
                terminated[row], truncated[row] = ended, late
                if ended or late:
                    break
            self._frames[row] = self._frame(row)
        return Played(self._frames.copy(), score, terminated, np.zeros(self.num, dtype=bool), truncated)

    def _ending(self, terminated: bool, truncated: bool, info: dict[str, Any]) -> tuple[bool, bool]:
        """What the game calls an ending and a time limit; a game may know better."""
        return terminated, truncated

    def _native(self, action: np.ndarray) -> Any:
        """Turns 0..A-1 or [-1, 1]^A into the game's own action."""
        if self.action_low is None or self.action_high is None:
            return int(action) + self._first
        scaled = self.action_low + (action + 1) / 2 * (self.action_high - self.action_low)
        return scaled.astype(np.float32).reshape(self._shape)

    def _frame(self, row: int) -> np.ndarray:
        picture, size = self._picture(row), self.config.frame_size
        if self.config.gray:
            gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if _is_colour(picture) else picture
            return _resized(gray.reshape(gray.shape[:2]), size)[None]  # (1, H, W)
        return _resized(_coloured(picture), size).transpose(2, 0, 1)  # (3, H, W)

    def _picture(self, row: int) -> np.ndarray:
        """What the agent sees, before it is resized: (H, W), (H, W, 1) or (H, W, 3) uint8."""
        return _draw(self._copies[row], self.env) if self._draws else np.asarray(self._observed[row])

    def render(self, row: int = 0) -> np.ndarray:
        """Returns the game's own picture at its own size, (H, W, 3) uint8."""
        if self._draws or self._copies[row].render_mode == "rgb_array":
            return _draw(self._copies[row], self.env).copy()
        return _coloured(np.asarray(self._observed[row])).copy()

    def keys_to_action(self) -> dict[tuple[str, ...], Any] | None:
        """Returns the environment's `get_keys_to_action`, with the actions as `step` takes them."""
        own = getattr(self._copies[0].unwrapped, "get_keys_to_action", None)
        if own is None:
            return None
        return {_names(keys): self._scaled(action) for keys, action in own().items()}

    def _scaled(self, action: Any) -> Any:
        """Undoes `_native`."""
        if self.action_low is None or self.action_high is None:
            return int(action) - self._first
        share = (np.asarray(action, np.float32).reshape(-1) - self.action_low) / (self.action_high - self.action_low)
        return share * 2 - 1

    def close(self) -> None:
        """Closes every copy."""
        for copy in self._copies:
            copy.close()


def _names(keys: Any) -> tuple[str, ...]:
    """Gymnasium allows "ad", ("a", "d") and (97, 100)."""
    return tuple(chr(key) if isinstance(key, int) else key for key in ((keys,) if isinstance(keys, int) else keys))


def make_env(env: str | EnvSpec) -> gymnasium.Env[Any, Any]:
    """Makes an environment by its id or its record, with an rgb_array render where it has one.

    Raises UserError when a package is missing, naming it, or the environment cannot be made.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium warns of every render mode that an environment lacks
            with contextlib.suppress(error.Error, TypeError):
                return gymnasium.make(env, render_mode="rgb_array", disable_env_checker=True)
            return gymnasium.make(env, disable_env_checker=True)
    except (error.DependencyNotInstalled, ImportError) as problem:
        raise _missing(_id(env), problem) from problem
    except error.Error as problem:
        raise UserError(f"{_id(env)} cannot be made: {problem}") from problem


def _id(env: str | EnvSpec) -> str:
    return env if isinstance(env, str) else env.id


def _missing(env: str, problem: Exception) -> UserError:
    """Gymnasium's own message already names the extra, for example `pip install "gymnasium[box2d]"`."""
    return UserError(f"{env} needs a package that is not installed: {problem}")


def _is_picture(space: spaces.Space[Any]) -> bool:
    """Says whether observations are (H, W), (H, W, 1) or (H, W, 3) uint8."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) not in (2, 3):
        return False
    channels = space.shape[2] if len(space.shape) == 3 else 1
    return channels in (1, 3) and min(space.shape[:2]) >= SMALLEST_PICTURE


def _draw(copy: gymnasium.Env[Any, Any], env: str) -> np.ndarray:
    try:
        picture = copy.render() if copy.render_mode == "rgb_array" else None
    except (error.DependencyNotInstalled, ImportError) as problem:
        raise _missing(env, problem) from problem
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or not _is_colour(picture):
        raise UserError(f"{env} has no pictures: neither its observation nor its rgb_array render is one.")
    return picture


def _is_colour(picture: np.ndarray) -> bool:
    return picture.ndim == 3 and picture.shape[2] == 3


def _coloured(picture: np.ndarray) -> np.ndarray:
    return picture if _is_colour(picture) else np.repeat(picture.reshape(*picture.shape[:2], 1), 3, axis=2)


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) or (H, W, 3) to `size`, height and width."""
    if picture.shape[:2] == size:
        return picture
    return cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)  # OpenCV names the width first
