"""IRIS's transformer: it reads frames token by token, each frame followed by its action (Micheli et al. 2023, A.2).

    position   0  1  ...  N-1   N     N+1 ...        one step = N tokens of frame[t], then action[t]
    token      z0 z1 ... zN-1  a[t]   z0 of t+1      the output at a position tells the observation token that follows;
    tells      z1 z2 ...  -    z0'    z1'            at the action also reward[t] and whether the episode ends there

Shapes: B batch, T steps, N tokens a frame, M tokens in a row, S = steps (N + 1) positions, V codes, D width, d of it
for each head.
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

_Linear = tuple[Tensor, Tensor]

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

    Memory: each layer's keys and values (B, heads, S, d), the tokens read (B, S), the output at the last of them
    h (B, D), and each row's own position (B,), so that rows of different ages stand in one batch. It begins with a
    frame's first token.
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
        self.blocks = nn.ModuleList(_Block(width, config.heads) for _ in range(config.layers))
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
        slots = torch.arange(row.shape[1], device=row.device)
        hidden_from = _bias(slots, slots.unsqueeze(1)).unsqueeze(0)  # (1, M, M)
        rate = self.config.dropout if self.training else 0.0
        x = _drop(self._embed(row, slots), rate)
        for block in self.blocks:
            weights = block.weights()  # type: ignore[operator]
            q, k, v = block.to_qkv(x, weights)  # type: ignore[operator]
            x = block(x, _attend(q, k, v, hidden_from, rate), weights, rate)
        hidden = self.norm(x).unflatten(1, (steps, self.stride))  # (B, T, N + 1, D)
        last = self.config.tokens - 1  # what follows a frame's last token is an action, and nobody predicts those
        ahead = torch.cat([hidden[:, :, :last], hidden[:, :, last + 1 :]], 2)
        acted = hidden[:, :, -1]
        return Prediction(self.next_token(ahead), self.reward(acted), self.end(acted))

    # ---- cached; without gradients and dropout ----
    def blank(self, batch_size: int) -> Tree:
        """Nothing read yet."""
        like, config = self.position, self.config
        # A tensor a layer, and not one for all: above 32 MB the C library returns each to the system, to fault anew.
        shape = (batch_size, config.heads, self.window, config.width // config.heads)
        keys, values = (tuple(like.new_zeros(shape) for _ in self.blocks) for _ in "kv")
        tokens = torch.zeros(batch_size, self.window, dtype=torch.long, device=like.device)
        h = like.new_zeros(batch_size, config.width)
        position = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        return {"k": keys, "v": values, "tokens": tokens, "h": h, "position": position}

    @torch.no_grad()
    def append(self, memory: Tree, tokens: Tensor) -> tuple[Tree, Tensor]:
        """Reads M tokens (B, M) further: the new memory, and the outputs (B, M, D) for the heads.

        Whether a token is an observation or an action follows from the row's position. A row without room for M
        more is an error (see `slide`).
        """
        end = self._end(memory, tokens.shape[1])
        return self._read(_own(memory, self.window), tokens, end, self._weights(tokens.numel()))

    @torch.no_grad()
    def draw_frame(self, memory: Tree, temperature: float = 1.0) -> Tensor:
        """Dreams the next frame, token by token, after an action: (B, N). Temperature 0 takes the most likely ones."""
        further = self.config.tokens - 1
        end = self._end(memory, further)
        # One copy of either a frame, not one a token.
        memory, weights = _own(memory, end), self._weights(len(memory["h"]))
        drawn = [self._draw(memory["h"], temperature)]
        for ahead in reversed(range(further)):
            memory, hidden = self._read(memory, drawn[-1].unsqueeze(1), end - ahead, weights)
            drawn.append(self._draw(hidden[:, 0], temperature))
        return torch.stack(drawn, 1)

    @torch.no_grad()
    def slide(self, memory: Tree, keep: int, ahead: int = 1) -> Tree:
        """Makes room in rows that cannot take `ahead` steps more: their last `keep` remain, read anew from position 0.

        Absolute positions are part of every key, so the cache cannot simply roll. Rows with room stay as they are;
        h stays too, as the output of the longer context. The published code forgets everything instead. Which rows
        are full is asked of the device: once a frame, which is many passes through the transformer.
        """
        if not 0 < keep <= self.config.steps - ahead:
            raise ValueError(f"between 1 and {self.config.steps - ahead} steps can be kept, got {keep}")
        position, length = memory["position"], keep * self.stride
        if position.is_meta:
            return memory
        rows = (position + ahead * self.stride > self.window).nonzero().squeeze(1)
        if not len(rows):
            return memory
        slots = position[rows].unsqueeze(1) - length + torch.arange(length, device=rows.device)
        late = memory["tokens"][rows].gather(1, slots)
        again = {**self.append(self.blank(len(rows)), late)[0], "h": memory["h"][rows]}
        return trees.map(lambda old, new: old.index_copy(0, rows, new), memory, again)

    def _end(self, memory: Tree, more: int) -> int:
        """Where the longest row stands `more` tokens further: attention looks at no slot beyond it.

        That asks the device, once a frame. Half of the slots are empty on average, and of a batch of one all others
        are filled.
        """
        position = memory["position"]
        return self.window if position.is_meta else int(position.max()) + more

    def _weights(self, rows: int) -> list[_Weights]:
        """All layers', cast once where autocast would do so at every token (and does in inference mode)."""
        device, kind = self.position.device.type, self.position.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # A single row costs what reading the weights costs, and only one of the halves has a product made for that.
            kind = torch.half if rows == 1 and device == "cpu" else torch.get_autocast_dtype(device)
        return [block.weights(kind) for block in self.blocks]  # type: ignore[operator]

    def _read(self, memory: Tree, tokens: Tensor, end: int, weights: list[_Weights]) -> tuple[Tree, Tensor]:
        """`append`, writing into the given memory's own tensors; its longest row is `end` tokens long then."""
        heads, position = self.config.heads, memory["position"]
        slots = position.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)  # (B, M)
        memory["tokens"].scatter_(1, slots, tokens)
        x = self._embed(tokens, slots)
        by_head = slots.repeat_interleave(heads, 0).unsqueeze(-1)  # (B heads, M, 1)
        hidden_from = _bias(torch.arange(end, device=tokens.device), by_head)  # (B heads, M, end)
        by_head = by_head.expand(-1, -1, self.config.width // heads)
        device = "cpu" if x.is_meta else x.device.type  # torch has no autocast for meta, nor one to be left
        with torch.autocast(device, enabled=False):  # casting the caches would cost more than it saves
            for block, layers, *caches in zip(self.blocks, weights, memory["k"], memory["v"], strict=True):
                keys, values = (cache.view(-1, *cache.shape[2:]) for cache in caches)  # (B heads, S, d)
                q, k, v = block.to_qkv(x, layers).to(keys.dtype)  # type: ignore[operator]
                keys.scatter_(1, by_head, k)
                values.scatter_(1, by_head, v)
                x = block(x, _attend(q, keys[:, :end], values[:, :end], hidden_from), layers)
            hidden = self.norm(x)
        return {**memory, "h": hidden[:, -1], "position": position + tokens.shape[1]}, hidden

    def _embed(self, tokens: Tensor, slots: Tensor) -> Tensor:
        return self.embedding(tokens + self.first[slots]) + self.position[slots]

    def _draw(self, hidden: Tensor, temperature: float) -> Tensor:
        logits = self.next_token(hidden).float()
        return logits.argmax(-1) if temperature <= 0 else draw((logits / temperature).log_softmax(-1))


class _Weights(NamedTuple):
    """A block's linear layers, weight and bias each, in the number format in which they multiply."""

    qkv: _Linear
    out: _Linear
    up: _Linear
    down: _Linear


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def weights(self, kind: torch.dtype | None = None) -> _Weights:
        """The parameters themselves, or cast to `kind` if they are not of it."""
        up, _, down = self.mlp
        layers = (self.qkv, self.out, up, down)
        return _Weights(
            *((layer.get_parameter("weight").to(kind), layer.get_parameter("bias").to(kind)) for layer in layers)
        )

    def to_qkv(self, x: Tensor, weights: _Weights) -> Tensor:
        """Query, key and value: (B, M, D) -> (3, B heads, M, d)."""
        return rearrange(_linear(self.norm1(x), weights.qkv), "b m (part n d) -> part (b n) m d", part=3, n=self.heads)

    def forward(self, x: Tensor, mixed: Tensor, weights: _Weights, rate: float = 0.0) -> Tensor:
        """What follows attention: x (B, M, D), mixed (B heads, M, d), the rate of dropout."""
        mixed = rearrange(mixed, "(b n) m d -> b m (n d)", n=self.heads)
        x = x + _drop(_linear(mixed, weights.out), rate)
        return x + _drop(_linear(F.gelu(_linear(self.norm2(x), weights.up)), weights.down), rate)


def _linear(x: Tensor, layer: _Linear) -> Tensor:
    return F.linear(x.to(layer[0].dtype), *layer)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rate: float = 0.0) -> Tensor:
    """Attention written out: q (R, M, d), k and v (R, S, d), bias (1 or R, M, S) -> (R, M, d).

    torch's own takes three times as long on a CPU, both for one query and many rows and, with dropout, in bf16.
    """
    scale = q.shape[-1] ** -0.5
    if q.shape[1] == 1:  # the same numbers; so the keys are read in the order in which they lie
        scores = torch.baddbmm(bias.transpose(1, 2), k, q.transpose(1, 2), alpha=scale).transpose(1, 2)
    else:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    weights = scores.softmax(-1)
    return torch.bmm(_drop(weights.to(v.dtype), rate), v)


def _bias(key: Tensor, query: Tensor) -> Tensor:
    """What hides later positions from earlier ones: 0, or -inf where key > query, as they broadcast."""
    return torch.zeros((), device=key.device).masked_fill(key > query, float("-inf"))


def _drop(x: Tensor, rate: float) -> Tensor:
    """Dropout. From 16 random bits an element on a CPU, where torch's own takes five times as long."""
    if not rate:
        return x
    if not x.is_cpu:
        return F.dropout(x, rate)
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.long).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= round(rate * 2**16) - 2**15
    return x * kept.to(x.dtype).div_(1 - rate)


def _own(memory: Tree, end: int) -> Tree:
    """A copy to write into, of the first `end` slots of the caches."""
    layout = torch.contiguous_format
    caches = {name: tuple(cache[:, :, :end].clone(memory_format=layout) for cache in memory[name]) for name in "kv"}
    return {**trees.map(torch.clone, memory | dict.fromkeys("kv", ())), **caches}


def _head(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def _begin(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
