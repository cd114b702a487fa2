"""Interface of a token world's dynamics.

Four are there: IRIS's transformer, token by token (`gpt.py`), one that predicts all tokens of a frame in one pass
(`block_transformer.py`), a GRU over the places (`position_gru.py`), and convolutions that read the last frames
themselves (`frame_dynamics.py`). Shapes: B batch, T time, N tokens a frame, V codes, C H W picture, D width of h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.parts.heads import draw_tempered
from world_model.trees import Tree

REWARDS = (-1, 0, 1)  # the sign of the reward, by class of the reward head


class Predictions(NamedTuple):
    """What was predicted of whole segments in training."""

    nats: Tensor  # (B, T, N) cross-entropy of each token, 0 where none was predicted
    reward: Tensor  # (B, T, 3) logits of `REWARDS`: the sign of what action[t] brings
    end: Tensor  # (B, T, 2) logits: goes on, ends
    h: Tensor  # (B, T, D) what those two are predicted from
    right: Tensor | None  # (B, T - 1, N) bool: the most likely token is the one that came; None where nobody asks


class TokenDynamics(nn.Module, ABC):
    """A sequence model over grids of tokens.

    Its memory holds h (B, D), the output from which the next frame, reward and ending are predicted and which a policy
    sees; a frame that is read leaves h as it was. Rows are independent, whatever their ages.
    """

    width: int  # of h
    context: int = 0  # of the pictures that it is given beside the tokens: those of the last frames, oldest first
    reward: nn.Module  # h -> logits of `REWARDS`
    end: nn.Module  # h -> logits: goes on, ends

    @abstractmethod
    def initial(self, batch_size: int) -> Tree:
        """The memory before the first frame."""

    @abstractmethod
    def advance(self, memory: Tree, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """Adds the action (B,) taken on the frame (B, N), imagined or observed: the next frame is predicted.

        Dynamics that read pictures are given (B, context, C, H, W), the last of which is this frame's.
        """

    @abstractmethod
    def imagine(self, memory: Tree, temperature: float = 1.0) -> tuple[Tensor, Tree]:
        """The next frame's tokens (B, N), sampled; temperature 0 takes the most likely. Returns them and the memory."""

    @abstractmethod
    def observe(self, memory: Tree, tokens: Tensor) -> Tree:
        """The memory with the next frame's real tokens (B, N) read."""

    @abstractmethod
    def has_action(self, memory: Tree) -> Tensor:
        """(B,) bool: an action has been taken, so that h means something."""

    @abstractmethod
    def held(self, past: int) -> int:
        """How many of so many steps of a context `start` needs to know."""

    @abstractmethod
    def start(self, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """Burn-in: frames (B, T, N) and the T - 1 actions between them, T - 1 at most `held` of them.

        Dynamics that read pictures are given (B, T, context, C, H, W).
        """

    @abstractmethod
    def predict(self, tokens: Tensor, action: Tensor, codes: Tensor, pictures: Tensor | None = None) -> Predictions:
        """Whole segments in training: tokens (B, T, N), action (B, T), codes (V, E) of the tokenizer.

        Dynamics that read pictures are given (B, T, context, C, H, W).
        """

    @abstractmethod
    def prior_kl(self, memory: Tree, other: Tree) -> Tensor:
        """KL (B,) in nats between what two memories predict of the next frame."""

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

    def partly_rolled_out(
        self, tokens: Tensor, action: Tensor, steps: int, share: float, teacher_forcing: float
    ) -> Tensor:
        """Segments (B, T, N), the first of which, a share of them, end with its own tokens; see `rolled_out`."""
        steps, rows = rollout(tokens, steps, share)
        if not rows:
            return tokens
        own = self.rolled_out(tokens[:rows], action[:rows], steps, teacher_forcing)
        return torch.cat([own, tokens[rows:]])

    @torch.no_grad()
    def rolled_out(self, tokens: Tensor, action: Tensor, steps: int, teacher_forcing: float) -> Tensor:
        """Segments (B, T, N) whose last frames are its own, the most likely, so that `steps` in a row are read off
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


class ParallelDynamics(TokenDynamics):
    """All tokens of the awaited frame are predicted at once, from an output that is kept: the frame itself is read with
    the action that follows it. Memory of one that awaits a frame: out (B, ...) that predicts its tokens, h (B, D), and
    count (B,), above 0 once a frame has been read.
    """

    @abstractmethod
    def logits(self, memory: Tree) -> Tensor:
        """What is expected of the awaited frame's tokens, each by itself: (B, N, V)."""

    def imagine(self, memory: Tree, temperature: float = 1.0) -> tuple[Tensor, Tree]:
        """Each token by itself."""
        return draw_tempered(self.logits(memory), temperature), memory

    def observe(self, memory: Tree, tokens: Tensor) -> Tree:
        """Nothing: what is awaited is read with the action that follows."""
        return memory

    def has_action(self, memory: Tree) -> Tensor:
        """See `TokenDynamics`."""
        return memory["count"] > 0  # type: ignore[no-any-return]

    def start(self, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """Step by step."""
        memory = self.initial(len(tokens))
        for t in range(tokens.shape[1] - 1):
            memory = self.advance(memory, tokens[:, t], action[:, t], None if pictures is None else pictures[:, t])
        return memory

    def prior_kl(self, memory: Tree, other: Tree) -> Tensor:
        """The sum over the tokens."""
        p, q = (self.logits(one).log_softmax(-1) for one in (memory, other))
        return (p.exp() * (p - q)).sum((-2, -1))


class PlacewiseDynamics(ParallelDynamics):
    """Each token is predicted from an output of its own, out (B, N, D), through the same linear layer. Memory also,
    where it remembers more than it reads: gru (B, ..., D)."""

    tokens: int
    next_tokens: nn.Linear
    gru_layers: tuple[int, ...] | None = None  # of the memory's gru beside rows and width; None: there is none

    def initial(self, batch_size: int) -> Tree:
        """See `TokenDynamics`."""
        like, width = self.next_tokens.weight, self.width
        memory: dict[str, Tensor] = {
            "out": like.new_zeros(batch_size, self.tokens, width), "h": like.new_zeros(batch_size, width),
            "count": torch.zeros(batch_size, dtype=torch.long, device=like.device),
        }  # fmt: skip
        if self.gru_layers is not None:
            memory["gru"] = like.new_zeros(batch_size, *self.gru_layers, width)
        return memory

    def logits(self, memory: Tree) -> Tensor:
        """See `ParallelDynamics`."""
        return self.next_tokens(memory["out"]).float()  # type: ignore[no-any-return]

    def awaiting(self, out: Tensor, h: Tensor, gru: Tensor | None) -> Tree:
        """The memory after a pass."""
        memory = {"out": out, "h": h, "count": torch.ones(len(h), dtype=torch.long, device=h.device)}
        return memory if gru is None else {**memory, "gru": gru}

    def predictions(self, out: Tensor, h: Tensor, tokens: Tensor) -> Predictions:
        """Of whole segments, by what awaited each of their frames: out (B, T, N, D), h (B, T, D); tokens (B, T, N)."""
        logits, target = self.next_tokens(out[:, :-1]).float(), tokens[:, 1:]
        nats = F.pad(cross_entropy(logits, target), (0, 0, 1, 0))
        return Predictions(nats, self.reward(h), self.end(h), h, logits.detach().argmax(-1) == target)


def rollout(segments: Tensor, steps: int, share: float) -> tuple[int, int]:
    """Of segments (B, T, ...), how many frames at the end of how many rows are a model's own; no rows for one frame."""
    steps = min(steps, segments.shape[1] - 1)
    return steps, round(share * len(segments)) if steps > 1 else 0


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats: (..., K), (...) -> (...)."""
    return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none").view_as(target)


def relu_head(width: int, classes: int) -> nn.Sequential:
    """What computes logits (..., classes) from an output (..., D)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def begin(module: nn.Module) -> None:
    """The initial weights of a transformer and of heads, for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
