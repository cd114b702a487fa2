"""The dream as a game: any world model as a gymnasium environment, one dream or many side by side.

Shapes: N dreams, H W picture, A action size. Observations are (H, W, 3) uint8.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from gymnasium import error
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.errors import UserError
from world_model import trees
from world_model.dream.batch import DreamBatch, EnvState, Starts, World

if TYPE_CHECKING:
    import pygame

__all__ = ["DreamEnv", "DreamVectorEnv", "EnvState", "Starts", "World", "open_window"]

FPS = 15  # of Atari with four frames a step, and near enough to every other game here
WINDOW = 512  # pixels; pictures are enlarged by a whole factor to about this height
# Keys as gymnasium.utils.play reads them: a character, or SDL's number.
SDL: dict[str, str | int] = {"space": " ", "enter": "\r", "tab": "\t"}
SDL |= {"right": 0x4000004F, "left": 0x40000050, "down": 0x40000051, "up": 0x40000052}


class _Dreaming:
    """What one dream and many share: their state, and how it is saved and restored."""

    np_random: np.random.Generator
    dreams: DreamBatch

    @property
    def temperature(self) -> float:
        """Of the latents that are drawn: 0 takes the most likely ones, 1 is what the model believes."""
        return self.dreams.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.dreams.temperature = value

    def get_state(self) -> EnvState:
        """This moment, to go back to or to branch from any number of times, random numbers included.

        Raises:
            gymnasium.error.ResetNeeded: no dream has begun.
        """
        dreams = self.dreams
        if dreams.state is None:
            raise error.ResetNeeded("no dream has begun: reset first")
        state = trees.map(torch.clone, dreams.state)
        rng_state = tuple(part.clone() for part in dreams.rng_state)
        arrays = (dreams.time.copy(), dreams.done.copy(), dreams.frame.copy())
        return EnvState(state, *arrays, rng_state, self.np_random.bit_generator.state)

    def set_state(self, moment: EnvState) -> None:
        """Goes on from a moment of this world; the same actions bring the same future."""
        dreams = self.dreams
        if len(moment.time) != dreams.num:
            raise ValueError(f"the moment is of {len(moment.time)} dreams, and here are {dreams.num}")
        dreams.state, dreams.rng_state = moment.state, moment.rng_state
        dreams.time, dreams.done, dreams.frame = moment.time.copy(), moment.done.copy(), moment.frame.copy()
        self.np_random.bit_generator.state = dict(moment.np_random)

    def _begin(self, rows: np.ndarray, options: dict[str, Any] | None, *, seeded: bool) -> np.ndarray:
        """Begins the rows anew and returns which starts they have."""
        count = len(self.dreams.world.starts.frame)
        if seeded or self.dreams.state is None:
            self.dreams.seed(int(self.np_random.integers(2**63)))
        asked = (options or {}).get("start")
        starts = self.np_random.integers(count, size=len(rows)) if asked is None else np.asarray(asked)
        if not np.issubdtype(starts.dtype, np.integer) or not ((starts >= 0) & (starts < count)).all():
            raise ValueError(f"there is no start {asked}: choose 0 to {count - 1}")
        starts = np.broadcast_to(starts, len(rows))
        self.dreams.begin(rows, starts)
        return starts


class DreamEnv(_Dreaming, gymnasium.Env[np.ndarray, Any]):
    """One dream. `reset(options={"start": i})` chooses the start, else it is drawn; info tells `start` and `cont`.

    The reward is the model's expectation in the game's units; the end is drawn from its continuation head. `horizon`
    steps (None: no limit) end it as truncation. `render_mode="human"` opens a window and needs pygame-ce.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "human"], "render_fps": FPS}

    def __init__(
        self, world: World, *, horizon: int | None = None, temperature: float = 1.0, render_mode: str | None = None
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode is "rgb_array", "human" or None, not "{render_mode}"')
        self.dreams = DreamBatch(world, 1, horizon=horizon, temperature=temperature)
        self.render_mode = render_mode
        self.observation_space, self.action_space = world.observation_space, world.action_space
        self._window: _Window | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins a dream. A seed determines it and all that follow without a seed of their own."""
        super().reset(seed=seed)
        (start,) = self._begin(np.zeros(1, np.int64), options, seeded=seed is not None)
        self._show()
        return self.dreams.frame[0].copy(), {"start": int(start), "cont": 1.0}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One action of the game further. Raises ValueError for what is no action, ResetNeeded when it is over."""
        outcome = self.dreams.step(self.dreams.world.action(np.asarray(action)[None], 1))
        self._show()
        reward, cont, terminated, truncated = (part[0].item() for part in outcome)
        return self.dreams.frame[0].copy(), reward, terminated, truncated, {"cont": cont}

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """What is seen now, (H, W, 3) uint8, with render_mode="rgb_array"."""
        return self.dreams.frame[0].copy() if self.render_mode == "rgb_array" else None

    def get_keys_to_action(self) -> dict[tuple[str | int, ...], Any]:
        """What keys held together mean, in the form that gymnasium.utils.play reads; nothing held is its `noop`."""
        controls = self.dreams.world.controls
        held = ((chord, controls.native(action)) for chord, action in controls.keys if chord)
        return {tuple(SDL.get(key, key) for key in chord): action for chord, action in held}

    def close(self) -> None:
        """Closes the window, if there is one."""
        if self._window is not None:
            self._window.close()
            self._window = None

    def _show(self) -> None:
        if self.render_mode == "human":
            if self._window is None:
                self._window = _Window(self.dreams.frame.shape[1:3])
            self._window.show(self.dreams.frame[0])


class DreamVectorEnv(_Dreaming, VectorEnv[np.ndarray, Any, np.ndarray]):
    """N dreams in one forward pass. A row that is over begins anew in the same step, from a start that is drawn.

    `infos["final_obs"][i]` is then its last frame, (H, W, 3), and `infos["_final_obs"]` (N,) tells which rows these
    are; `infos["cont"]` (N,) belongs to the step taken, in every row. One seed determines all rows together.
    """

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array"], "render_fps": FPS, "autoreset_mode": AutoresetMode.SAME_STEP,
    }  # fmt: skip

    def __init__(
        self, world: World, num_envs: int, *, horizon: int | None = None, temperature: float = 1.0,
        render_mode: str | None = None,
    ) -> None:  # fmt: skip
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode is "rgb_array" or None, not "{render_mode}"')
        self.dreams = DreamBatch(world, num_envs, horizon=horizon, temperature=temperature)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space, self.single_action_space = world.observation_space, world.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins every row; options={"start": i} or N indices choose the starts."""
        super().reset(seed=seed)
        starts = self._begin(np.arange(self.num_envs), options, seeded=seed is not None)
        return self.dreams.frame.copy(), {"start": starts.copy(), "cont": np.ones(self.num_envs)}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One action in every row, (N,) or (N, A). Raises ValueError for what is no action."""
        reward, cont, terminated, truncated = self.dreams.step(self.dreams.world.action(actions, self.num_envs))
        infos: dict[str, Any] = {"cont": cont}
        if self.dreams.done.any():
            done = self.dreams.done.copy()
            final = np.full(self.num_envs, None, object)
            for row in np.flatnonzero(done):
                final[row] = self.dreams.frame[row].copy()
            infos |= {"final_obs": final, "_final_obs": done}
            self._begin(np.flatnonzero(done), None, seeded=False)
        return self.dreams.frame.copy(), reward, terminated, truncated, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """What is seen now, N pictures (H, W, 3) uint8, with render_mode="rgb_array"."""
        return tuple(self.dreams.frame.copy()) if self.render_mode == "rgb_array" else None


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
