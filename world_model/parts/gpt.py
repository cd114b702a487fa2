"""IRIS's transformer: it reads frames token by token, each frame followed by its action (Micheli et al. 2023, A.2).

    position   0  1  ...  N-1   N     N+1 ...        one step = N tokens of frame[t], then action[t]
    token      z0 z1 ... zN-1  a[t]   z0 of t+1      the output at a position predicts the token that follows;
    predicts   z1 z2 ...  -    z0'    z1'            at the action also reward[t] and whether the episode ends there

Shapes: B batch, T steps, N tokens a frame, M tokens in a row, S = context_frames (N + 1) positions, V codes, D width,
d of it for each head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
from world_model.parts.heads import draw, draw_tempered
from world_model.parts.nets import network_dtype
from world_model.parts.token_dynamics import REWARDS, Predictions, TokenDynamics, begin, cross_entropy, relu_head
from world_model.threads import torch_threads
from world_model.trees import Tree


@dataclass(frozen=True)
class GPTConfig:
    """The paper's numbers."""

    codes: int = 512
    tokens: int = 16  # a frame
    context_frames: int = 20  # frames, each with its action, that the transformer sees at most
    width: int = 256
    layers: int = 10
    heads: int = 4
    dropout: float = 0.1
    keep: int = 1  # frames, with their actions, that remain when the window is full

    def build(self, actions: int) -> GPT:
        """The transformer for a game of that many actions."""
        return GPT(self, actions)


class Prediction(NamedTuple):
    """Logits. Flattened over T and N, token[j] is about observation token j + 1, wherever actions stand between."""

    token: Tensor  # (B, T, N, V)
    reward: Tensor  # (B, T, 3) of `REWARDS`
    end: Tensor  # (B, T, 2): goes on, ends
    h: Tensor  # (B, T, D) what those two are predicted from


class GPT(TokenDynamics):
    """Pre-norm causal transformer with learned absolute positions, in a parallel and a cached form.

    Memory: each layer's keys and values (B, heads, S, d), the tokens read (B, S), the output at the last of them
    h (B, D), and each row's own position (B,), so that rows of different ages stand in one batch. It begins with a
    frame's first token. What lies in slots at or beyond a row's position means nothing.
    """

    first: Tensor

    def __init__(self, config: GPTConfig, actions: int) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"a width of {config.width} cannot be shared among {config.heads} heads")
        if not 1 <= config.keep <= config.context_frames - 2:
            raise ValueError(
                f"of a window of {config.context_frames} frames 1 to {config.context_frames - 2} can be kept, "
                f"got keep={config.keep}"
            )
        self.config, self.actions, self.width = config, actions, config.width
        self.stride = config.tokens + 1
        self.window = config.context_frames * self.stride
        width = config.width
        self.embedding = nn.Embedding(config.codes + actions, width)  # the codes, then the actions
        self.position = nn.Parameter(torch.empty(self.window, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.next_token = relu_head(width, config.codes)
        self.reward = relu_head(width, len(REWARDS))
        self.end = relu_head(width, 2)
        # By position: the row of the embedding where this kind of token begins.
        kinds = torch.tensor(([0] * config.tokens + [config.codes]) * config.context_frames)
        self.register_buffer("first", kinds, persistent=False)
        nn.init.normal_(self.position, std=0.02)
        self.apply(begin)

    def forward(self, tokens: Tensor, action: Tensor) -> Prediction:
        """Whole segments at once, from their first frame: tokens (B, T, N), action (B, T).

        Raises ValueError for a T beyond `context_frames`.
        """
        steps = tokens.shape[1]
        if steps > self.config.context_frames:
            raise ValueError(f"the transformer sees at most {self.config.context_frames} steps, got {steps}")
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
        at_action = hidden[:, :, -1]
        return Prediction(self.next_token(ahead), self.reward(at_action), self.end(at_action), at_action)

    # ---- what a token world asks for ----
    def predict(self, tokens: Tensor, action: Tensor, codes: Tensor, pictures: Tensor | None = None) -> Predictions:
        """See `TokenDynamics`; nobody predicts a segment's very first token."""
        said = self(tokens, action)
        logits, next_token = said.token.flatten(1, 2)[:, :-1], tokens.flatten(1)[:, 1:]
        nats = F.pad(cross_entropy(logits, next_token), (1, 0)).view_as(tokens)
        return Predictions(nats, said.reward, said.end, said.h, None)

    def advance(self, memory: Tree, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """A frame is read but for its last token: one pass reads it with the action."""
        return self._with_action(memory, tokens[:, -1], action)[0]

    def imagine(self, memory: Tree, temperature: float = 1.0) -> tuple[Tensor, Tree]:
        """See `TokenDynamics`."""
        after, tokens = self.draw(memory, temperature)
        return tokens, after

    def observe(self, memory: Tree, tokens: Tensor) -> Tree:
        """See `TokenDynamics`."""
        return {**self.append(memory, tokens[:, :-1])[0], "h": memory["h"]}

    def step(
        self, memory: Tree, tokens: Tensor, action: Tensor, seen: Tensor | None = None, temperature: float = 1.0,
        pictures: Tensor | None = None,
    ) -> tuple[Tensor, Tree]:  # fmt: skip
        """With one copy of the memory instead of two, and as little looked at as there is."""
        memory, end = self._with_action(memory, tokens[:, -1], action)
        if seen is None:
            memory, tokens = self.draw_into(memory, temperature, end)
            return tokens, memory
        h = memory["h"]
        memory, _ = self.read_into(memory, seen[:, :-1], end + self.config.tokens - 1)
        return seen, {**memory, "h": h}

    def has_action(self, memory: Tree) -> Tensor:
        """See `TokenDynamics`."""
        return memory["position"] >= self.stride  # type: ignore[no-any-return]

    def held(self, past: int) -> int:
        """As many as `advance`, step by step, would have left in the memory."""
        most, keep = self.config.context_frames - 1, self.config.keep
        return past if past <= most else keep + 1 + (past - most - 1) % (most - keep)

    def start(self, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """In one pass."""
        held, row, memory = tokens.shape[1] - 1, tokens[:, -1, :-1], self.initial(len(tokens))
        if held:
            steps = torch.cat([tokens[:, :-1], action.unsqueeze(-1)], -1)  # (B, held, N + 1)
            row = torch.cat([steps.flatten(1), row], 1)
        h = memory["h"]
        memory, hidden = self.read_into(memory, row, row.shape[1])
        return {**memory, "h": hidden[:, held * self.stride - 1] if held else h}

    def prior_kl(self, memory: Tree, other: Tree) -> Tensor:
        """The sum over the frame's tokens, along those that the first expects: an estimate without bias."""
        both, total = [memory, other], torch.zeros_like(memory["h"][:, 0])
        for further in range(self.config.tokens, 0, -1):
            p, q = (self.next_token_logits(one["h"]).float().log_softmax(-1) for one in both)
            total += (p.exp() * (p - q)).sum(-1)
            if further > 1:
                token = draw(p).unsqueeze(1)
                both = [self.append(one, token)[0] for one in both]
        return total

    # ---- cached; without gradients and dropout ----
    def initial(self, batch_size: int) -> Tree:
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
    def append(self, memory: Tree, tokens: Tensor, end: int | None = None) -> tuple[Tree, Tensor]:
        """Reads M tokens (B, M) further: the new memory, and the outputs (B, M, D) for the heads.

        Whether a token is an observation or an action follows from the row's position. A row without room for M
        more is an error (see `slide`). `end`: the slots that are looked at, for a caller who knows that no row reads
        beyond; all when not given, half of which are empty on average.
        """
        return self.read_into(_own(memory), tokens, end)

    @torch.no_grad()
    def draw(self, memory: Tree, temperature: float = 1.0, end: int | None = None) -> tuple[Tree, Tensor]:
        """Dreams the frame after an action, token by token: the new memory, and the frame's tokens (B, N).

        The memory has read all of them but the last, and keeps h, the output at the action. Temperature 0 takes the
        most likely tokens. `end` as in `append`.
        """
        return self.draw_into(_own(memory), temperature, end)

    @torch.no_grad()
    def _with_action(self, memory: Tree, last: Tensor, action: Tensor) -> tuple[Tree, int]:
        """Reads a frame's last token (B,) and its action (B,): a memory of the caller's own, and its longest row.

        A row without room for the frame after this one as well, which the window's last action was never taught to
        tell, first slides. How long the rows are is asked of the device: once a frame, which is many passes through
        the transformer.
        """
        positions = memory["position"].tolist()
        memory, positions = self.slide(memory, positions)
        end = max(positions) + 2
        return self.read_into(_own(memory), torch.stack([last, action], 1), end)[0], end

    def slide(self, memory: Tree, positions: list[int]) -> tuple[Tree, list[int]]:
        """Makes room in rows that cannot take two steps more: their last `keep` remain, read anew from position 0.

        Absolute positions are part of every key, so the cache cannot simply roll. What is read of the present frame
        remains too. Rows with room stay as they are; h stays, as the output of the longer context. The published code
        forgets everything instead.
        """
        full = [row for row, at in enumerate(positions) if (at // self.stride + 2) * self.stride > self.window]
        if not full:
            return memory, positions
        # Rows of a batch stand within the same frame's tokens, however many frames they have read.
        length = self.config.keep * self.stride + positions[full[0]] % self.stride
        rows = torch.tensor(full, device=memory["position"].device)
        slots = memory["position"][rows].unsqueeze(1) - length + torch.arange(length, device=rows.device)
        late = memory["tokens"][rows].gather(1, slots)
        again = {**self.append(self.initial(len(rows)), late, length)[0], "h": memory["h"][rows]}
        shorter = [length if row in set(full) else at for row, at in enumerate(positions)]
        return trees.map(lambda old, new: old.index_copy(0, rows, new), memory, again), shorter

    def condense(self, memory: Tree) -> Tree:
        """The tokens and what they told, without keys and values: a thousandth of it."""
        return {name: leaf for name, leaf in memory.items() if name not in ("k", "v")}

    def recall(self, condensed: Tree) -> Tree:
        """The memory again: its tokens are read once more, in one pass."""
        tokens, oldest = condensed["tokens"], max(condensed["position"].tolist())
        memory = self.initial(len(tokens))
        if oldest:
            memory, _ = self.append(memory, tokens[:, :oldest], oldest)
        return {**memory, **condensed}

    # ---- the same, writing into a memory that is the caller's own ----
    @torch.no_grad()
    def read_into(self, memory: Tree, tokens: Tensor, end: int | None = None) -> tuple[Tree, Tensor]:
        """`append`, at the cost of the memory's tensors."""
        weights = self._weights()
        with _without_autocast(tokens):
            return self._read(memory, tokens, end or self.window, weights.blocks)

    @torch.no_grad()
    def draw_into(self, memory: Tree, temperature: float = 1.0, end: int | None = None) -> tuple[Tree, Tensor]:
        """`draw`, at the cost of the memory's tensors; `end` is that of the memory as it is."""
        weights, h = self._weights(), memory["h"]
        with _without_autocast(h), _alone(weights):
            drawn = [draw_tempered(mlp(h, *weights.head), temperature)]
            for further in range(1, self.config.tokens):
                until = self.window if end is None else end + further
                memory, hidden = self._read(memory, drawn[-1].unsqueeze(1), until, weights.blocks)
                drawn.append(draw_tempered(mlp(hidden[:, 0], *weights.head), temperature))
        return {**memory, "h": h}, torch.stack(drawn, 1)

    def next_token_logits(self, h: Tensor) -> Tensor:
        """What an output (B, D) predicts of the token that follows, as the cached form computes it: (B, V)."""
        weights = self._weights()
        with _without_autocast(h):
            return mlp(h, *weights.head)

    def _weights(self) -> _Weights:
        """The linear layers in the number format in which they multiply: autocast's, where it is on.

        Cast here once a call and not at every token. A model for playing alone has weights of the right format
        already (`agent.precision`), and nothing is cast.
        """
        kind = network_dtype(self.position)
        blocks = [block.layers(kind) for block in self.blocks]  # type: ignore[operator]
        return _Weights(blocks, (affine(self.next_token[0], kind), affine(self.next_token[2], kind)))

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


class _Weights(NamedTuple):
    """What the cached form multiplies with."""

    blocks: list[Layers]
    head: tuple[Affine, Affine]  # of the next token


def _without_autocast(like: Tensor) -> torch.autocast:
    """Casting the caches too would cost more than it saves."""
    kind = like.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


def _alone(weights: _Weights) -> AbstractContextManager[None]:
    """One thread for int8, which is for single rows: a second takes longer to wake than it helps."""
    return nullcontext() if weights.head[0].scale is None else torch_threads(1)


def _own(memory: Tree) -> Tree:
    """A copy to write into."""
    return trees.map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), memory)
