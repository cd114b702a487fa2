"""What every world model is: a pure state machine over tensors, and how it says what to train.

Shapes: B batch, T time, C H W picture, A action size, F features. Frames are floats in [0, 1].
The timeline is the one of `envs/episode.py`: frame[t], then action[t], which brings reward[t] and frame[t + 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.spec import Spec
from world_model import trees
from world_model.trees import Tree


class State(NamedTuple):
    """Where a dreamer stands: the `latent` of the present frame, and the `memory` of this frame and those before."""

    latent: Tensor  # (B, *latent_shape)
    memory: Tree  # tensors, batch first


class Step(NamedTuple):
    """What one action brought: the state arrived in, its reward in the game's units, and P(the episode goes on)."""

    state: State
    reward: Tensor  # (B,)
    cont: Tensor  # (B,) in [0, 1]


class Tokens(NamedTuple):
    """Frames as grids of codes, each of which describes a cell of the picture."""

    code: Tensor  # (B, h, w) int64
    codes: int  # of the codebook
    cell: tuple[int, int]  # pixels, height and width; the grid may reach over the lower and the right edge


class Batch(NamedTuple):
    """B segments of T consecutive indices of real episodes; padding comes only at the end of too short an episode."""

    frame: Tensor  # (B, T, C, H, W) uint8; zeros where not valid
    action: Tensor  # (B, T) int64 or (B, T, A) float in [-1, 1]; zeros where there is none
    reward: Tensor  # (B, T) what action[t] brought
    terminated: Tensor  # (B, T) bool
    has_action: Tensor  # (B, T) bool: there is an action, and the transition t -> t + 1 is real
    valid: Tensor  # (B, T) bool: the frame is real, not padding
    code: Tensor | None = None  # (B, T, ...) what `Stage.encode` made of the frames; None for stages without it
    is_first: Tensor | None = None  # (B,) bool: the segment begins where its game does

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return trees.to(self, device)  # type: ignore[no-any-return]

    def rows(self, chosen: Tensor) -> Batch:
        """Some of the segments, by index or mask."""
        return trees.rows(self, chosen)  # type: ignore[no-any-return]

    def mask(self, name: str) -> Tensor:
        """Where a term of a loss counts, (B, T) bool: "valid", "has_action", or "arrived".

        "arrived" marks the indices whose frame was reached by an action within the segment, so that what
        action[t - 1] brought can be told by the state at t; never the first.
        """
        if name == "arrived":
            return F.pad(self.valid[:, 1:] & self.has_action[:, :-1], (1, 0))
        return {"valid": self.valid, "has_action": self.has_action}[name]


class Term(NamedTuple):
    """One named part of a loss: unreduced, unmasked, and the name of the mask that says where it counts."""

    value: Tensor  # (B, T, ...)
    mask: str = ""  # a name that the data's `mask` method knows; "": counts everywhere


class Losses(NamedTuple):
    """Named, unreduced terms; the trainer's `reduce` applies masks and scales.

    Episodes that count more are sampled more often, so no importance is applied here.
    """

    terms: dict[str, Term]
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


class Metric(NamedTuple):
    """What a logged number means: a line of the documentation, and where else it is shown."""

    text: str
    shown: str = ""  # its short name on the terminal; "" hides it there
    panel: str = ""  # the title of its panel in the learning curve; "" draws none


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
    metrics: Mapping[str, Metric] = field(default_factory=dict)  # of its terms and metrics, by name


@dataclass(frozen=True)
class Stage:
    """A phase of training: which objectives, on what segments, how many updates a round of the loop."""

    name: str
    objectives: tuple[Objective, ...]  # each takes a step on the same batch, in this order
    batch_size: int
    length: int
    updates: int = 1
    # What the losses read beside the frames, computed once a round: an episode's frames in order (T, C, H, W) in
    # [0, 1] and the actions between them (T - 1[, A]) -> (T, ...). Index t may depend on frame[t - 1], action[t - 1]
    # and frame[t] alone, so that an episode that has grown is encoded from where it had ended.
    encode: Callable[[Tensor, Tensor], Tensor] | None = None


class WorldModel(nn.Module, ABC):
    """A latent dynamics model as a pure state machine: states go in and come out, the module itself keeps none.

    A new system writes `initial`, `advance`, `imagine`, `observe`, `outcome`, `features`, `decode` and `stages`, and
    sets the three attributes; all else has a default. Rows of a batch are independent of each other. `advance` is the
    step of the sequence model. The next frame's latent is then either drawn from the prior (`imagine`) or inferred
    from the frame (`observe`, the posterior); both read the memory, and return it with the frame added, so that the
    next `advance` adds the action alone.
    """

    spec: Spec
    latent_shape: tuple[int, ...]
    feature_size: int
    # Fixed shapes, no number asked of the device and none made from Python's at each call: what a CUDA graph records.
    updates_are_graph_safe: bool = False
    dreams_are_graph_safe: bool = False
    gives_states: bool = False  # whether its losses say which states they saw (`Losses.states`), to dream on from

    @abstractmethod
    def initial(self, batch_size: int) -> Tree:
        """The memory before an episode's first frame."""

    @abstractmethod
    def advance(self, state: State, action: Tensor) -> Tree:
        """The sequence model's step: the memory with the action (B,) or (B, A) added, which predicts the next frame."""

    @abstractmethod
    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        """The state after a next frame drawn from the prior. Temperature 0 takes the mode."""

    @abstractmethod
    def observe(self, memory: Tree, frame: Tensor) -> State:
        """The state after the next frame (B, C, H, W) in [0, 1]: the posterior."""

    @abstractmethod
    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        """Reward and continuation heads: reward (B,) in the game's units and P(the episode goes on) (B,) on arrival."""

    def reward_sign(self, state: State) -> Tensor:
        """The expected sign (B,) of the reward of having arrived here, for policies that learn from signs alone.

        By default the expected reward, clipped to [-1, 1].
        """
        return self.outcome(state)[0].clamp(-1, 1)

    def prior_kl(self, memory: Tree, other: Tree) -> Tensor | None:
        """KL (B,) in nats between what two memories expect of the awaited latent; None where it is not computed."""
        return None

    @abstractmethod
    def features(self, state: State) -> Tensor:
        """What a policy sees: (B, F)."""

    @property
    def components(self) -> int:
        """How many components of a mixture `imagine` draws from, each of which can be left out; 0: there are none."""
        return 0

    def without(self, memory: Tree, components: Collection[int]) -> Tree:
        """The memory in which these components (from 0), and only these, are drawn from no more.

        What is dreamed from it inherits that; so it is seen what each component stands for (Ellefsen et al. 2019).
        """
        raise ValueError("this world model draws from no mixture")

    @abstractmethod
    def decode(self, state: State) -> Tensor | None:
        """The picture of a state, (B, C, H, W) in [0, 1]; None without pictures, as of an `unseen` state."""

    def tokenize(self, frame: Tensor) -> Tokens | None:
        """Frames (B, C, H, W) in [0, 1] as grids of codes; None for a system that has none."""
        return None

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """How this system is trained, in order."""

    # ---- what follows from these; a system may override them with a faster equal ----
    def start(self, frame: Tensor, action: Tensor | None = None) -> State:
        """Burn-in on a real context: frames (B, T, C, H, W), the T - 1 actions between them (more are ignored).

        Raises ValueError when there are several frames and no actions.
        """
        if action is None and frame.shape[1] > 1:
            raise ValueError("a context of several frames needs the actions between them")
        state = self.observe(self.initial(frame.shape[0]), frame[:, 0])
        for t in range(1, frame.shape[1]):
            assert action is not None
            state = self.observe(self.advance(state, action[:, t - 1]), frame[:, t])
        return state

    def step(self, state: State, action: Tensor, frame: Tensor | None = None, temperature: float = 1.0) -> Step:
        """One action further: dreams the next frame, or follows the real game when its frame is given."""
        memory = self.advance(state, action)
        state = self.imagine(memory, temperature) if frame is None else self.observe(memory, frame)
        return Step(state, *self.outcome(state))

    def prepare(self, frames: Tensor) -> None:  # noqa: B027 - most systems need no look at the data
        """Computes statistics of the data, once before training, from frames of the prefill (N, C, H, W) in [0, 1]."""

    def condense(self, memory: Tree) -> Tree:
        """A memory compressed for storage, as by a page that rewinds; `recall` restores it."""
        return memory

    def recall(self, condensed: Tree) -> Tree:
        """The memory that `condense` compressed."""
        return condensed

    def own(self, memory: Tree) -> Tree:
        """The same memory, of which later steps may be made in place: for callers that keep no state but the newest."""
        return memory

    def unseen(self, state: State) -> State:
        """The same state without what only `decode` needs: for rollouts that nobody looks at."""
        return state

    def reset_rows(self, memory: Tree, mask: Tensor) -> Tree:
        """Sets the rows where mask (B,) is True back to `initial`."""
        return trees.where(mask, self.initial(mask.shape[0]), memory)

    def reconstruct(self, frame: Tensor) -> Tensor | None:
        """The last of T frames (B, T, C, H, W) in [0, 1], encoded by itself and decoded; None without pictures."""
        return self.decode(self.start(frame[:, -1:]))

    def picture(self, state: State) -> Tensor:
        """`decode`, for those who cannot do without. Raises ValueError for a model without pictures."""
        decoded = self.decode(state)
        if decoded is None:
            raise ValueError("this world model decodes no pictures, so that it cannot be shown")
        return decoded


def parameters_of(modules: Iterable[nn.Module | nn.Parameter]) -> tuple[nn.Parameter, ...]:
    """All parameters of the named parts, in order."""
    found: list[nn.Parameter] = []
    for part in modules:
        found += [part] if isinstance(part, nn.Parameter) else list(part.parameters())
    return tuple(found)


def to_unit(frame: Tensor) -> Tensor:
    """uint8 pixels to floats in [0, 1]; floats pass through."""
    return frame.float().div_(255.0) if frame.dtype == torch.uint8 else frame


def to_bytes(frame: Tensor) -> Tensor:
    """(..., C, H, W) in [0, 1] -> (..., H, W, 3) uint8; gray becomes RGB."""
    pixels = (frame.clamp(0, 1) * 255).round().byte().movedim(-3, -1)
    return pixels.expand(*pixels.shape[:-1], 3)


def to_pixels(frame: Tensor) -> np.ndarray:
    """`to_bytes` as an array."""
    return to_bytes(frame).cpu().numpy()
