"""N dreams in lock step: what can be dreamed in, how a dream begins, goes on and ends. `engine.py` makes games of it.

Shapes: N dreams, S starts, T time, C H W picture, A action size. Pictures shown are (H, W, 3) uint8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import error, spaces
from torch import Tensor

from envs.controls import Controls
from world_model import trees
from world_model.interface import State, WorldModel, to_pixels, to_unit


class Starts(NamedTuple):
    """S real contexts, from whose last frame a dream goes on."""

    frame: Tensor  # (S, T, C, H, W) uint8
    action: Tensor  # (S, T - 1) int64, or (S, T - 1, A) float in [-1, 1]


class EnvState(NamedTuple):
    """All that the future depends on, beside the actions to come. A copy: nothing that is dreamed later changes it."""

    state: State  # of N dreams
    time: np.ndarray  # (N,) steps since the start
    done: np.ndarray  # (N,) bool
    frame: np.ndarray  # (N, H, W, 3) uint8: what is seen now
    rng_state: tuple[Tensor, ...]  # of torch's generators, on the CPU and on the model's device
    np_random: Mapping[str, Any]  # of the generator that picks starts


@dataclass(frozen=True)
class World:
    """What can be dreamed in. The model must not be trained on while an environment uses it.

    `autocast` runs it in bfloat16 where that is possible, as training does.

    Raises:
        ValueError: starts or controls that do not fit the model.
    """

    model: WorldModel
    starts: Starts
    controls: Controls
    autocast: bool = False

    def __post_init__(self) -> None:
        spec, (frame, action) = self.model.spec, self.starts
        if frame.dtype != torch.uint8 or frame.dim() != 5 or frame.shape[2:] != spec.frame or not frame.shape[0]:
            raise ValueError(f"starts are {frame.dtype} {tuple(frame.shape)}, not (S, T, *{spec.frame}) of uint8")
        shape = (frame.shape[0], frame.shape[1] - 1, *([] if spec.discrete else [spec.action_size]))
        if action.shape != shape:
            raise ValueError(f"the starts' actions are {tuple(action.shape)}, not {shape}")
        if len(self.controls.names) != spec.action_size or self.controls.discrete != spec.discrete:
            raise ValueError(f"{len(self.controls.names)} controls do not fit {spec.action_size} actions")

    @property
    def observation_space(self) -> spaces.Box:
        """RGB pictures of the model's size, also when it sees gray ones."""
        return spaces.Box(0, 255, (*self.model.spec.frame[1:], 3), np.uint8)

    @property
    def action_space(self) -> spaces.Discrete | spaces.Box:
        """The game's own: its choices from 0, or its bounds."""
        if self.controls.low is None or self.controls.high is None:
            return spaces.Discrete(len(self.controls.names))
        return spaces.Box(np.array(self.controls.low, np.float32), np.array(self.controls.high, np.float32))

    def action(self, given: Any, num: int) -> Tensor:
        """The game's actions (N,) or (N, A) as the model takes them; continuous ones are clipped to the bounds.

        Raises:
            ValueError: another shape, a choice that does not exist, or not a number.
        """
        values, count, discrete = np.asarray(given), len(self.controls.names), self.controls.discrete
        shape = (num,) if discrete else (num, count)
        kind = np.integer if discrete else np.number
        good = values.shape == shape and np.issubdtype(values.dtype, kind) and np.isfinite(values).all()
        if not good or (discrete and not 0 <= values.min() <= values.max() < count):
            wanted = f"whole numbers from 0 to {count - 1}" if discrete else "finite numbers"
            raise ValueError(f"{given} is no action here: {wanted} of shape {shape} are")
        if discrete:
            return torch.from_numpy(values.astype(np.int64))
        return torch.from_numpy(self.controls.normalised(values).clip(-1, 1))


class Outcome(NamedTuple):
    """What one action brought to N dreams."""

    reward: np.ndarray  # (N,) float64, in the game's units
    cont: np.ndarray  # (N,) float64, the probability that the game goes on
    terminated: np.ndarray  # (N,) bool, drawn with 1 - cont
    truncated: np.ndarray  # (N,) bool, the horizon


class SeededModel:
    """Who runs a world's model with random numbers of its own: torch's default generators are left as they were.

    Not meant for several threads at once: torch's default generator belongs to all of them.
    """

    def __init__(self, world: World, seed: int = 0) -> None:
        self.world, self.device = world, next(world.model.parameters()).device
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Determines all luck from here on."""
        devices = [torch.device("cpu"), *([self.device] if self.device.type == "cuda" else [])]
        self.rng_state = tuple(torch.Generator(device).manual_seed(seed % 2**63).get_state() for device in devices)

    @contextmanager
    def rng_scope(self) -> Iterator[None]:
        """Within it, torch draws from `luck` and computes without gradients, in the precision of the training."""
        cuda = [self.device] if self.device.type == "cuda" else []
        mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=self.world.autocast)
        with torch.random.fork_rng(devices=cuda), torch.inference_mode(), mixed:
            torch.set_rng_state(self.rng_state[0])
            for device in cuda:
                torch.cuda.set_rng_state(self.rng_state[1], device)
            yield
            self.rng_state = (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda))


class DreamBatch(SeededModel):
    """N dreams in lock step."""

    def __init__(self, world: World, num: int, *, horizon: int | None, temperature: float) -> None:
        if num < 1 or (horizon is not None and horizon < 1) or not temperature >= 0:
            raise ValueError(f"no dream has num={num}, horizon={horizon}, temperature={temperature}")
        super().__init__(world)
        self.num, self.horizon, self.temperature = num, horizon, temperature
        self.state: State | None = None
        self.time = np.zeros(num, np.int64)
        self.done = np.ones(num, bool)
        self.frame = np.zeros((num, *world.observation_space.shape), np.uint8)
        with self.rng_scope():  # every start once: beginning again is then free
            frame, action = (part.to(self.device) for part in world.starts)
            self._starts = world.model.start(to_unit(frame), action)
            self._pictures = to_pixels(world.model.picture(self._starts).float())

    def begin(self, rows: np.ndarray, starts: np.ndarray) -> None:
        """Begins the rows anew from the starts, (R,) indices each; the first time all rows."""
        chosen, mask = np.zeros(self.num, np.int64), np.zeros(self.num, bool)
        chosen[rows], mask[rows] = starts, True
        with self.rng_scope():
            fresh = trees.rows(self._starts, torch.from_numpy(chosen).to(self.device))
            here = torch.from_numpy(mask).to(self.device)
            self.state = fresh if self.state is None else trees.where(here, fresh, self.state)
        self.frame = self.frame.copy()
        self.frame[rows] = self._pictures[starts]
        self.time[rows], self.done[rows] = 0, False

    def step(self, action: Tensor) -> Outcome:
        """One action further in every row: (N,) int64 or (N, A) in [-1, 1].

        Raises:
            gymnasium.error.ResetNeeded: a row has not begun or is over.
        """
        if self.state is None or self.done.any():
            raise error.ResetNeeded("the dream is over or has not begun: reset it first")
        model = self.world.model
        with self.rng_scope():
            self.state, reward, cont = model.step(self.state, action.to(self.device), temperature=self.temperature)
            self.frame = to_pixels(model.picture(self.state).float())
            told = (
                torch.stack([reward.double(), cont.double(), torch.rand_like(cont, dtype=torch.float64)]).cpu().numpy()
            )
        reward, cont, rng_state = told
        self.time += 1
        terminated = rng_state >= cont
        late = self.time >= self.horizon if self.horizon is not None else np.zeros(self.num, bool)
        self.done = terminated | late
        return Outcome(reward, cont, terminated, late & ~terminated)
