"""What every world model is: a pure state machine over tensors, and how it says what to train.

Shapes: B batch, T time, C H W picture, A action size, F features. Frames are floats in [0, 1].
The timeline is the one of `envs/episode.py`: frame[t], then action[t], which brings reward[t] and frame[t + 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from envs.spec import Spec
from world_model import trees
from world_model.trees import Tree


class State(NamedTuple):
    """Where a dreamer stands: `latent` is what `decode` shows, `memory` what it remembers of the frames before."""

    latent: Tensor  # (B, *latent_shape)
    memory: Tree  # tensors, batch first


class Step(NamedTuple):
    """What one action brought: the state arrived in, its reward in the game's units, and P(the episode goes on)."""

    state: State
    reward: Tensor  # (B,)
    cont: Tensor  # (B,) in [0, 1]


class Batch(NamedTuple):
    """B segments of T consecutive indices of real episodes; padding comes only at the end of too short an episode."""

    frame: Tensor  # (B, T, C, H, W) uint8; zeros where not valid
    action: Tensor  # (B, T) int64 or (B, T, A) float in [-1, 1]; zeros where not acted
    reward: Tensor  # (B, T) what action[t] brought
    terminated: Tensor  # (B, T) bool
    has_action: Tensor  # (B, T) bool: there is an action, and the transition t -> t + 1 is real
    valid: Tensor  # (B, T) bool: the frame is real, not padding

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Losses(NamedTuple):
    """Named, unreduced, already masked terms; the trainer's `reduce` applies the scales.

    Episodes that count more are sampled more often, so no importance is applied here.
    """

    terms: dict[str, Tensor]  # (B, T) each, zero where the term does not apply
    metrics: dict[str, Tensor]  # detached scalars
    states: State | None = None  # (B, T, ...) detached: where imagination may start
    learned: Any = None  # detached: what `Objective.after` reads


@dataclass(frozen=True)
class Optim:
    """AdamW on one group of parameters, with the gradient's norm clipped."""

    lr: float = 3e-4
    eps: float = 1e-8
    clip: float = 100.0
    weight_decay: float = 0.0
    warmup: int = 200  # updates until the rate is whole
    decay: int = 0  # updates after which the n-th has decay / n of the rate; 0: always the whole


@dataclass(frozen=True)
class Objective:
    """One loss and the parameters it trains. Every parameter of a system belongs to exactly one objective."""

    name: str
    params: tuple[nn.Parameter, ...]
    loss: Callable[[Any], Losses]
    scales: dict[str, float]
    optim: Optim = field(default_factory=Optim)
    undecayed: tuple[nn.Parameter, ...] = ()  # of `params`, those that weight decay leaves alone
    after: Callable[[Any], None] | None = None  # what follows a step without a gradient; reads `Losses.learned`


@dataclass(frozen=True)
class Stage:
    """A phase of training: which objectives, on what segments, how many updates a round of the loop."""

    name: str
    objectives: tuple[Objective, ...]  # each takes a step on the same batch, in this order
    batch_size: int
    length: int
    updates: int = 1
    # (N, C, H, W) in [0, 1] -> (N, ...): what the losses read instead of the frames, computed once a round.
    encode: Callable[[Tensor], Tensor] | None = None


class WorldModel(nn.Module, ABC):
    """The six verbs of a world model, and the two that follow from them.

    Nothing is remembered inside the module: state goes in and comes out. Rows are independent of each other.
    """

    spec: Spec
    latent_shape: tuple[int, ...]
    feature_size: int
    heavy: bool = False  # a single row, too, is faster in bfloat16 where the processor multiplies it natively
    sees_frames: bool = False  # the features are the decoded frame, flat

    @abstractmethod
    def encode(self, frame: Tensor) -> Tensor:
        """The latent of a frame alone, without memory: (..., C, H, W) in [0, 1] -> (..., *latent_shape)."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """The picture of a latent: (..., *latent_shape) -> (..., C, H, W) in [0, 1]."""

    @abstractmethod
    def initial(self, batch_size: int) -> Tree:
        """The memory of somebody who has seen nothing."""

    @abstractmethod
    def advance(self, state: State, action: Tensor) -> Tree:
        """Remembers (latent, action): the memory with which the next frame is awaited."""

    @abstractmethod
    def sample(self, memory: Tree, temperature: float = 1.0) -> Tensor:
        """Draws the next latent: (B, *latent_shape). Temperature 0 takes the most likely one."""

    @abstractmethod
    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        """Reward (B,) in the game's units and continuation probability (B,) of having arrived in this state."""

    def reward_sign(self, state: State) -> Tensor:
        """The expected sign (B,) of the reward of having arrived here, for policies that learn from signs alone.

        Who does not tell signs apart from sizes clips the mean, as Atari's agents clip each reward.
        """
        return self.outcome(state)[0].clamp(-1, 1)

    @abstractmethod
    def features(self, state: State) -> Tensor:
        """What a policy sees: (B, F)."""

    @abstractmethod
    def observe(self, frame: Tensor, action: Tensor) -> State:
        """The states along real segments in one parallel pass: (B, T, C, H, W), (B, T[, A]) -> State of (B, T, ...).

        Equal to `start` on the first frame and `step` with each further one.
        """

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """How this system is trained, in order."""

    def prepare(self, frames: Tensor) -> None:  # noqa: B027 - most systems need no look at the data
        """Looks once at frames of the prefill, (N, C, H, W) in [0, 1], before training begins."""

    def pictures(self, frame: Tensor, action: Tensor) -> dict[str, np.ndarray]:
        """Further pictures (H, W, 3) uint8 of what this system knows, by name; most systems have none.

        From a real segment (1, T, C, H, W) in [0, 1], without padding, and its actions (1, T[, A]).
        """
        return {}

    def start(self, frame: Tensor, action: Tensor | None = None) -> State:
        """Burn-in on a real context: frames (B, T, C, H, W), the T - 1 actions between them (more are ignored)."""
        state = State(self.encode(frame[:, 0]), self.initial(frame.shape[0]))
        for t in range(1, frame.shape[1]):
            if action is None:
                raise ValueError("a context of several frames needs the actions between them")
            state = State(self.encode(frame[:, t]), self.advance(state, action[:, t - 1]))
        return state

    def step(self, state: State, action: Tensor, frame: Tensor | None = None, temperature: float = 1.0) -> Step:
        """One action further: dreams the next latent, or follows the real game when its frame is given."""
        memory = self.advance(state, action)
        latent = self.dream(memory, temperature) if frame is None else self.encode(frame)
        state = State(latent, memory)
        return Step(state, *self.outcome(state))

    def dream(self, memory: Tree, temperature: float = 1.0) -> Tensor:
        """`sample` for `step`, whose new memory is nobody else's yet: a model may note in it what it finds."""
        return self.sample(memory, temperature)

    def condense(self, memory: Tree) -> Tree:
        """As little of a memory as `recall` needs, for those who keep many."""
        return memory

    def recall(self, condensed: Tree) -> Tree:
        """The memory again."""
        return condensed

    def reset_rows(self, state: State, mask: Tensor) -> State:
        """Forgets the rows where mask (B,) is True; their latents stay as they are."""
        initial = self.initial(mask.shape[0])
        return State(state.latent, trees.where(mask, initial, state.memory))


def parameters_of(modules: Iterable[nn.Module | nn.Parameter]) -> tuple[nn.Parameter, ...]:
    """All parameters of the named parts, in order."""
    found: list[nn.Parameter] = []
    for part in modules:
        found += [part] if isinstance(part, nn.Parameter) else list(part.parameters())
    return tuple(found)


def to_unit(frame: Tensor) -> Tensor:
    """uint8 pixels to floats in [0, 1]; floats pass through."""
    return frame.float().div_(255.0) if frame.dtype == torch.uint8 else frame


def to_pixels(frame: Tensor) -> np.ndarray:
    """(..., C, H, W) in [0, 1] -> (..., H, W, 3) uint8; gray becomes RGB."""
    pixels = (frame.clamp(0, 1) * 255).round().byte().movedim(-3, -1)
    return pixels.expand(*pixels.shape[:-1], 3).cpu().numpy()
