"""What remembers: a GRU, or a causal transformer with a rolling key-value cache. Both in a step and a parallel form.

Shapes: B batch, T time, I input, D width, L layers, N heads, S slots of the cache.
`memory` after inputs x[0..t-1] is what `step` returns; `scan` gives the memories before each input, x[t] excluded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

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

    def step(self, memory: Tree, x: Tensor) -> Tree:
        """One input (B, I) further; overwrites the oldest slot once the window is full."""
        position = memory["position"]
        slots = torch.arange(self.window, device=x.device)
        seen = slots <= position.unsqueeze(1)  # (B, S); every slot once the ring is full
        here = slots == (position % self.window).unsqueeze(1)
        x = self.project(x).unsqueeze(1)  # (B, 1, D)
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            q, k, v = block.qkv(x, position.unsqueeze(1))  # type: ignore[operator]
            k = torch.where(here.unsqueeze(-1), k.to(memory["k"].dtype), memory["k"][:, i])
            v = torch.where(here.unsqueeze(-1), v.to(memory["v"].dtype), memory["v"][:, i])
            x = block(x, q, k, v, seen.unsqueeze(1))
            keys.append(k)
            values.append(v)
        h = self.norm(x.squeeze(1).float())
        return {"k": torch.stack(keys, 1), "v": torch.stack(values, 1), "h": h, "position": position + 1}

    def scan(self, x: Tensor) -> Tree:
        """(B, T, I) -> memories (B, T, ...), the first of them initial. Each row of time shares one cache (a view)."""
        batch, length = x.shape[:2]
        initial = self.initial(batch)
        times = torch.arange(length, device=x.device)
        age = times.unsqueeze(1) - times
        seen = (age >= 0) & (age < self.window)  # (T, T)
        x = self.project(x)
        keys, values = [], []
        for block in self.blocks:
            q, k, v = block.qkv(x, times.unsqueeze(0))  # type: ignore[operator]
            x = block(x, q, k, v, seen)
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

    def qkv(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.to_qkv(self.norm1(x)).chunk(3, -1)
        return self._rotate(q, position), self._rotate(k, position), v

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        # Written out: scaled_dot_product_attention's bf16 backward is three times slower on CPU.
        q, k, v = (rearrange(part.to(q.dtype), "b t (n d) -> b n t d", n=self.heads) for part in (q, k, v))
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        mask = seen if seen.dim() == 2 else seen.unsqueeze(1)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        mixed = rearrange(weights.to(v.dtype) @ v, "b n t d -> b t (n d)")
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotary position embedding (Su et al. 2021) on each head: (B, T, D), (B or 1, T)."""
        x = rearrange(x, "b t (n d) -> b t n d", n=self.heads)
        half = x.shape[-1] // 2
        frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = (position.unsqueeze(-1) * frequency).unsqueeze(2)  # (B, T, 1, half)
        cos, sin = angle.cos(), angle.sin()
        a, b = x.float().chunk(2, -1)
        return rearrange(torch.cat([a * cos - b * sin, a * sin + b * cos], -1), "b t n d -> b t (n d)").to(x.dtype)
