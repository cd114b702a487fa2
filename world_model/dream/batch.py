"""N dreams in lock step: what can be dreamed in, how a dream begins, goes on and ends. `envs.py` makes games of it.

Shapes: N dreams, S starts, T time, C H W picture, F features, A action size. Pictures shown are (H, W, 3) uint8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from envs.controls import Controls
from envs.errors import UserError
from world_model import trees
from world_model.interface import State, WorldModel, to_pixels, to_unit
from world_model.noise import forked_rng

NEARLY = 0.1  # from a whole number: a dreamed reward that is no further from it is that number
STARTS_AT_ONCE = 64  # are followed and drawn side by side, so that a thousand take no more memory on the way
OBSERVATIONS = ("rgb", "features")  # what an agent in the dream may see


class Starts(NamedTuple):
    """S real contexts, from whose last frame a dream goes on."""

    frame: Tensor  # (S, T, C, H, W) uint8
    action: Tensor  # (S, T - 1) int64, or (S, T - 1, A) float in [-1, 1]

    def begin(self, model: WorldModel, chosen: Tensor) -> State:
        """The states (N, ...) that the contexts of these numbers (N,) lead to."""
        device = next(model.parameters()).device
        frame, action = (part[chosen].to(device) for part in self)
        return model.start(to_unit(frame), action)


class Dream(NamedTuple):
    """N dreams at one moment, and what the last action brought. Nothing in it is ever changed."""

    state: State
    observation: np.ndarray  # what is seen now: a picture (N, H, W, 3) uint8, or features (N, F) float32
    reward: np.ndarray  # (N,) float64, in the game's units; the model's expectation
    cont: np.ndarray  # (N,) float64, the probability that the game goes on
    ended: np.ndarray  # (N,) bool, drawn with 1 - cont

    def rows(self, index: np.ndarray) -> Dream:
        """The rows picked by whole numbers."""
        device = self.state.latent.device
        return Dream(trees.rows(self.state, torch.from_numpy(index).to(device)), *(part[index] for part in self[1:]))

    @staticmethod
    def joined(parts: Sequence[Dream]) -> Dream:
        """The rows of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        state = trees.concat(*(part.state for part in parts))
        return Dream(state, *(np.concatenate(arrays) for arrays in zip(*(part[1:] for part in parts), strict=True)))

    def where(self, mask: np.ndarray, other: Dream) -> Dream:
        """These rows where mask (N,) is True, else those of `other`."""
        state = trees.where(torch.from_numpy(mask).to(self.state.latent.device), self.state, other.state)
        masked = (
            np.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(self[1:], other[1:], strict=True)
        )
        return Dream(state, *masked)


@dataclass(frozen=True)
class World:
    """What can be dreamed in. The model must not be trained on while an environment uses it.

    `autocast` runs it in bfloat16 where that is possible, as training does. `whole_rewards`: all rewards of the game
    were whole numbers; then an expectation that is nearly one (within 0.1) is that number.

    Raises:
        ValueError: starts or controls that do not fit the model.
    """

    model: WorldModel
    starts: Starts
    controls: Controls
    autocast: bool = False
    whole_rewards: bool = False

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
    def action_space(self) -> spaces.Discrete | spaces.Box:
        """The game's own: its choices from 0, or its bounds."""
        if self.controls.low is None or self.controls.high is None:
            return spaces.Discrete(len(self.controls.names))
        return spaces.Box(np.array(self.controls.low, np.float32), np.array(self.controls.high, np.float32))

    def action(self, given: Any, num_envs: int) -> Tensor:
        """The game's actions (N,) or (N, A) as the model takes them; continuous ones are clipped to the bounds.

        Raises:
            ValueError: another shape, a choice that does not exist, or not a number.
        """
        values, count, discrete = np.asarray(given), len(self.controls.names), self.controls.discrete
        shape = (num_envs,) if discrete else (num_envs, count)
        kind = np.integer if discrete else np.number
        good = values.shape == shape and np.issubdtype(values.dtype, kind) and np.isfinite(values).all()
        if not good or (discrete and not 0 <= values.min() <= values.max() < count):
            wanted = f"whole numbers from 0 to {count - 1}" if discrete else "finite numbers"
            raise ValueError(f"{given} is no action here: {wanted} of shape {shape} are")
        if discrete:
            return torch.from_numpy(values.astype(np.int64))
        return torch.from_numpy(self.controls.normalised(values).clip(-1, 1))


class DreamBatch:
    """Dreams in lock step, for gymnasium and for the page: a state goes in, what the action brought comes out.

    Its only state are random numbers of its own: torch's default generators are left as they were. All but `seed` need
    `rng_scope`. Not meant for several threads at once: torch's default generator belongs to all of them.

    With `obs_type="features"` a dream shows what the run's own policy sees of its states, and draws no picture.
    """

    def __init__(self, world: World, seed: int = 0, *, obs_type: str = "rgb") -> None:
        if obs_type not in OBSERVATIONS:
            raise ValueError(f'obs_type is "rgb" or "features", not "{obs_type}"')
        self.world, self.device, self.obs_type = world, next(world.model.parameters()).device, obs_type
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Determines all that is drawn from here on."""
        devices = [torch.device("cpu"), *([self.device] if self.device.type == "cuda" else [])]
        self.rng_state = tuple(torch.Generator(device).manual_seed(seed % 2**63).get_state() for device in devices)

    @contextmanager
    def rng_scope(self) -> Iterator[None]:
        """Within it, torch draws from `rng_state` and computes without gradients, in the precision of the world."""
        cuda = [self.device] if self.device.type == "cuda" else []
        mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=self.world.autocast)
        with forked_rng(self.device), torch.inference_mode(), mixed:
            torch.set_rng_state(self.rng_state[0])
            for device in cuda:
                torch.cuda.set_rng_state(self.rng_state[1], device)
            yield
            self.rng_state = (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda))

    def begin(self, starts: np.ndarray) -> Dream:
        """Dreams that go on from the world's starts with these numbers (N,)."""
        begun = []
        for first in range(0, len(starts), STARTS_AT_ONCE):
            chosen = torch.from_numpy(starts[first : first + STARTS_AT_ONCE])
            begun.append(self.at(self.world.starts.begin(self.world.model, chosen)))
        return Dream.joined(begun)

    def at(self, state: State) -> Dream:
        """Dreams that begin at these states (N, ...). Raises UserError for pictures of a model without them."""
        count = len(state.latent)
        return Dream(state, self._seen(state), np.zeros(count), np.ones(count), np.zeros(count, bool))

    def step(self, state: State, action: Tensor, temperature: float) -> Dream:
        """One action further in every row: (N,) int64 or (N, A) in [-1, 1]."""
        state, reward, cont = self.world.model.step(state, action.to(self.device), temperature=temperature)
        seen, drawn = self._seen(state), torch.rand_like(cont, dtype=torch.float64)
        gain, going, uniform = torch.stack([reward.double(), cont.double(), drawn]).cpu().numpy()
        if self.world.whole_rewards:
            gain = np.where(np.abs(gain - gain.round()) < NEARLY, gain.round() + 0.0, gain)  # + 0.0: -0.0 is 0
        return Dream(state, seen, gain, going, uniform >= going)

    def _seen(self, state: State) -> np.ndarray:
        if self.obs_type == "features":
            return self.world.model.features(state).float().cpu().numpy()
        return self.picture(state)

    def picture(self, state: State) -> np.ndarray:
        """What the states show, (N, H, W, 3) uint8. Raises UserError for a model without pictures."""
        picture = self.world.model.decode(state)
        if picture is None:
            raise UserError(
                "This model has no pictures: it follows games and trains agents, on features (obs_type=features), but "
                "its dreams cannot be watched."
            )
        return to_pixels(picture.float())
