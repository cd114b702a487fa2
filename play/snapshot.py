"""What one visitor sees and can come back to: plain records. Pictures are (H, W, 3) uint8."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from envs.controls import Action
from envs.games import Games
from play.real_game import ReplayPosition
from policies.interface import Learner
from policies.planner import PlannerConfig
from world_model import trees
from world_model.dream.batch import World
from world_model.interface import State
from world_model.trees import Tree

MODES = ("dream", "real", "both")
PLAYERS = ("human", "agent", "planner", "random")
WITHOUT_AGENT = ("human", "random", "planner")  # of a world model alone


@dataclass(frozen=True)
class Parts:
    """What all visitors share and none changes."""

    name: str  # of the game, for a person
    world: World
    learner: Learner
    game: Callable[[], Games]  # opens one copy of the real game; raises UserError where that is impossible
    human_weight: float = 5.0  # of episodes that a person played
    players: tuple[str, ...] = PLAYERS  # who can be put at the controls
    aspect: float | None = None  # width by height at which the dream is shown; None: that of its pixels
    planner: PlannerConfig = PlannerConfig()


class Packed(NamedTuple):
    """A picture (H, W, 3) uint8 that takes a hundredth of its memory: most of it is alike."""

    data: bytes
    shape: tuple[int, ...]

    @staticmethod
    def of(picture: np.ndarray) -> Packed:
        return Packed(zlib.compress(picture.tobytes(), 1), picture.shape)

    def picture(self) -> np.ndarray:
        """As it was."""
        return np.frombuffer(zlib.decompress(self.data), np.uint8).reshape(self.shape)


class View(NamedTuple):
    """The dream or the real game, at one moment."""

    state: State  # of the dreamer, or of the model that follows the game
    picture: np.ndarray  # of the model's size
    film: np.ndarray | Packed | None = None  # what the real game itself shows, at its own size
    frame: np.ndarray | None = None  # (C, H, W) uint8 of the real game
    reward: float = 0.0  # of the last step, in the game's units; the dream's is the model's expectation
    total: float = 0.0  # since the start
    cont: float = 1.0  # the model's probability that the game goes on
    done: bool = False

    @property
    def size_bytes(self) -> int:
        """Memory that its pictures take."""
        film = len(self.film.data) if isinstance(self.film, Packed) else 0 if self.film is None else self.film.nbytes
        return self.picture.nbytes + film + (0 if self.frame is None else self.frame.nbytes)

    def to_dict(self) -> dict[str, Any]:
        """What the display shows of it."""
        numbers = {"reward": self.reward, "return": self.total, "cont": self.cont}
        return {name: number(value) for name, value in numbers.items()} | {"over": self.done}


class Estimate(NamedTuple):
    """What the agent makes of a moment, whoever plays."""

    value: float | None  # the return it expects from here on
    probabilities: list[float] | None  # of each discrete action


class Snapshot(NamedTuple):
    """All that the future depends on, beside what the player will do; nothing in it is ever changed."""

    mode: str
    seed: int
    start: int | None  # which of the world's starts it began from; None: the real game's own beginning
    step: int  # since the start
    horizon: int  # steps dreamed since the dreamer saw a real frame
    dream: View | None
    real: View | None
    memory: Tree  # of the policy
    view: Tensor  # (1, F) what the policy sees
    estimate: Estimate
    action: Action | None  # that led here
    rng_state: tuple[Tensor, ...]  # of torch's generators
    position: ReplayPosition | None  # where the real game stands

    @property
    def done(self) -> bool:
        """Whether the next step begins anew; beside the real game, the dream's own ending is only shown."""
        side = self.real or self.dream
        return side is not None and side.done

    @property
    def size_bytes(self) -> int:
        """Memory it takes, nearly: what two moments share is counted twice, plain numbers are not counted."""
        sides = [side for side in (self.real, self.dream) if side is not None]
        tensors = trees.size_bytes((self.memory, self.view, self.rng_state, *(side.state for side in sides)))
        return tensors + sum(side.size_bytes for side in sides)

    def pictures(self, *, film: bool = False) -> dict[str, np.ndarray]:
        """What there is to see, in the order in which it is shown; with `film` the real game's own picture."""
        seen = {name: side.picture for name, side in (("real", self.real), ("dream", self.dream)) if side is not None}
        if film and self.real is not None and isinstance(self.real.film, np.ndarray):
            seen["real"] = self.real.film
        if self.real is not None and self.dream is not None:
            apart = np.abs(self.real.picture.astype(np.float32) - self.dream.picture)
            seen["difference"] = np.sqrt(255 * apart).astype(np.uint8)  # small ones would be black on a screen
        return seen


def number(value: float | None, digits: int = 4) -> float | None:
    """As JSON knows it: a model that has gone astray may answer nan."""
    return None if value is None or not math.isfinite(value) else round(value, digits)
