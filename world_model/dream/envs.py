"""The dream as a game: any world model as a gymnasium environment, one dream or many side by side.

Shapes: N dreams, H W picture, F features, A action size. Observations are pictures (H, W, 3) uint8, also of a model
that sees gray ones, or with `obs_type="features"` (F,) float32: what the run's own policy sees; no picture is drawn.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import error, spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from envs.errors import UserError
from world_model.dream.batch import Dream, DreamBatch, Starts, World
from world_model.interface import WorldModel

if TYPE_CHECKING:
    import pygame

__all__ = ["DreamEnv", "DreamVectorEnv", "EnvState", "Starts", "World", "open_window"]

# A process that was forked from one that has dreamed, as gymnasium's AsyncVectorEnv makes them, would wait for ever for
# the threads of torch that it has not inherited.
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))

FPS = 15  # of Atari with four frames a step, and near enough to every other game here
WINDOW = 512  # pixels; pictures are enlarged by a whole factor to about this height
# Keys as gymnasium.utils.play reads them: a character, or SDL's number.
SDL: dict[str, str | int] = {"space": " ", "enter": "\r", "tab": "\t"}
SDL |= {"right": 0x4000004F, "left": 0x40000050, "down": 0x40000051, "up": 0x40000052}


class EnvState(NamedTuple):
    """All that the future depends on, beside the actions to come. Nothing that is dreamed later changes it."""

    dream: Dream
    time: np.ndarray  # (N,) steps since the start
    done: np.ndarray  # (N,) bool
    rng_state: tuple[Tensor, ...]  # of torch's generators, on the CPU and on the model's device
    np_random: Mapping[str, Any]  # of the generator that picks starts


def observation_space(model: WorldModel, obs_type: str) -> spaces.Box:
    """What one dream shows, and the real game beside it."""
    if obs_type == "rgb":
        return spaces.Box(0, 255, (*model.spec.frame[1:], 3), np.uint8)
    return spaces.Box(-np.inf, np.inf, (model.feature_size,), np.float32)


class _Dreaming:
    """What one dream and many share: where they stand, and how that is saved and restored.

    Attributes:
        temperature: of the latents that are drawn: 0 takes the most likely ones, 1 is what the model believes.
    """

    np_random: np.random.Generator

    def __init__(self, world: World, num_envs: int, *, horizon: int | None, temperature: float, obs_type: str) -> None:
        if num_envs < 1 or (horizon is not None and horizon < 1) or not temperature >= 0:
            raise ValueError(f"no dream has num_envs={num_envs}, horizon={horizon}, temperature={temperature}")
        self.dreams, self.horizon, self.temperature = DreamBatch(world, obs_type=obs_type), horizon, temperature
        self.now: Dream | None = None
        self.time, self.done = np.zeros(num_envs, np.int64), np.ones(num_envs, bool)
        with self.dreams.rng_scope():  # every start once: beginning again is then free
            self._starts = self.dreams.begin(np.arange(len(world.starts.frame)))

    @property
    def world(self) -> World:
        """What is dreamed in."""
        return self.dreams.world

    def get_state(self) -> EnvState:
        """This moment, to go back to or to branch from any number of times, random numbers included.

        Raises:
            gymnasium.error.ResetNeeded: no dream has begun.
        """
        if self.now is None:
            raise error.ResetNeeded("no dream has begun: reset first")
        random = dict(self.np_random.bit_generator.state)
        return EnvState(self.now, self.time, self.done, self.dreams.rng_state, random)

    def set_state(self, moment: EnvState) -> None:
        """Goes on from a moment of this world; the same actions bring the same future."""
        if len(moment.time) != len(self.time):
            raise ValueError(f"the moment is of {len(moment.time)} dreams, and here are {len(self.time)}")
        if moment.dream.observation.shape[1:] != self._starts.observation.shape[1:]:
            raise ValueError("the moment is of dreams with another obs_type")
        self.now, self.time, self.done, self.dreams.rng_state, random = moment
        self.np_random.bit_generator.state = dict(random)

    def _begin(self, rows: np.ndarray, options: dict[str, Any] | None, *, seeded: bool) -> np.ndarray:
        """Begins the rows (R,) anew, the first time all of them, and returns which starts they have."""
        count = len(self.world.starts.frame)
        if seeded or self.now is None:
            self.dreams.seed(int(self.np_random.integers(2**63)))
        asked = (options or {}).get("start")
        starts = self.np_random.integers(count, size=len(rows)) if asked is None else np.asarray(asked)
        if not np.issubdtype(starts.dtype, np.integer) or not ((starts >= 0) & (starts < count)).all():
            raise ValueError(f"there is no start {asked}: choose 0 to {count - 1}")
        starts = np.broadcast_to(starts, len(rows))
        chosen, mask = np.zeros(len(self.time), np.int64), np.zeros(len(self.time), bool)
        chosen[rows], mask[rows] = starts, True
        begun = self._starts.rows(chosen)
        self.now = begun if self.now is None else begun.where(mask, self.now)
        self.time, self.done = np.where(mask, 0, self.time), self.done & ~mask
        return starts

    def _step(self, given: Any) -> Dream:
        """One of the game's actions further in every row; `done` is True where that has ended a dream."""
        action = self.world.action(given, len(self.time))
        if self.now is None or self.done.any():
            raise error.ResetNeeded("the dream is over or has not begun: reset it first")
        with self.dreams.rng_scope():
            self.now = self.dreams.step(self.now.state, action, self.temperature)
        self.time = self.time + 1
        late = self.horizon is not None and self.time >= self.horizon
        self.done = self.now.ended | late
        return self.now

    @property
    def _observation(self) -> np.ndarray:
        """(N, ...), the caller's own."""
        if self.now is None:
            raise error.ResetNeeded("no dream has begun: reset first")
        return self.now.observation.copy()

    @property
    def _picture(self) -> np.ndarray:
        """(N, H, W, 3) uint8, the caller's own."""
        if self.now is None or self.dreams.obs_type == "rgb":
            return self._observation
        before = self.dreams.rng_state  # whoever looks changes nothing, also where a decoder draws
        with self.dreams.rng_scope():
            picture = self.dreams.picture(self.now.state)
        self.dreams.rng_state = before
        return picture


class DreamEnv(_Dreaming, gymnasium.Env[np.ndarray, Any]):
    """One dream. `reset(options={"start": i})` chooses the start, else it is drawn; info tells `start` and `cont`.

    The reward is the model's expectation in the game's units (see `World.whole_rewards`); the end is drawn from its
    continuation head. `horizon` steps (None: no limit) end it as truncation. `render_mode="human"` opens a window and
    needs pygame-ce; without a display it is not among the modes of `metadata`, and begins with a UserError.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "human"], "render_fps": FPS}

    def __init__(
        self, world: World, *, horizon: int | None = None, temperature: float = 1.0, render_mode: str | None = None,
        obs_type: str = "rgb",
    ) -> None:  # fmt: skip
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode is "rgb_array", "human" or None, not "{render_mode}"')
        super().__init__(world, 1, horizon=horizon, temperature=temperature, obs_type=obs_type)
        self.render_mode = render_mode
        if not _has_display():
            self.metadata = self.metadata | {"render_modes": ["rgb_array"]}
        self.observation_space, self.action_space = observation_space(world.model, obs_type), world.action_space
        self._window: _Window | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins a dream. A seed determines it and all that follow without a seed of their own."""
        super().reset(seed=seed)
        (start,) = self._begin(np.zeros(1, np.int64), options, seeded=seed is not None)
        self._show()
        return self._observation[0], {"start": int(start), "cont": 1.0}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One action of the game further. Raises ValueError for what is no action, ResetNeeded when it is over."""
        now = self._step(np.asarray(action)[None])
        self._show()
        reward, cont, terminated = (part[0].item() for part in (now.reward, now.cont, now.ended))
        return self._observation[0], reward, terminated, bool(self.done[0]) and not terminated, {"cont": cont}

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """What is seen now, (H, W, 3) uint8, with render_mode="rgb_array"."""
        return self._picture[0] if self.render_mode == "rgb_array" else None

    def get_keys_to_action(self) -> dict[tuple[str | int, ...], Any]:
        """What keys held together mean, in the form that gymnasium.utils.play reads; nothing held is its `noop`."""
        controls = self.world.controls
        held = ((chord, controls.native(action)) for chord, action in controls.keys if chord)
        return {tuple(SDL.get(key, key) for key in chord): action for chord, action in held}

    def close(self) -> None:
        """Closes the window, if there is one."""
        if self._window is not None:
            self._window.close()
            self._window = None

    def _show(self) -> None:
        if self.render_mode == "human":
            picture = self._picture[0]
            if self._window is None:
                self._window = _Window(picture.shape[:2])
            self._window.show(picture)


class DreamVectorEnv(_Dreaming, VectorEnv[np.ndarray, Any, np.ndarray]):
    """N dreams in one forward pass. A row that is over begins anew from a drawn start, when `autoreset_mode` says.

    NEXT_STEP, gymnasium's default: the step after; the action of that row is ignored and its reward is 0.
    SAME_STEP: at once; `infos["final_obs"][i]` is then its last observation, and `infos["_final_obs"]` (N,) tells which
    rows these are. DISABLED: by `reset(options={"reset_mask": ...})` with a mask (N,) of the rows that begin.
    `infos["cont"]` (N,) belongs to the step taken, in every row. One seed determines all rows together.
    """

    def __init__(
        self, world: World, num_envs: int, *, horizon: int | None = None, temperature: float = 1.0,
        render_mode: str | None = None, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        obs_type: str = "rgb",
    ) -> None:  # fmt: skip
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode is "rgb_array" or None, not "{render_mode}"')
        super().__init__(world, num_envs, horizon=horizon, temperature=temperature, obs_type=obs_type)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": FPS, "autoreset_mode": self.autoreset_mode}
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = observation_space(world.model, obs_type)
        self.single_action_space = world.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins every row; options={"start": i} or an index a row choose the starts.

        With options={"reset_mask": mask} (N,) bool only those rows begin, and `info["start"]` tells of them alone.
        """
        super().reset(seed=seed)
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        first = self.now is None
        if mask.dtype != bool or mask.shape != (self.num_envs,) or not (mask.all() if first else mask.any()):
            raise ValueError(f"{mask} is no mask of the rows that begin: at least one, and at first all of them")
        starts = self._begin(np.flatnonzero(mask), options, seeded=seed is not None)
        return self._observation, {"start": starts.copy(), "cont": np.ones(self.num_envs)}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One action in every row, (N,) or (N, A).

        Raises ValueError for what is no action, ResetNeeded with DISABLED when a row is over.
        """
        self.world.action(actions, self.num_envs)  # what is no action changes nothing
        over = np.zeros(self.num_envs, bool)
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and self.now is not None:
            over, self.done = self.done, over
        now = self._step(actions)
        if over.any():
            self._begin(np.flatnonzero(over), None, seeded=False)
            now = self.now or now
        done = self.done
        infos: dict[str, Any] = {"cont": now.cont}
        if done.any() and self.autoreset_mode is AutoresetMode.SAME_STEP:
            final = np.full(self.num_envs, None, object)
            for row in np.flatnonzero(done):
                final[row] = now.observation[row].copy()
            infos |= {"final_obs": final, "_final_obs": done}
            self._begin(np.flatnonzero(done), None, seeded=False)
        return self._observation, now.reward, now.ended, done & ~now.ended, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """What is seen now, N pictures (H, W, 3) uint8, with render_mode="rgb_array"."""
        return tuple(self._picture) if self.render_mode == "rgb_array" else None


def _has_display() -> bool:
    names = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in names)


def open_window(width: int, height: int, title: str, *, resizable: bool = False) -> pygame.Surface:
    """A window of so many pixels. Raises UserError where there is no display."""
    import pygame

    try:
        pygame.display.init()
        # Without a display SDL draws into nothing and says nothing, which is right only where somebody asked for it.
        if pygame.display.get_driver() in ("offscreen", "dummy") and "SDL_VIDEODRIVER" not in os.environ:
            pygame.display.quit()
            raise UserError("There is no display for a window: use the browser, or record=FILE.mp4 for a video.")
        surface = pygame.display.set_mode((width, height), pygame.RESIZABLE if resizable else 0)
    except pygame.error as problem:
        raise UserError(f"There is no display for a window ({problem}): use the browser.") from problem
    pygame.display.set_caption(title)
    return surface


class _Window:
    """The window of render_mode="human"."""

    def __init__(self, size: tuple[int, ...]) -> None:
        try:
            import pygame
        except ImportError as problem:
            raise error.DependencyNotInstalled('a window needs pygame-ce: pip install ".[play]"') from problem
        height, width = (side * max(1, WINDOW // size[0]) for side in size)
        self.surface = open_window(width, height, "a dream")
        self.clock = pygame.time.Clock()

    def show(self, frame: np.ndarray) -> None:
        """Shows (H, W, 3) uint8 and waits as long as a frame lasts."""
        import pygame

        height, width = frame.shape[:2]
        picture = pygame.image.frombuffer(frame.tobytes(), (width, height), "RGB")
        pygame.transform.scale(picture.convert(self.surface), self.surface.get_size(), self.surface)
        pygame.event.pump()
        pygame.display.flip()
        self.clock.tick(FPS)

    def close(self) -> None:
        import pygame

        pygame.display.quit()
