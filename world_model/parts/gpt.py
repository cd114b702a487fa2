"""IRIS's transformer: it reads frames token by token, each frame followed by its action (Micheli et al. 2023, A.2).

    position   0  1  ...  N-1   N     N+1 ...        one step = N tokens of frame[t], then action[t]
    token      z0 z1 ... zN-1  a[t]   z0 of t+1      the output at a position tells the observation token that follows;
    tells      z1 z2 ...  -    z0'    z1'            at the action also reward[t] and whether the episode ends there

Shapes: B batch, T steps, N tokens a frame, M tokens in a row, S = steps (N + 1) positions, V codes, D width, d of it
for each head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from world_model import trees
from world_model.parts.blocks import (
    Affine,
    Block,
    Layers,
    affine,
    after_attention,
    attend,
    drop,
    hiding,
    mlp,
    norm,
    to_qkv,
)
from world_model.parts.heads import draw
from world_model.threads import torch_threads
from world_model.trees import Tree

REWARDS = (-1, 0, 1)  # the sign of the reward, by class of the reward head


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
    frame's first token. A slot at or beyond a row's position is free: its token is -1, or that of `dream_frame`.
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
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.next_token = _head(width, config.codes)
        self.reward = _head(width, len(REWARDS))
        self.end = _head(width, 2)
        # By position: the row of the embedding where this kind of token begins.
        kinds = torch.tensor(([0] * config.tokens + [config.codes]) * config.steps)
        self.register_buffer("first", kinds, persistent=False)
        self._casts: dict[torch.dtype, _Cast] = {}
        nn.init.normal_(self.position, std=0.02)
        self.apply(_begin)

    def forward(self, tokens: Tensor, action: Tensor) -> Prediction:
        """Whole segments at once, from their first frame: tokens (B, T, N), action (B, T), T at most `steps`."""
        steps = tokens.shape[1]
        if steps > self.config.steps:
            raise ValueError(f"the transformer sees at most {self.config.steps} steps, got {steps}")
        row = torch.cat([tokens, action.unsqueeze(-1)], -1).flatten(1)  # (B, M)
        slots = torch.arange(row.shape[1], device=row.device)
        bias = hiding(slots, slots.unsqueeze(1)).unsqueeze(0)  # (1, M, M)
        rate = self.config.dropout if self.training else 0.0
        x = drop(self._embed(row, slots), rate).flatten(0, 1)  # (B M, D)
        for block in self.blocks:
            layers = block.layers()  # type: ignore[operator]
            q, k, v = to_qkv(x, layers, len(row), self.config.heads)
            x = after_attention(x, attend(q, k, v, bias, rate), layers, len(row), rate)
        hidden = self.norm(x).view(len(row), steps, self.stride, -1)  # (B, T, N + 1, D)
        last = self.config.tokens - 1  # what follows a frame's last token is an action, and nobody predicts those
        ahead = torch.cat([hidden[:, :, :last], hidden[:, :, last + 1 :]], 2)
        has_action = hidden[:, :, -1]
        return Prediction(self.next_token(ahead), self.reward(has_action), self.end(has_action))

    # ---- cached; without gradients and dropout ----
    def initial(self, batch_size: int) -> Tree:
        """Nothing read yet."""
        like, config = self.position, self.config
        # A tensor a layer, and not one for all: above 32 MB the C library returns each to the system, to fault anew.
        shape = (batch_size, config.heads, self.window, config.width // config.heads)
        keys, values = (tuple(like.new_zeros(shape) for _ in self.blocks) for _ in "kv")
        tokens = torch.full((batch_size, self.window), -1, device=like.device)
        h = like.new_zeros(batch_size, config.width)
        position = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        return {"k": keys, "v": values, "tokens": tokens, "h": h, "position": position}

    @torch.no_grad()
    def append(self, memory: Tree, tokens: Tensor) -> tuple[Tree, Tensor]:
        """Reads M tokens (B, M) further: the new memory, and the outputs (B, M, D) for the heads.

        Whether a token is an observation or an action follows from the row's position. A row without room for M
        more is an error (see `slide`).
        """
        end, cast = self._end(memory, tokens.shape[1]), self.cast(tokens.numel())
        with _without_autocast(tokens):
            return self._read(_own(memory, self.window), tokens, end, cast.blocks)

    @torch.no_grad()
    def append_step(self, memory: Tree, tokens: Tensor) -> Tree:
        """Reads a frame and its action (B, N + 1); what `dream_frame` has read of it is not read again."""
        drawn, position = self.config.tokens - 1, memory["position"]
        if not position.is_meta:
            slots = position.unsqueeze(1) + torch.arange(drawn, device=position.device)
            if torch.equal(memory["tokens"].gather(1, slots), tokens[:, :drawn]):
                memory, tokens = {**memory, "position": position + drawn}, tokens[:, drawn:]
        return self.append(memory, tokens)[0]

    def draw_frame(self, memory: Tree, temperature: float = 1.0) -> Tensor:
        """Dreams the next frame, token by token, after an action: (B, N). Temperature 0 takes the most likely ones."""
        return self.dream_frame(_own(memory, self._end(memory, self.config.tokens - 1)), temperature)

    @torch.no_grad()
    def dream_frame(self, memory: Tree, temperature: float = 1.0) -> Tensor:
        """`draw_frame` that leaves what it reads in the free slots of a memory which is the caller's own."""
        further, state = self.config.tokens - 1, memory
        end, cast = self._end(memory, further), self.cast(len(memory["h"]))
        with _without_autocast(memory["h"]), _alone(cast):
            drawn = [_drawn(mlp(memory["h"], *cast.head), temperature)]
            for ahead in reversed(range(further)):
                state, hidden = self._read(state, drawn[-1].unsqueeze(1), end - ahead, cast.blocks)
                drawn.append(_drawn(mlp(hidden[:, 0], *cast.head), temperature))
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
        again = {**self.append(self.initial(len(rows)), late)[0], "h": memory["h"][rows]}
        return trees.map(lambda old, new: old.index_copy(0, rows, new), memory, again)

    def condense(self, memory: Tree) -> Tree:
        """The tokens and what they told, without keys and values: a thousandth of it."""
        return {name: leaf for name, leaf in memory.items() if name not in ("k", "v")}

    def recall(self, condensed: Tree) -> Tree:
        """The memory again: its tokens are read once more, in one pass."""
        tokens, position = condensed["tokens"], condensed["position"]
        memory, oldest = self.initial(len(tokens)), int(position.max())
        if oldest:
            memory, _ = self.append(memory, tokens[:, :oldest].clamp(min=0))
        free = torch.arange(self.window, device=tokens.device) >= position.unsqueeze(1)
        return {**memory, **condensed, "tokens": tokens.masked_fill(free, -1)}

    def _end(self, memory: Tree, more: int) -> int:
        """Where the longest row stands `more` tokens further: attention looks at no slot beyond it.

        That asks the device, once a frame. Half of the slots are empty on average, and of a batch of one all others
        are filled.
        """
        position = memory["position"]
        return self.window if position.is_meta else int(position.max()) + more

    def cast(self, rows: int) -> _Cast:
        """The linear layers in the number format in which they multiply.

        Autocast would cast them at every token (and does in inference mode); here once for as long as the parameters
        stay what they are. Torch keeps count of their changes, but for those by a fused optimiser, whose user must say
        so (`torch.autograd.graph.increment_version`), as `agent.trainer` does.
        """
        device, kind = self.position.device.type, self.position.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # A single row costs what reading the weights costs. Rounding these to int8 moves twice the probability
            # that bfloat16 does, 0.10 and 0.05 % of it (runs/iris_error.py, xs on Pong).
            kind = torch.int8 if rows == 1 and device == "cpu" else torch.get_autocast_dtype(device)
        state = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]
        if kind not in self._casts or self._casts[kind].state != state:
            with torch.inference_mode(False):  # else nothing outside of it could use them
                blocks = [block.layers(kind) for block in self.blocks]  # type: ignore[operator]
                head = affine(self.next_token[0], kind), affine(self.next_token[2], kind)
            self._casts[kind] = _Cast(state, blocks, head)
        return self._casts[kind]

    def _read(self, memory: Tree, tokens: Tensor, end: int, blocks: list[Layers]) -> tuple[Tree, Tensor]:
        """`append`, writing into the given memory's own tensors; its longest row is `end` tokens long then."""
        (rows, count), heads, position = tokens.shape, self.config.heads, memory["position"]
        slots = position.unsqueeze(1) + torch.arange(count, device=tokens.device)  # (B, M)
        memory["tokens"].scatter_(1, slots, tokens)
        x = self._embed(tokens, slots).flatten(0, 1)  # (B M, D)
        by_head = slots.unsqueeze(1).expand(-1, heads, -1).reshape(-1, count, 1)  # (B heads, M, 1)
        bias = hiding(torch.arange(end, device=tokens.device), by_head)  # (B heads, M, end)
        by_head = by_head.expand(-1, -1, self.config.width // heads)
        for layers, keys, values in zip(blocks, memory["k"], memory["v"], strict=True):
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # (B heads, S, d), the same memory
            q, k, v = to_qkv(x, layers, rows, heads, keys.dtype)
            keys.scatter_(1, by_head, k)
            values.scatter_(1, by_head, v)
            x = after_attention(x, attend(q, keys[:, :end], values[:, :end], bias), layers, rows)
        hidden = norm(x, affine(self.norm)).float().view(rows, count, -1)
        return {**memory, "h": hidden[:, -1], "position": position + count}, hidden

    def _embed(self, tokens: Tensor, slots: Tensor) -> Tensor:
        return self.embedding(tokens + self.first[slots]) + self.position[slots]


class _Cast(NamedTuple):
    """Linear layers in a number format, and the state of the parameters that they were cast from."""

    state: list[tuple[int, int]]
    blocks: list[Layers]
    head: tuple[Affine, Affine]  # of the next token


def _without_autocast(like: Tensor) -> torch.autocast:
    """Casting the caches too would cost more than it saves."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)  # there is none for meta


def _alone(cast: _Cast) -> AbstractContextManager[None]:
    """One thread for a single row in int8: a second takes longer to wake than it helps, and others want the core."""
    return nullcontext() if cast.head[0].scale is None else torch_threads(1)


def _drawn(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return logits.argmax(-1) if temperature <= 0 else draw((logits / temperature).log_softmax(-1))


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
