"""A transformer that predicts all tokens of the next frame in one pass, from the last few frames and the action.

The dynamics of the Atari world model v2.1 (`spatial`): the action is a token of its own, a learned bias of every place,
and a FiLM modulation of the queries; places know their row and column, frames their age. In two forms:

    whole    [frame t-3] [t-2] [t-1] [t] [action] [queries]   everything sees everything, anew at every step: the
                                                              document's own; queries stand where the answers are read
    cached   ... [frame t-1, action] [frame t, action]        a frame sees itself and the ones before, whose keys and
                                                              values are kept; the next one is read off its places

One pass samples tokens independently, so a ball may be drawn twice or not at all: `refine` further passes of one block
each settle the tokens in the order of their certainty, in groups of equal entropy, knowing those before (after MaskGIT,
Chang et al. 2022).

Shapes: B batch, T time, N tokens a frame, P places of them (merge x merge tokens each), W frames of history, V codes,
D width, M tokens of a frame in the transformer (P + 1, with the action), R = B x heads, d = D / heads.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from world_model.parts.blocks import Block, Layers, after_attention, attend, drop, to_qkv
from world_model.parts.heads import draw_tempered
from world_model.parts.nets import network_dtype
from world_model.parts.token_dynamics import (
    REWARDS,
    ParallelDynamics,
    Predictions,
    begin,
    cross_entropy,
    relu_head,
    rollout,
)
from world_model.trees import Tree

Attention = Literal["whole", "cached"]
WeightsFrom = Literal["target", "past"]
NEAR = 4  # numbers of a query or key that encode its position
SLOPES = (0.5, 0.5, 0.125, 0.0)  # of heads in turn, nats for the square of a place's distance
FILM = 0.2  # of what an action changes in what is asked


@dataclass(frozen=True)
class BlockTransformerConfig:
    """The document's numbers; what the weights of single tokens mean stands in `token_weights`."""

    codes: int = 32
    grid: tuple[int, int] = (21, 16)  # tokens of a frame, rows x columns
    attention: Attention = "whole"
    history: int = 4  # frames that it sees
    merge: int = 1  # tokens, both ways, that are read and predicted at one place
    refine: int = 0  # further passes that settle the tokens of a frame
    stay: float = 0.0  # head start, in logits, of the token that stands there already; learned from there
    copy_above: float = 1.0  # a token likelier than this to stay stays; 1: none
    width: int = 256
    layers: int = 10
    heads: int = 8
    dropout: float = 0.1
    # Training: part of the segments goes on from the model's own tokens.
    rollout_steps: int = 5
    rollout_share: float = 0.5
    teacher_forcing: float = 0.1
    step_discount: float = 0.7
    weights_from: WeightsFrom = "target"
    motion_scale: float = 2.0
    event_scale: float = 2.0
    persistence_scale: float = 1.0
    small_scale: float = 0.0
    weight_cap: float = 6.0
    focal: float = 0.0

    def build(self, actions: int) -> BlockTransformer:
        """The transformer for a game of that many actions."""
        return (WholeHistory if self.attention == "whole" else CachedHistory)(self, actions)


class BlockTransformer(ParallelDynamics):
    """What both forms share. Memory of one that awaits a frame: out (B, P, D) and h (B, D), the outputs at its places
    and at the action; tokens (B, N) of the frame before; count (B,), how many frames it has read, W at most."""

    def __init__(self, config: BlockTransformerConfig, actions: int) -> None:
        super().__init__()
        if config.width % (2 * config.heads):
            raise ValueError(f"a width of {config.width} cannot be shared evenly among {config.heads} heads")
        if config.history < 1 or config.merge < 1:
            raise ValueError(f"history and merge are at least 1, got {config.history} and {config.merge}")
        self.config, self.width = config, config.width
        width, merge = config.width, config.merge
        self.tokens = config.grid[0] * config.grid[1]
        self.places = (-(-config.grid[0] // merge), -(-config.grid[1] // merge))
        count, each = self.places[0] * self.places[1], merge * merge
        self.embedding = nn.Embedding(each * (config.codes + 1), width)  # of each token of a place; the last: none
        self.action = nn.Embedding(actions, width)
        self.action_scale = nn.Parameter(torch.ones(()))
        self.row, self.column = nn.Embedding(self.places[0], width // 2), nn.Embedding(self.places[1], width // 2)
        self.action_bias = nn.Parameter(torch.zeros(actions, count, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.next_tokens = nn.Linear(width, each * config.codes)
        self.stay = nn.Parameter(torch.tensor(config.stay)) if config.stay else None
        self.reward = relu_head(width, len(REWARDS))
        self.end = relu_head(width, 2)
        self.refiner = _Refiner(config, self.embedding.num_embeddings) if config.refine else None
        self.apply(begin)

    # ---- what a token world asks for ----
    def imagine(self, memory: Tree, temperature: float = 1.0) -> tuple[Tensor, Tree]:
        """See `TokenDynamics`."""
        return self._drawn(memory["out"], memory["tokens"], temperature), memory

    def logits(self, memory: Tree) -> Tensor:
        """As the first pass predicts them."""
        return self._logits(memory["out"], memory["tokens"])

    def predict(self, tokens: Tensor, action: Tensor, codes: Tensor, pictures: Tensor | None = None) -> Predictions:
        """See `TokenDynamics`. The first segments of the batch go on from the model's own tokens (`rolled_out`)."""
        config = self.config
        weight = token_weights(tokens, codes, config)  # (B, T - 1, N)
        shown = self.partly_rolled_out(
            tokens, action, config.rollout_steps, config.rollout_share, config.teacher_forcing
        )
        steps, rows = rollout(tokens, config.rollout_steps, config.rollout_share)
        if rows:
            discount = config.step_discount ** torch.arange(steps, device=tokens.device)
            weight[:rows, -steps:] *= (discount / discount.mean()).unsqueeze(-1)
        out, h = self(shown, action)
        out, target = out[:, :-1], tokens[:, 1:]
        logits = self._logits(out, shown[:, :-1])  # (B, T - 1, N, V)
        nats = cross_entropy(logits, target)
        told = self._focal(nats) * weight
        if self.refiner is not None:
            known = torch.rand(target.shape, device=target.device) < torch.rand(*target.shape[:2], 1, device=out.device)
            again = logits + self._refined(out.flatten(0, 1), target.flatten(0, 1), known.flatten(0, 1)).view_as(logits)
            # Of those that are not known alone, whose share is drawn evenly: as many as the first pass predicts.
            told = told + self._focal(cross_entropy(again, target)) * weight * ~known * 2
        right = logits.detach().argmax(-1) == target
        return Predictions(F.pad(told, (0, 0, 1, 0)), self.reward(h), self.end(h), h, right)

    def _focal(self, nats: Tensor) -> Tensor:
        """Less of what it is sure of."""
        return nats * (1 - (-nats.detach()).exp()).pow(self.config.focal) if self.config.focal else nats

    # ---- the two forms ----
    @abstractmethod
    def forward(self, tokens: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Whole segments (B, T, N), (B, T): what awaits the frame after each, out (B, T, P, D) and h (B, T, D)."""

    # ---- parts ----
    def _embed(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) as the places of a frame, where they stand and nothing of when: (B, P, D)."""
        return embedded(self._merged(tokens), self.embedding) + self._where()

    def _where(self) -> Tensor:
        rows, columns = self.row.weight.unsqueeze(1), self.column.weight.unsqueeze(0)
        both = (rows.expand(-1, self.places[1], -1), columns.expand(self.places[0], -1, -1))
        return torch.cat(both, -1).flatten(0, 1)

    def _acting(self, action: Tensor) -> Tensor:
        """Actions (B,) -> (B, D)."""
        return self.action(action) * self.action_scale

    def _modulated(self, places: Tensor, action: Tensor) -> Tensor:
        """What an action makes of the places that predict what follows it: (B, P, D), (B,)."""
        film = 1 + FILM * self._acting(action).tanh()
        return places * film.unsqueeze(1) + self.action_bias[action]

    def _merged(self, tokens: Tensor) -> Tensor:
        """Of each place its tokens: (B, N) -> (B, P, merge^2), with V, which is none, beyond the grid's edges."""
        (height, width), merge = self.config.grid, self.config.merge
        grid = tokens.view(-1, height, width)
        grid = F.pad(
            grid, (0, self.places[1] * merge - width, 0, self.places[0] * merge - height), value=self.config.codes
        )
        return rearrange(grid, "b (h y) (w x) -> b (h w) (y x)", y=merge, x=merge)

    def _apart(self, told: Tensor) -> Tensor:
        """The logits of each token, by place: (..., P, merge^2 V) -> (..., N, V)."""
        merge, lead = self.config.merge, told.shape[:-2]
        grid = rearrange(
            told.reshape(-1, *told.shape[-2:]), "b (h w) (y x v) -> b (h y) (w x) v",
            h=self.places[0], y=merge, x=merge,
        )  # fmt: skip
        grid = grid[:, : self.config.grid[0], : self.config.grid[1]]
        return grid.reshape(*lead, self.tokens, self.config.codes)

    def _logits(self, out: Tensor, before: Tensor) -> Tensor:
        """Outputs (..., P, D), and the tokens (..., N) of the frame before -> (..., N, V)."""
        logits = self._apart(self.next_tokens(out)).float()
        if self.stay is None:
            return logits
        return logits.scatter_add(-1, before.unsqueeze(-1), self.stay.expand(*before.shape, 1))

    def _refined(self, out: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """What known tokens (B, N) change in the logits of the others: (B, N, V)."""
        assert self.refiner is not None
        shown = torch.where(known, tokens, self.config.codes)
        return self._apart(self.refiner(out, self._merged(shown)))

    def _drawn(self, out: Tensor, before: Tensor, temperature: float) -> Tensor:
        """The tokens (B, N) of a frame, from the outputs (B, P, D) and the frame before."""
        first = logits = self._settled(self._logits(out, before), before)
        if self.refiner is None:
            return draw_tempered(logits, temperature)
        share = logits.softmax(-1)
        entropy = -torch.special.xlogy(share, share).sum(-1)  # (B, N)
        ascending, order = entropy.sort(-1)
        passed = (ascending.cumsum(-1) - ascending) / ascending.sum(-1, keepdim=True).clamp(min=1e-9)
        turn = torch.empty_like(passed).scatter_(1, order, passed) * (self.config.refine + 1)
        turn = turn.floor().clamp(max=self.config.refine)
        tokens = draw_tempered(logits, temperature)
        for further in range(1, self.config.refine + 1):
            known = turn < further
            logits = self._settled(first + self._refined(out, tokens, known).float(), before)
            tokens = torch.where(known, tokens, draw_tempered(logits, temperature))
        return tokens

    def _settled(self, logits: Tensor, before: Tensor) -> Tensor:
        """Tokens that are likely enough to stay as they were are certain to."""
        if self.config.copy_above >= 1:
            return logits
        stays = logits.softmax(-1).gather(-1, before.unsqueeze(-1)) > self.config.copy_above
        certain = torch.full_like(logits, -1e4).scatter(-1, before.unsqueeze(-1), 0.0)
        return torch.where(stays, certain, logits)

    def _layers(self) -> list[Layers]:
        kind = network_dtype(self.action.weight)
        return [block.layers(kind) for block in self.blocks]  # type: ignore[operator]

    def _awaiting(self, batch_size: int) -> Tree:
        like, count = self.action.weight, self.places[0] * self.places[1]
        tokens = torch.zeros(batch_size, self.tokens, dtype=torch.long, device=like.device)
        return {
            "out": like.new_zeros(batch_size, count, self.width), "h": like.new_zeros(batch_size, self.width),
            "tokens": tokens, "count": torch.zeros_like(tokens[:, 0]),
        }  # fmt: skip

    def _one_more(self, memory: Tree) -> Tensor:
        """How many frames are read now, of those that are seen."""
        return (memory["count"] + 1).clamp(max=self.config.history)  # type: ignore[no-any-return]

    @property
    def _rate(self) -> float:
        return self.config.dropout if self.training and torch.is_grad_enabled() else 0.0


class CachedHistory(BlockTransformer):
    """Memory also: each layer's keys and values of the frames before, newest first, (B, heads, W - 1, M, d).

    What moves is near where it was: a head looks at places by their squared distance, each with another slope.
    """

    asking: Tensor
    asked: Tensor

    def __init__(self, config: BlockTransformerConfig, actions: int) -> None:
        super().__init__(config, actions)
        # A frame's age is a bias of what each head looks at; at first they look at different ones.
        ages = torch.arange(config.history)
        heads = torch.arange(config.heads).unsqueeze(1) % config.history
        self.age = nn.Parameter(torch.where(ages == heads, 0.0, -2.0).repeat(config.layers, 1, 1))
        for name, part in zip(("asking", "asked"), _nearness(self.places, config.heads), strict=True):
            self.register_buffer(name, part, persistent=False)

    def initial(self, batch_size: int) -> Tree:
        """See `TokenDynamics`."""
        config, like = self.config, self.action.weight
        size = (batch_size, config.heads, config.history - 1, self.places[0] * self.places[1] + 1)
        each = self.width // config.heads
        keys, values = (tuple(like.new_zeros(*size, wide) for _ in self.blocks) for wide in (each + NEAR, each))
        return {"k": keys, "v": values, **self._awaiting(batch_size)}

    def own(self, memory: Tree) -> Tree:
        """Keys and values in the number format in which they multiply, as what follows then keeps them."""
        kind = network_dtype(self.action.weight)
        return {**memory, **{name: tuple(leaf.to(kind) for leaf in memory[name]) for name in ("k", "v")}}

    def held(self, past: int) -> int:
        """Each layer looks further back from what the one before has seen."""
        return min(past, (self.config.history - 1) * self.config.layers + 1)

    @torch.no_grad()
    def advance(self, memory: Tree, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """One pass over the frame and its action."""
        rows, heads, x = len(tokens), self.config.heads, self._frame(tokens, action)
        count = memory["count"]
        seen = torch.arange(self.config.history, device=x.device) <= count.unsqueeze(1)  # (B, W) by age
        kept: dict[str, list[Tensor]] = {"k": [], "v": []}
        for layers, age, *before in zip(self._layers(), self.age, memory["k"], memory["v"], strict=True):
            q, *now = self._placed(to_qkv(x, layers, rows, heads))
            every = []
            for name, new, old in zip(kept, now, before, strict=True):
                whole = torch.cat([new.view(rows, heads, 1, *new.shape[1:]), old.to(new.dtype)], 2)
                kept[name].append(whole[:, :, :-1].to(old.dtype))  # (B, heads, W, M, d)
                every.append(whole.view(rows * heads, -1, new.shape[-1]))
            bias = age.masked_fill(~seen.unsqueeze(1), float("-inf"))  # (B, heads, W)
            x = after_attention(x, attend(q, every[0], every[1], self._bias(bias, q)), layers, rows)
        out = self.norm(x.float()).view(rows, -1, self.width)
        return {
            "k": tuple(kept["k"]), "v": tuple(kept["v"]), "out": out[:, :-1], "h": out[:, -1], "tokens": tokens,
            "count": self._one_more(memory),
        }  # fmt: skip

    def forward(self, tokens: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """See `BlockTransformer`."""
        (batch, length), heads, history, rate = tokens.shape[:2], self.config.heads, self.config.history, self._rate
        x, rows = drop(self._frame(tokens.flatten(0, 1), action.flatten()), rate), batch * length
        times, ages = torch.arange(length, device=x.device), torch.arange(history, device=x.device)
        seen = ages <= times.unsqueeze(1)  # (T, W)
        for layers, age in zip(self._layers(), self.age, strict=True):
            q, *new = self._placed(to_qkv(x, layers, rows, heads))
            k, v = (self._with_past(part.view(batch, length, heads, *part.shape[1:])) for part in new)
            bias = age.masked_fill(~seen.unsqueeze(1), float("-inf")).expand(batch, -1, -1, -1)  # (B, T, heads, W)
            x = after_attention(x, attend(q, k, v, self._bias(bias, q), rate), layers, rows, rate)
        out = self.norm(x.float()).view(batch, length, -1, self.width)
        return out[:, :, :-1], out[:, :, -1]

    def _placed(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (R, M, d) with what encodes how near they are, and values."""
        q, k, v = qkv
        scale = (q.shape[-1] + NEAR) ** 0.5  # by which `attend` divides
        asking = (scale * self.asking).to(q.dtype).repeat(len(q) // self.config.heads, 1, 1)
        asked = self.asked.to(q.dtype).expand(len(k), -1, -1)
        return torch.cat([q, asking], -1), torch.cat([k, asked], -1), v

    def _with_past(self, part: Tensor) -> Tensor:
        """Keys or values (B, T, heads, M, d) -> of each frame and those before it, (B T heads, W M, d)."""
        length, older = part.shape[1], self.config.history - 1
        padded = F.pad(part, (0, 0, 0, 0, 0, 0, older, 0))
        by_age = [padded[:, older - age : older - age + length] for age in range(older + 1)]
        return torch.stack(by_age, 3).flatten(0, 2).flatten(1, 2)

    def _bias(self, by_age: Tensor, q: Tensor) -> Tensor:
        """(..., heads, W) -> (R, 1, W M), as `attend` adds it."""
        return by_age.reshape(-1, 1, self.config.history).to(q.dtype).repeat_interleave(q.shape[1], -1)

    def _frame(self, tokens: Tensor, action: Tensor) -> Tensor:
        """(B, N), (B,) -> (B M, D)."""
        places = self._modulated(self._embed(tokens), action)
        return torch.cat([places, self._acting(action).unsqueeze(1)], 1).flatten(0, 1)


class WholeHistory(BlockTransformer):
    """Memory also: the tokens of the frames, oldest first, past (B, W, N)."""

    def __init__(self, config: BlockTransformerConfig, actions: int) -> None:
        super().__init__(config, actions)
        self.time = nn.Embedding(config.history + 1, config.width)  # of the frames, and of what is asked
        nn.init.normal_(self.time.weight, std=0.02)

    def initial(self, batch_size: int) -> Tree:
        """See `TokenDynamics`."""
        memory = self._awaiting(batch_size)
        past = memory["tokens"].unsqueeze(1).expand(-1, self.config.history, -1)
        return {"past": past.contiguous(), **memory}

    def held(self, past: int) -> int:
        """See `TokenDynamics`."""
        return min(past, self.config.history)

    @torch.no_grad()
    def advance(self, memory: Tree, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """One pass over the whole history."""
        past, count = torch.cat([memory["past"][:, 1:], tokens.unsqueeze(1)], 1), self._one_more(memory)
        out, h = self._pass(past, count, action)
        return {"past": past, "out": out, "h": h, "tokens": tokens, "count": count}

    def forward(self, tokens: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """See `BlockTransformer`."""
        (batch, length), history = tokens.shape[:2], self.config.history
        past = F.pad(tokens, (0, 0, history - 1, 0)).unfold(1, history, 1).transpose(2, 3)  # (B, T, W, N)
        count = torch.arange(1, length + 1, device=tokens.device).repeat(batch)
        out, h = self._pass(past.flatten(0, 1), count, action.flatten())
        return out.unflatten(0, (batch, length)), h.unflatten(0, (batch, length))

    def _pass(self, past: Tensor, count: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Histories (B, W, N) of which the last `count` (B,) frames are real, and an action: out and h."""
        (rows, history), heads, rate = past.shape[:2], self.config.heads, self._rate
        frames = self._embed(past.flatten(0, 1)).unflatten(0, (rows, history)) + self.time.weight[:-1, None]
        asked = self._modulated((self._where() + self.time.weight[-1]).expand(rows, -1, -1), action)
        x = torch.cat([frames.flatten(1, 2), self._acting(action).unsqueeze(1), asked], 1)  # (B, W P + 1 + P, D)
        size, places = x.shape[1], asked.shape[1]
        real = torch.arange(history, device=x.device) >= history - count.unsqueeze(1)  # (B, W)
        hidden = F.pad(~real.repeat_interleave(places, 1), (0, places + 1))
        seen = ~hidden[:, None, None]  # (B, 1, 1, S)
        x = drop(x.flatten(0, 1), rate)
        for layers in self._layers():
            # Not `attend`, which writes out what every token thinks of every other: 17 GB for a batch at this length.
            q, k, v = to_qkv(x, layers, rows, heads).unflatten(1, (rows, heads))
            mixed = F.scaled_dot_product_attention(q, k, v, seen, rate)
            x = after_attention(x, mixed.flatten(0, 1), layers, rows, rate)
        x = self.norm(x.float()).view(rows, size, -1)
        return x[:, -places:], x[:, -places - 1]


class _Refiner(nn.Module):
    """One block over the places of a frame, which also sees those tokens that are known."""

    def __init__(self, config: BlockTransformerConfig, embeddings: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.embedding = nn.Embedding(embeddings, config.width)
        self.block = Block(config.width)
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.merge**2 * config.codes)

    def forward(self, out: Tensor, known: Tensor) -> Tensor:
        """(B, P, D), tokens (B, P, merge^2) -> what is added to the logits, (B, P, merge^2 V)."""
        x, rows = (out + embedded(known, self.embedding)).flatten(0, 1), len(out)
        layers = self.block.layers(network_dtype(self.out.weight))
        q, k, v = to_qkv(x, layers, rows, self.heads)
        x = after_attention(x, attend(q, k, v, q.new_zeros(1, 1, 1)), layers, rows)
        return self.out(self.norm(x.float())).view(rows, -1, self.out.out_features)  # type: ignore[no-any-return]


def _nearness(places: tuple[int, int], heads: int) -> tuple[Tensor, Tensor]:
    """(heads, M, 4) and (M, 4), whose products are -slope x squared distance; 0 with the action.

    As numbers of queries and keys: a bias of every pair of places would have to be written out for every row.
    """
    at = torch.cartesian_prod(*(torch.arange(side) - (side - 1) / 2 for side in places)).view(-1, 2)
    square, one = at.square().sum(1, keepdim=True), torch.ones(len(at), 1)
    slopes = torch.tensor([SLOPES[head % len(SLOPES)] for head in range(heads)]).view(-1, 1, 1)
    asking = slopes * torch.cat([2 * at, -square, -one], 1)
    return F.pad(asking, (0, 0, 0, 1)), F.pad(torch.cat([at, one, square], 1), (0, 0, 0, 1))


def embedded(tokens: Tensor, table: nn.Embedding) -> Tensor:
    """The sum of a place's tokens, each by rows of its own: (B, P, E) -> (B, P, D)."""
    each = tokens.shape[-1]
    offset = torch.arange(each, device=tokens.device) * (table.num_embeddings // each)
    return table(tokens + offset).sum(-2)  # type: ignore[no-any-return]


def _a_step_later(motion: Tensor) -> Tensor:
    """Of (B, T, N): each frame has what the one before it had, and the first nothing."""
    return F.pad(motion[:, :-1], (0, 0, 1, 0))


@torch.no_grad()
def token_weights(tokens: Tensor, codes: Tensor, config: BlockTransformerConfig) -> Tensor:
    """How much each token of frames 1.. of (B, T, N) counts, 1 where nothing moves: (B, T - 1, N); codes (V, C).

    1 + motion x how far its code moved (in units of the codes' mean distance, at most 1) + event x by how much more
    than it has so far in this segment + persistence x whether something moved here or beside it just before as well +
    small x its motion as a share of all that moves around it; at most `weight_cap`. The document's bound, in medians,
    is the same where most tokens stand still; with its own scales none is above it. A weight hangs on nothing but its
    own past, so that padding and other segments change none.

    From the "target" is the document's: the motion to the token that is told. What moves is then told too often, since
    weights that depend on what comes shift its probability, and a dream of temperature 1 is full of balls. From the
    "past": the motion that had led here, of this place or one beside it, with which probabilities stay what they are.
    """
    height, width = config.grid
    codes = codes.detach().float()
    unit = (2 * codes.var(0, unbiased=False).sum()).sqrt().clamp(min=1e-6)
    code = codes[tokens]
    moved = ((code[:, 1:] - code[:, :-1]).square().sum(-1).sqrt() / unit).clamp(max=1)  # (B, T - 1, N)
    grid = moved.unflatten(-1, (height, width)).flatten(0, 1)
    around = F.max_pool2d(grid.unsqueeze(1), 3, 1, 1).view_as(moved)
    just_before, before_that = _a_step_later(around), _a_step_later(_a_step_later(around))
    motion, earlier = (just_before, before_that) if config.weights_from == "past" else (moved, just_before)
    so_far = motion.cumsum(1) / torch.arange(1, motion.shape[1] + 1, device=motion.device).unsqueeze(-1)
    event = (motion - so_far).clamp(min=0)
    persistence = torch.minimum(motion, earlier)
    weight = 1 + config.motion_scale * motion + config.event_scale * event + config.persistence_scale * persistence
    if config.small_scale:
        grid = motion.unflatten(-1, (height, width)).flatten(0, 1)
        together = 25 * F.avg_pool2d(grid.unsqueeze(1), 5, 1, 2).view_as(motion)
        weight = weight + config.small_scale * motion / together.clamp(min=1)
    return weight.clamp(max=config.weight_cap)
