"""Sequence models: a GRU, or a causal transformer with a rolling key-value cache. Both in a step and a parallel form.

Shapes: B batch, T time, I input, D width, L layers, N heads, S slots of the cache.
`memory` after inputs x[0..t-1] is what `step` returns; `scan` gives the memories before each input, x[t] excluded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from world_model.parts.nets import network_dtype
from world_model.trees import Tree


class GRU(nn.Module):
    """Gated recurrent unit with one LayerNorm over its three gates (Dreamer's variant), memory {"h": (B, D)}."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(inputs, 3 * width, bias=False)
        self.recur = nn.Linear(width, 3 * width, bias=False)
        self.norm = nn.LayerNorm(3 * width)

    def initial(self, batch_size: int) -> Tree:
        """Nothing seen yet: zeros."""
        return {"h": self.recur.weight.new_zeros(batch_size, self.width)}

    def output(self, memory: Tree) -> Tensor:
        """What the memory tells the heads: (..., D)."""
        return memory["h"]

    def own(self, memory: Tree) -> Tree:
        """The same: a step makes another anyway."""
        return memory

    def step(self, memory: Tree, x: Tensor) -> Tree:
        """One input (B, I) further."""
        return {"h": self._cell(memory["h"], self.project(x))}

    def scan(self, x: Tensor) -> Tree:
        """(B, T, I) -> memories (B, T, ...), the first of them initial."""
        projected = self.project(x).unbind(1)  # all times in one matrix product
        h = self.initial(x.shape[0])["h"]
        states = [h]
        for t in range(x.shape[1] - 1):
            h = self._cell(h, projected[t])
            states.append(h)
        return {"h": torch.stack(states, 1)}

    def _cell(self, h: Tensor, projected: Tensor) -> Tensor:
        gates = self.norm((projected + self.recur(h)).float())
        reset, candidate, update = gates.chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)  # starts out remembering
        return torch.lerp(h, candidate, update)


class Transformer(nn.Module):
    """Pre-norm causal transformer, one token a step, that sees the last `window` inputs through rotary positions.

    Memory: keys and values (B, L, S, D) in a ring of S = window slots, the output h (B, D), and each row's own
    position (B,), so that rows of different ages stand in one batch and the window slides without recomputation.
    """

    def __init__(self, inputs: int, width: int, *, layers: int = 2, heads: int = 4, window: int = 32) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"a transformer of width {width} cannot have {heads} heads: each needs an even share")
        self.width, self.heads, self.window = width, heads, window
        self.project = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def initial(self, batch_size: int) -> Tree:
        """An empty cache."""
        weight = self.project.weight
        cache = weight.new_zeros(batch_size, len(self.blocks), self.window, self.width)
        position = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return {"k": cache, "v": cache.clone(), "h": weight.new_zeros(batch_size, self.width), "position": position}

    def output(self, memory: Tree) -> Tensor:
        """What the memory tells the heads: (..., D)."""
        return memory["h"]

    def own(self, memory: Tree) -> Tree:
        """A copy that `step` overwrites: keys and values as attention reads them fastest, L x (B, N, S, D / N)."""
        kind, contiguous = network_dtype(memory["k"]), torch.contiguous_format

        def apart(cache: Tensor) -> tuple[Tensor, ...]:
            layers = (self._layer(cache, i) for i in range(len(self.blocks)))
            return tuple(layer.to(kind, copy=True, memory_format=contiguous) for layer in layers)

        return {**memory, "k": apart(memory["k"]), "v": apart(memory["v"])}

    def step(self, memory: Tree, x: Tensor) -> Tree:
        """One input (B, I) further; overwrites the oldest slot once the window is full, that of an own memory in place.

        Carries no gradient through several layers: that is what `scan` is for.
        """
        own, position = isinstance(memory["k"], tuple), memory["position"]
        ring = {name: memory[name] if own else memory[name].clone() for name in ("k", "v")}
        slot, row = position % self.window, torch.arange(len(x), device=x.device)
        seen = torch.arange(self.window, device=x.device) <= position.unsqueeze(1)  # every slot once the ring is full
        x = self.project(x).unsqueeze(1)  # (B, 1, D)
        turn = _turn(position.unsqueeze(1), self.width // self.heads)
        for i, block in enumerate(self.blocks):
            q, *new = block.qkv(x, turn)  # type: ignore[operator]
            k, v = (cache[i] if own else self._layer(cache, i) for cache in ring.values())
            for cache, part in zip((k, v), new, strict=True):
                cache[row, :, slot] = part.view(len(x), self.heads, -1).to(cache.dtype)
            x = block.after(x, block.read(q, k, v, seen))  # type: ignore[operator]
        return {**ring, "h": self.norm(x.squeeze(1).float()), "position": position + 1}

    def _layer(self, cache: Tensor, i: int) -> Tensor:
        """A view of one layer's keys or values, head by head: (B, L, S, D) -> (B, N, S, D / N)."""
        return rearrange(cache[:, i], "b s (n d) -> b n s d", n=self.heads)

    def scan(self, x: Tensor) -> Tree:
        """(B, T, I) -> memories (B, T, ...), the first of them initial. Each row of time shares one cache (a view)."""
        batch, length = x.shape[:2]
        initial = self.initial(batch)
        times = torch.arange(length, device=x.device)
        age = times.unsqueeze(1) - times
        seen = (age >= 0) & (age < self.window)  # (T, T)
        x = self.project(x)
        turn = _turn(times.unsqueeze(0), self.width // self.heads)
        keys, values = [], []
        for block in self.blocks:
            q, k, v = block.qkv(x, turn)  # type: ignore[operator]
            x = block.after(x, block.mix(q, k, v, seen))  # type: ignore[operator]
            keys.append(k)
            values.append(v)
        h = torch.cat([initial["h"].unsqueeze(1), self.norm(x.float())[:, :-1]], 1)
        position = times.expand(batch, length)
        k, v = (self._rings(torch.stack(cache, 1).to(h.dtype)) for cache in (keys, values))
        return {"k": k, "v": v, "h": h, "position": position}

    def _rings(self, cache: Tensor) -> Tensor:
        """Keys of all times (B, L, T, D) -> the ring (B, T, L, S, D) as it stood before each time."""
        length = cache.shape[2]
        if length <= self.window:  # slots that are not filled yet are masked by position: one ring serves all times
            ring = F.pad(cache, (0, 0, 0, self.window - length))
            return ring.unsqueeze(1).expand(-1, length, -1, -1, -1)
        times = torch.arange(length, device=cache.device).unsqueeze(1)
        slots = torch.arange(self.window, device=cache.device)
        newest = times - 1 - (times - 1 - slots) % self.window  # the last time before t that wrote into the slot
        return rearrange(cache[:, :, newest.clamp(min=0)], "b l t s d -> b t l s d")


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def qkv(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        qk, v = self.to_qkv(self.norm1(x)).split((2 * x.shape[-1], x.shape[-1]), -1)
        q, k = self._rotate(qk, turn).chunk(2, -1)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Attention of all times (B, T, D) to those that each has seen, (T, T)."""
        # Written out: scaled_dot_product_attention's bf16 backward is three times slower on CPU.
        q, k, v = (rearrange(part, "b t (n d) -> b n t d", n=self.heads) for part in (q, k, v))
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return rearrange(weights.to(v.dtype) @ v, "b n t d -> b t (n d)")

    def read(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Attention of one time (B, 1, D) to the slots (B, N, S, D / N) that it has seen, (B, S)."""
        q = rearrange(q, "b t (n d) -> b n t d", n=self.heads)
        mixed = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), seen[:, None, None])
        return rearrange(mixed, "b n t d -> b t (n d)")

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))

    def _rotate(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary position embedding (Su et al. 2021) on each head's share of (B, T, ...)."""
        cos, sin = turn
        halves = x.float().unflatten(-1, (-1, 2, cos.shape[-1]))
        a, b = halves.unbind(-2)
        turned = halves * cos.unsqueeze(-2)  # then in place: in a dream this is half of the time of `torch.stack`
        turned[..., 0, :].addcmul_(b, sin, value=-1)
        turned[..., 1, :].addcmul_(a, sin)
        return turned.flatten(-3).to(x.dtype)


def _turn(position: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which a head of this width turns at each position: (B or 1, T) -> (B or 1, T, 1, half)."""
    half = width // 2
    frequency = 10000.0 ** (-torch.arange(half, device=position.device, dtype=torch.float32) / half)
    angle = (position.unsqueeze(-1) * frequency).unsqueeze(2)
    return angle.cos(), angle.sin()
