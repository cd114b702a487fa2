"""What a token world needs of its dynamics: what becomes of the tokens of a frame, and what an action brings.

Two are there: IRIS's transformer, token by token (`gpt.py`), and one that tells all tokens of a frame in one pass
(`block_transformer.py`). Shapes: B batch, T time, N tokens a frame, D width of the output h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from world_model.trees import Tree

REWARDS = (-1, 0, 1)  # the sign of the reward, by class of the reward head


class Foreseen(NamedTuple):
    """What was said of whole segments before it was seen."""

    nats: Tensor  # (B, T, N) how surprising a frame's tokens were, 0 where nobody had foreseen any
    reward: Tensor  # (B, T, 3) logits of `REWARDS`: what action[t] brings
    end: Tensor  # (B, T, 2) logits: goes on, ends
    metrics: dict[str, Tensor]  # detached scalars


class TokenDynamics(nn.Module, ABC):
    """A memory that awaits a frame holds h (B, D), from which reward and ending are told and which a policy sees.

    What has read a frame keeps the h with which it was awaited. Rows are independent, whatever their ages.
    """

    width: int  # of h
    reward: nn.Module  # h -> logits of `REWARDS`
    end: nn.Module  # h -> logits: goes on, ends

    @abstractmethod
    def initial(self, batch_size: int) -> Tree:
        """Nothing read yet."""

    @abstractmethod
    def advance(self, memory: Tree, tokens: Tensor, action: Tensor) -> Tree:
        """A frame (B, N) that was imagined or observed, and the action (B,) taken on it: the next one is awaited."""

    @abstractmethod
    def imagine(self, memory: Tree, temperature: float = 1.0) -> tuple[Tensor, Tree]:
        """The awaited frame's tokens (B, N), dreamed; temperature 0 takes the most likely."""

    @abstractmethod
    def observe(self, memory: Tree, tokens: Tensor) -> Tree:
        """The awaited frame's tokens, seen."""

    @abstractmethod
    def has_action(self, memory: Tree) -> Tensor:
        """(B,) bool: an action has been taken, so that h tells something."""

    @abstractmethod
    def held(self, past: int) -> int:
        """How many of so many steps of a context `start` needs to know."""

    @abstractmethod
    def start(self, tokens: Tensor, action: Tensor) -> Tree:
        """Burn-in: frames (B, T, N) and the T - 1 actions between them, T - 1 at most `held` of them."""

    @abstractmethod
    def foreseen(self, tokens: Tensor, action: Tensor, codes: Tensor) -> Foreseen:
        """Whole segments in training: tokens (B, T, N), action (B, T), codes (V, C) of the tokenizer."""

    @abstractmethod
    def prior_kl(self, memory: Tree, other: Tree) -> Tensor:
        """KL (B,) in nats between what two memories expect of the awaited frame."""

    # ---- what follows from these ----
    def step(
        self, memory: Tree, tokens: Tensor, action: Tensor, seen: Tensor | None = None, temperature: float = 1.0
    ) -> tuple[Tensor, Tree]:
        """`advance`, and then what is seen (B, N), or what is imagined."""
        memory = self.advance(memory, tokens, action)
        return self.imagine(memory, temperature) if seen is None else (seen, self.observe(memory, seen))

    def own(self, memory: Tree) -> Tree:
        """The same memory, as later steps are cheapest with."""
        return memory

    def condense(self, memory: Tree) -> Tree:
        """As little of a memory as `recall` needs."""
        return memory

    def recall(self, condensed: Tree) -> Tree:
        """The memory again."""
        return condensed


def surprise(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats: (..., K), (...) -> (...)."""
    return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none").view_as(target)


def relu_head(width: int, classes: int) -> nn.Sequential:
    """What tells logits (..., classes) from an output (..., D)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def begin(module: nn.Module) -> None:
    """The initial weights of both transformers, for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
