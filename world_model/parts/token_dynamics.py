"""What a token world needs of its dynamics: what becomes of the tokens of a frame, and what an action brings.

Four are there: IRIS's transformer, token by token (`gpt.py`), one that tells all tokens of a frame in one pass
(`block_transformer.py`), a GRU over the places (`position_gru.py`), and convolutions that read the last frames
themselves (`frame_dynamics.py`). Shapes: B batch, T time, N tokens a frame, V codes, C H W picture, D width of h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.parts.heads import mean_where
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
    context: int = 0  # of the pictures that it is given beside the tokens: those of the last frames, oldest first
    reward: nn.Module  # h -> logits of `REWARDS`
    end: nn.Module  # h -> logits: goes on, ends

    @abstractmethod
    def initial(self, batch_size: int) -> Tree:
        """Nothing read yet."""

    @abstractmethod
    def advance(self, memory: Tree, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """A frame (B, N) that was imagined or observed, and the action (B,) taken on it: the next one is awaited.

        Who reads pictures is given (B, context, C, H, W), the last of which is this frame's.
        """

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
    def start(self, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """Burn-in: frames (B, T, N) and the T - 1 actions between them, T - 1 at most `held` of them.

        Who reads pictures is given (B, T, context, C, H, W).
        """

    @abstractmethod
    def foreseen(self, tokens: Tensor, action: Tensor, codes: Tensor, pictures: Tensor | None = None) -> Foreseen:
        """Whole segments in training: tokens (B, T, N), action (B, T), codes (V, E) of the tokenizer.

        Who reads pictures is given (B, T, context, C, H, W).
        """

    @abstractmethod
    def prior_kl(self, memory: Tree, other: Tree) -> Tensor:
        """KL (B,) in nats between what two memories expect of the awaited frame."""

    # ---- what follows from these ----
    def step(
        self, memory: Tree, tokens: Tensor, action: Tensor, seen: Tensor | None = None, temperature: float = 1.0,
        pictures: Tensor | None = None,
    ) -> tuple[Tensor, Tree]:  # fmt: skip
        """`advance`, and then what is seen (B, N), or what is imagined."""
        memory = self.advance(memory, tokens, action, pictures)
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

    @torch.no_grad()
    def rolled_out(self, tokens: Tensor, action: Tensor, steps: int, teacher_forcing: float) -> Tensor:
        """Segments (B, T, N) whose last frames are its own, the most likely, so that `steps` in a row are told from
        them; frames of whole rows are real again with a probability of `teacher_forcing`.

        No gradient flows through a choice of tokens, so that one pass over what came of it learns the same as going
        step by step.
        """
        shown, first = tokens.clone(), tokens.shape[1] - steps
        known = slice(first - 1 - self.held(first - 1), first)
        memory = self.start(tokens[:, known], action[:, known])
        for t in range(first, tokens.shape[1] - 1):
            memory = self.advance(memory, shown[:, t - 1], action[:, t - 1])
            own, memory = self.imagine(memory, 0)
            forced = torch.rand(len(tokens), 1, device=tokens.device) < teacher_forcing
            shown[:, t] = torch.where(forced, tokens[:, t], own)
        return shown


def judged(logits: Tensor, target: Tensor, before: Tensor, nats: Tensor) -> dict[str, Tensor]:
    """How well tokens (B, T, N) are told by logits (B, T, N, V), beside those of the frame before: scalars."""
    right, moved = (logits.detach().argmax(-1) == target).float(), (target != before).float()
    return {
        "accuracy": right.mean(), "accuracy_moved": mean_where(right, moved), "still": 1 - moved.mean(),
        "certainty": (-nats.detach()).exp().mean(),
    }  # fmt: skip


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL in nats of logits (B, N, V), summed over the tokens: (B,)."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum((-2, -1))


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
