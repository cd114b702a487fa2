"""IRIS's transformer: it reads frames token by token, each frame followed by its action (Micheli et al. 2023, A.2).

    position   0  1  ...  N-1   N     N+1 ...        one step = N tokens of frame[t], then action[t]
    token      z0 z1 ... zN-1  a[t]   z0 of t+1      the output at a position tells the observation token that follows;
    tells      z1 z2 ...  -    z0'    z1'            at the action also reward[t] and whether the episode ends there

Shapes: B batch, T steps, N tokens a frame, M tokens in a row, S = steps (N + 1) positions, V codes, D width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from world_model import trees
from world_model.heads import draw
from world_model.trees import Tree

REWARDS = (-1.0, 0.0, 1.0)  # what the three classes of the reward head mean


@dataclass(frozen=True)
class GPTConfig:
    """The paper's numbers."""

    codes: int = 512
    tokens: int = 16  # a frame
    steps: int = 20  # frames and actions that the transformer sees at most
    width: int = 256
    layers: int = 10
    heads: int = 4
    dropout: float = 0.1

    def build(self, actions: int) -> GPT:
        """The transformer for a game of that many actions."""
        return GPT(self, actions)


class Prediction(NamedTuple):
    """Logits. Flattened over T and N, token[j] is about observation token j + 1, wherever actions stand between."""

    token: Tensor  # (B, T, N, V)
    reward: Tensor  # (B, T, 3) of `REWARDS`
    end: Tensor  # (B, T, 2): goes on, ends


class GPT(nn.Module):
    """Pre-norm causal transformer with learned absolute positions, in a parallel and a cached form.

    Memory: keys and values (B, L, S, D), the tokens read (B, S), the output at the last of them h (B, D), and each
    row's own position (B,), so that rows of different ages stand in one batch. It begins with a frame's first token.
    """

    first: Tensor

    def __init__(self, config: GPTConfig, actions: int) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"a width of {config.width} cannot be shared among {config.heads} heads")
        self.config, self.actions = config, actions
        self.stride = config.tokens + 1
        self.window = config.steps * self.stride
        width = config.width
        self.embedding = nn.Embedding(config.codes + actions, width)  # the codes, then the actions
        self.position = nn.Parameter(torch.empty(self.window, width))
        self.blocks = nn.ModuleList(_Block(width, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.next_token = _head(width, config.codes)
        self.reward = _head(width, len(REWARDS))
        self.end = _head(width, 2)
        # By position: the row of the embedding where this kind of token begins.
        kinds = torch.tensor(([0] * config.tokens + [config.codes]) * config.steps)
        self.register_buffer("first", kinds, persistent=False)
        nn.init.normal_(self.position, std=0.02)
        self.apply(_begin)

    def forward(self, tokens: Tensor, action: Tensor) -> Prediction:
        """Whole segments at once, from their first frame: tokens (B, T, N), action (B, T), T at most `steps`."""
        steps = tokens.shape[1]
        if steps > self.config.steps:
            raise ValueError(f"the transformer sees at most {self.config.steps} steps, got {steps}")
        row = torch.cat([tokens, action.unsqueeze(-1)], -1).flatten(1)  # (B, M)
        x = self._embed(row, torch.arange(row.shape[1], device=row.device))
        dropout = self.config.dropout if self.training else 0.0
        x = F.dropout(x, dropout)
        for block in self.blocks:
            q, k, v = block.to_qkv(x)  # type: ignore[operator]
            x = block(x, F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True))
        hidden = self.norm(x).unflatten(1, (steps, self.stride))  # (B, T, N + 1, D)
        last = self.config.tokens - 1  # what follows a frame's last token is an action, and nobody predicts those
        ahead = torch.cat([hidden[:, :, :last], hidden[:, :, last + 1 :]], 2)
        acted = hidden[:, :, -1]
        return Prediction(self.next_token(ahead), self.reward(acted), self.end(acted))

    # ---- cached; without gradients and dropout ----
    def blank(self, batch_size: int) -> Tree:
        """Nothing read yet."""
        like = self.position
        cache = like.new_zeros(batch_size, len(self.blocks), self.window, self.config.width)
        tokens = torch.zeros(batch_size, self.window, dtype=torch.long, device=like.device)
        h = like.new_zeros(batch_size, self.config.width)
        position = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        return {"k": cache, "v": cache.clone(), "tokens": tokens, "h": h, "position": position}

    @torch.no_grad()
    def append(self, memory: Tree, tokens: Tensor) -> tuple[Tree, Tensor]:
        """Reads M tokens (B, M) further: the new memory, and the outputs (B, M, D) for the heads.

        Whether a token is an observation or an action follows from the row's position. A row without room for M
        more is an error (see `slide`).
        """
        return self._append_(trees.map(torch.clone, memory), tokens)

    @torch.no_grad()
    def draw_frame(self, memory: Tree, temperature: float = 1.0) -> Tensor:
        """Dreams the next frame, token by token, after an action: (B, N). Temperature 0 takes the most likely ones."""
        memory = trees.map(torch.clone, memory)  # one copy a frame, not one a token
        drawn = [self._draw(memory["h"], temperature)]
        while len(drawn) < self.config.tokens:
            memory, hidden = self._append_(memory, drawn[-1].unsqueeze(1))
            drawn.append(self._draw(hidden[:, 0], temperature))
        return torch.stack(drawn, 1)

    @torch.no_grad()
    def slide(self, memory: Tree, keep: int) -> Tree:
        """Makes room in full rows: only their last `keep` steps remain, read anew from position 0.

        Absolute positions are part of every key, so the cache cannot simply roll. Rows with room stay as they are;
        h stays too, as the output of the longer context. The published code forgets everything instead.
        """
        if not 0 < keep < self.config.steps:
            raise ValueError(f"between 1 and {self.config.steps - 1} steps can be kept, got {keep}")
        late = memory["tokens"][:, -keep * self.stride :]
        again, _ = self._append_(self.blank(late.shape[0]), late)
        full = memory["position"] + self.stride > self.window
        return trees.where(full, {**again, "h": memory["h"]}, memory)

    def _append_(self, memory: Tree, tokens: Tensor) -> tuple[Tree, Tensor]:
        """`append`, writing into the given memory's own tensors."""
        keys, values, position = memory["k"], memory["v"], memory["position"]
        slots = position.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)  # (B, M)
        rows = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
        memory["tokens"][rows, slots] = tokens
        seen = torch.arange(self.window, device=tokens.device) <= slots.unsqueeze(-1)  # (B, M, S)
        x = self._embed(tokens, slots)
        for i, block in enumerate(self.blocks):
            q, k, v = block.to_qkv(x)  # type: ignore[operator]
            keys[rows, i, slots] = _merge(k).to(keys.dtype)
            values[rows, i, slots] = _merge(v).to(values.dtype)
            k, v = (_split(cache[:, i], self.config.heads).to(q.dtype) for cache in (keys, values))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(1))
            x = block(x, mixed, dropout=False)
        hidden = self.norm(x)
        h = hidden[:, -1].to(memory["h"].dtype)
        return {**memory, "h": h, "position": position + tokens.shape[1]}, hidden

    def _embed(self, tokens: Tensor, slots: Tensor) -> Tensor:
        return self.embedding(tokens + self.first[slots]) + self.position[slots]

    def _draw(self, hidden: Tensor, temperature: float) -> Tensor:
        logits = self.next_token(hidden).float()
        return logits.argmax(-1) if temperature <= 0 else draw((logits / temperature).log_softmax(-1))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def to_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by head: (B, M, D) -> three of (B, heads, M, D / heads)."""
        q, k, v = (_split(part, self.heads) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        return q, k, v

    def forward(self, x: Tensor, mixed: Tensor, dropout: bool = True) -> Tensor:
        """What follows attention: x (B, M, D), mixed (B, heads, M, D / heads)."""
        training = self.training and dropout
        x = x + F.dropout(self.out(_merge(mixed)), self.dropout, training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, training)


def _split(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b m (n d) -> b n m d", n=heads)


def _merge(x: Tensor) -> Tensor:
    return rearrange(x, "b n m d -> b m (n d)")


def _head(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def _begin(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
