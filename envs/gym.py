"""Any gymnasium environment that has pictures, as its observation or as an rgb_array render."""

from __future__ import annotations

import contextlib
import copy as copies
import importlib
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import error, spaces
from gymnasium.envs.registration import EnvSpec

from envs.errors import UserError, nearest
from envs.games import GameConfig, GameFailed, Games, Played, from_bounds, to_bounds
from envs.pictures import as_picture, coloured, framed, is_picture, part_with_picture
from envs.spec import Spec

ATARI = "ale_py.env:AtariEnv"  # the entry point of the ids of Atari games


def find(env: str, kwargs: dict[str, Any] | None = None) -> EnvSpec:
    """Gymnasium's record of an id, with further arguments; "module:Name-v0" imports the module that registers it first.

    Raises UserError with the nearest id when there is none.
    """
    module, colon, name = env.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except Exception as problem:  # whatever a person's own module does wrong
            text = f"{type(problem).__name__}: {problem}" if not isinstance(problem, ImportError) else f"{problem}"
            text += ". Does PYTHONPATH name its folder?" if isinstance(problem, ModuleNotFoundError) else "."
            raise UserError(f'The module of the environment "{env}" cannot be imported: {text}') from problem
    try:
        found = copies.deepcopy(gymnasium.spec(name))
    except error.Error as problem:
        hint = nearest(name, _choices(name)) or "Any gymnasium id with pictures will do, for example ALE/Pong-v5."
        hint = hint.replace("mean ", f"mean {module}:") if colon else hint
        raise UserError(f'There is no environment "{env}". {hint}') from problem
    found.kwargs |= kwargs or {}
    return found


def _choices(name: str) -> list[str]:
    """Leaves out Atari's old ids (Pong-v0, PongNoFrameskip-v4), unless it looks as if one of them is meant."""
    old_style = "frameskip" in name.casefold() or name.endswith(("-v0", "-v4"))
    records = gymnasium.registry.items()
    return [i for i, r in records if old_style or "/" in i or r.entry_point != ATARI]


STEP = "(observation, reward, terminated, truncated, info)"


class GymGames(Games):
    """N copies of a gymnasium environment, stepped one after the other in this process.

    What the agent sees is the observation, where that is a picture of bytes, else the render, else an observation that
    can be made a picture. Within an action repeat the rewards add up, and only the last picture is drawn when it is a
    render. An exception of the game is a `GameFailed`.
    """

    _key: str | None = None  # of the picture within an observation that has several parts
    _surprise = ""
    _first_seen: np.ndarray | None = None  # the first observation
    _films = True  # whether render() gives pictures

    def __init__(self, env: str, num_envs: int, *, config: GameConfig) -> None:
        super().__init__(env, num_envs, config=config)
        self._found, self._repeat = find(env, config.kwargs), config.action_repeat or 1
        atari = self._found.entry_point == ATARI  # with a mode, a wrapper or a limit of its own
        for name in ("noops", "life_loss") if atari else ("sticky", "noops", "life_loss"):
            if getattr(config, name):
                raise UserError(
                    f"game.{name} is for Atari games with a fixed frame skip and no wrappers, limits or modes of their "
                    f"own, and {env} is not one."
                )
        if atari:  # the emulator itself skips frames and repeats actions
            own = {"frameskip": config.action_repeat, "repeat_action_probability": config.sticky}
            self._found.kwargs |= {name: value for name, value in own.items() if value is not None}
            self._repeat = 1
        self._copies = [self._open()]
        self._observed: list[Any] = [None] * num_envs
        try:
            self._read_actions(self._copies[0])
            with self._failing("reset"):
                self._observed[0], _ = self._copies[0].reset(seed=0)
            self._sees: Literal["observation", "render"] = self._look()
        except BaseException:
            self.close()
            raise
        self._copies += [self._open() for _ in range(num_envs - 1)]
        self.spec = Spec(config.frame_shape, len(self.action_names), self.action_low is None)
        self._frames = np.zeros((num_envs, *self.spec.frame), dtype=np.uint8)
        self.description = ", ".join(self._described())

    def _open(self) -> gymnasium.Env[Any, Any]:
        """Makes one copy. Raises UserError when a package is missing or the game's own code refuses."""
        return make_env(self._found)

    def _described(self) -> list[str]:
        means = self._found.kwargs
        skip, count = means.get("frameskip"), self.spec.action_size
        return [
            *([f"{self._repeat} game steps a step"] if self._repeat > 1 else []),
            *([f"{skip[0]} to {skip[1] - 1} frames a step at random"] if isinstance(skip, tuple) else []),
            *([f"{skip} frame{'s'[: skip > 1]} a step"] if isinstance(skip, int) else []),
            *([f"sticky {means['repeat_action_probability']:g}"] if "repeat_action_probability" in means else []),
            f"{count} {'' if self.spec.discrete else 'continuous '}action{'' if count == 1 else 's'}",
            f"its {self._sees} as {self.config.picture}{self._surprise}",
        ]

    def _read_actions(self, game: gymnasium.Env[Any, Any]) -> None:
        """The space decides; names count where they are the game's own and there is one for each action."""
        space, inner = game.action_space, game.unwrapped
        if isinstance(space, spaces.Discrete):
            self._first, count = int(space.start), int(space.n)
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            with np.errstate(over="ignore"):
                if not space.is_bounded() or not np.isfinite(space.high - space.low).all():
                    raise UserError(f"{self.env} has continuous actions without bounds to scale [-1, 1] to.")
            self._shape, count = space.shape, int(np.prod(space.shape))
            self.action_low, self.action_high = space.low.reshape(-1), space.high.reshape(-1)
        else:
            kind = f"{space.dtype} Box" if isinstance(space, spaces.Box) else type(space).__name__
            raise UserError(f"{self.env} has {kind} actions; Discrete or Box actions of floats are needed.")
        meanings = getattr(inner, "get_action_meanings", None)
        named = (meanings() if meanings else getattr(inner, "action_names", None)) or ()
        self._renamed = inner.action_space != space or len(named) not in (0, count)
        usable = named and not self._renamed
        self.action_names = tuple(map(str, named)) if usable else tuple(f"action {i}" for i in range(count))

    # ---- what is seen ----
    def _look(self) -> Literal["observation", "render"]:
        """Decides what the agent sees, and tries whether films can be drawn of it.

        Raises UserError, with what the game gave instead, where neither is a picture.
        """
        game, observed = self._copies[0], self._observed[0]
        self._space: spaces.Space[Any] | None = game.observation_space
        told = is_picture(game.observation_space)
        fits = isinstance(observed, np.ndarray) and observed.dtype == np.uint8
        fits = fits and observed.shape == game.observation_space.shape
        if told and fits:
            self._films = game.render_mode == "rgb_array" and _rendered(game)[0] is not None
            return "observation"
        drawn, problem = _rendered(game) if game.render_mode == "rgb_array" else (None, "it has no rgb_array render")
        if told:
            self._surprise = f" (its observations are {_given(observed)}, although its space says otherwise)"
        self._films = drawn is not None
        if drawn is not None:
            return "render"
        found = part_with_picture(game.observation_space)
        if found is not None:
            self._key, part = found
            for self._space in (None, part) if told else (part,):  # what is not as it says may be floats of 0..1
                if self._made(0) is not None:
                    return "observation"
        raise UserError(
            f"{self.env} has no pictures: its observations are none ({_kind(game.observation_space)}), and of its "
            f"render {problem}."
        )

    def _made(self, row: int) -> np.ndarray | None:
        """The picture of a row's observation."""
        return as_picture(self._seen(row), self._space)

    def _picture(self, row: int, where: str = "") -> np.ndarray:
        """What the agent sees, before it is resized: (H, W), (H, W, 1) or (H, W, 3) uint8."""
        if self._sees == "observation":
            picture, problem = self._shown(row)
        else:
            picture, problem = _rendered(self._copies[row])
            problem = f"of its render {problem}"
        if picture is None:
            raise self._failed(where or _step(self._length[row]), problem)
        return picture

    def _shown(self, row: int) -> tuple[np.ndarray | None, str]:
        """The picture of a row's observation, or None and why there is none."""
        picture = self._made(row)
        if picture is None:
            return None, f"an observation is no picture but {_given(self._seen(row))}"
        seen = np.asarray(self._seen(row))
        if self._first_seen is None:
            self._first_seen = seen
        if not _alike(seen, self._first_seen):  # bytes that became floats would be a black game
            return None, f"an observation is {_given(seen)}, and the first was {_given(self._first_seen)}"
        return picture, ""

    def _seen(self, row: int) -> Any:
        """A row's observation, of several parts the one with the picture."""
        return self._observed[row] if self._key is None else self._observed[row][self._key]

    def _frame(self, row: int, where: str) -> np.ndarray:
        return framed(self._picture(row, where), self.config.frame_size, gray=self.config.gray)

    def render(self, row: int = 0) -> np.ndarray:
        """The game's own picture at its own size, (H, W, 3) uint8; what the agent sees where it has none."""
        picture = _rendered(self._copies[row])[0] if self._films else None
        return coloured(self._picture(row) if picture is None else picture).copy()

    @property
    def aspect(self) -> float:
        """Of the picture before it is resized, with square pixels."""
        height, width = self._picture(0).shape[:2]
        return width / height

    @property
    def film_aspect(self) -> float:
        """Of the render."""
        height, width = self.render().shape[:2]
        return width / height

    # ---- play ----
    def _restart(self, rows: list[int], seeds: list[int]) -> np.ndarray:
        for row, seed in zip(rows, seeds, strict=True):
            self._length[row] = 0
            with self._failing("reset"):
                self._observed[row], _ = self._copies[row].reset(seed=seed)
            self._frames[row] = self._frame(row, "reset")
        return self._frames.copy()

    def _play(self, actions: np.ndarray) -> Played:
        score = np.zeros(self.num_envs, dtype=np.float32)
        terminated = np.zeros(self.num_envs, dtype=bool)
        truncated = np.zeros(self.num_envs, dtype=bool)
        for row, copy in enumerate(self._copies):
            action = self._native(actions[row])
            for _ in range(self._repeat):
                with self._failing(_step(self._length[row] + 1)):
                    brought: Any = copy.step(action)
                    if len(brought) != 5:
                        raise ValueError(f"step() gives {len(brought)} values and not gymnasium's five {STEP}")
                self._observed[row], reward, ended, late, info = brought
                ended, late = self._ending(bool(ended), bool(late), info)
                score[row] += self._number(reward, row)
                terminated[row], truncated[row] = ended, late
                if ended or late:
                    break
            self._frames[row] = self._frame(row, _step(self._length[row] + 1))
        return Played(self._frames.copy(), score, terminated, np.zeros(self.num_envs, dtype=bool), truncated)

    def _ending(self, terminated: bool, truncated: bool, info: dict[str, Any]) -> tuple[bool, bool]:
        """What the game calls an ending and a time limit; a game may know better."""
        return terminated, truncated

    def _number(self, reward: Any, row: int) -> float:
        """A reward, which may be an array of one number. Raises GameFailed for any other, and for one not finite."""
        try:
            number = float(np.asarray(reward, np.float64).reshape(()))
        except (TypeError, ValueError):
            number = float("nan")
        if not abs(number) <= float(np.finfo(np.float32).max):
            raise self._failed(_step(self._length[row] + 1), f"its reward is no finite number: {reward}")
        return number

    @contextlib.contextmanager
    def _failing(self, where: str) -> Iterator[None]:
        """Whatever the game's own code raises is a GameFailed."""
        try:
            yield
        except Exception as problem:
            raise self._failed(where, f"{type(problem).__name__}: {_first_line(problem)}{_place(problem)}") from problem

    def _failed(self, where: str, problem: str) -> GameFailed:
        return GameFailed(f"{self.env} failed in {where}: {problem}")

    def _native(self, action: np.ndarray) -> Any:
        """Turns 0..A-1 or [-1, 1]^A into the game's own action, which lies in its space."""
        if self.action_low is None or self.action_high is None:
            return int(action) + self._first
        return to_bounds(action, self.action_low, self.action_high).reshape(self._shape)

    def keys_to_action(self) -> dict[tuple[str, ...], Any] | None:
        """The environment's `get_keys_to_action`, with the actions as `step` takes them; None where they do not fit."""
        own = getattr(self._copies[0].unwrapped, "get_keys_to_action", None)
        if own is None or self._renamed:
            return None
        space = self._copies[0].action_space
        given = {_names(keys): action for keys, action in own().items()}
        fitting = (np.shape(action) == space.shape and _holds(space, action) for action in given.values())
        return {keys: self._scaled(action) for keys, action in given.items()} if all(fitting) else None

    def _scaled(self, action: Any) -> Any:
        """Undoes `_native`."""
        if self.action_low is None or self.action_high is None:
            return int(action) - self._first
        return from_bounds(np.asarray(action).reshape(-1), self.action_low, self.action_high)

    def close(self) -> None:
        """Closes every copy."""
        for copy in self._copies:
            with contextlib.suppress(Exception):  # of a game that has failed already
                copy.close()


def _step(number: int) -> str:
    return f"step {number} of an episode"


def _names(keys: Any) -> tuple[str, ...]:
    """Gymnasium allows "ad", ("a", "d") and (97, 100)."""
    return tuple(chr(key) if isinstance(key, int) else key for key in ((keys,) if isinstance(keys, int) else keys))


def _holds(space: spaces.Space[Any], action: Any) -> bool:
    """Whether an action lies in the space, whatever its type."""
    return space.contains(np.asarray(action).astype(space.dtype))


def make_env(found: EnvSpec) -> gymnasium.Env[Any, Any]:
    """Makes an environment by its record, with an rgb_array render where it has one.

    Raises UserError when a package is missing, naming it, or the environment cannot be made.
    """
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")  # else MuJoCo looks for a window, without which it cannot draw
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium warns of every render mode that an environment lacks
            with contextlib.suppress(error.Error, TypeError):
                return gymnasium.make(found, render_mode="rgb_array", disable_env_checker=True)
            return gymnasium.make(found, disable_env_checker=True)
    except (error.DependencyNotInstalled, ImportError) as problem:
        raise _missing(found.id, problem) from problem
    except Exception as problem:
        hint = " Its arguments are given as game.kwargs={name: value}." if isinstance(problem, TypeError) else ""
        told = "" if isinstance(problem, error.Error) else f"{type(problem).__name__}: "
        raise UserError(f"{found.id} cannot be made: {told}{_first_line(problem).rstrip('.')}.{hint}") from problem


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or "it does not say why").splitlines()[0]


def _place(problem: Exception) -> str:
    """As " (mygame.py:31)", where a person's own code, neither a package's nor this program's, raised it."""
    others = (str(Path(__file__).parent), *(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")))
    frames = traceback.extract_tb(problem.__traceback__)
    found = [frame for frame in frames if not frame.filename.startswith(others)]
    return f" ({Path(found[-1].filename).name}:{found[-1].lineno})" if found else ""


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether both are of one shape, and of floats or not."""
    return one.shape == other.shape and (one.dtype.kind == "f") == (other.dtype.kind == "f")


def _missing(env: str, problem: Exception) -> UserError:
    """Gymnasium's own message already names the extra, for example `pip install "gymnasium[box2d]"`."""
    return UserError(f"{env} needs a package that is not installed: {problem}")


def _kind(space: spaces.Space[Any]) -> str:
    if not isinstance(space, spaces.Box):
        return type(space).__name__
    least, most = float(space.low.min()), float(space.high.max())
    return f"{space.dtype} {space.shape} of {least:g} to {most:g}"


def _rendered(game: gymnasium.Env[Any, Any]) -> tuple[np.ndarray | None, str]:
    """What a game draws, (H, W), (H, W, 1) or (H, W, 3) uint8, or None and why there is none.

    Raises UserError when a package is missing.
    """
    try:
        given: Any = game.render()
    except (error.DependencyNotInstalled, ImportError) as problem:
        raise _missing(game.spec.id if game.spec else "The game", problem) from problem
    except Exception as problem:
        return None, f"it raises {type(problem).__name__}: {_first_line(problem)}"
    picture = as_picture(given)
    return picture, "" if picture is not None else f"it gives {_given(given)}"


def _given(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"{type(value).__name__}"
