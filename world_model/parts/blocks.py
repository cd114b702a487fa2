"""The blocks of IRIS's transformer: their parameters, and what they compute with these in any number format.

Shapes: B rows, M tokens in a row, S places looked at, D width, d of it for each head, R = B x heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Affine(NamedTuple):
    """What a linear layer or a norm multiplies with and adds; an int8 weight (K, D) has a scale (K,) a row."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None


class Layers(NamedTuple):
    """All of a block, in the order in which it is used."""

    norm1: Affine
    qkv: Affine
    out: Affine
    norm2: Affine
    up: Affine
    down: Affine


class Block(nn.Module):
    """The parameters of a pre-norm block, under their published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def layers(self, kind: torch.dtype | None = None) -> Layers:
        """The parameters themselves, or the linear layers' cast to `kind` if they are not of it."""
        qkv, out, up, down = (affine(layer, kind) for layer in (self.qkv, self.out, self.mlp[0], self.mlp[2]))
        return Layers(affine(self.norm1), qkv, out, affine(self.norm2), up, down)


def affine(layer: nn.Module, kind: torch.dtype | None = None) -> Affine:
    """A layer's weight and bias, cast to `kind`; those that `to_int8` has rounded stay as they are."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    if weight.dtype == torch.int8:
        return Affine(weight, bias, layer.get_buffer("scale"))
    return Affine(weight.to(kind), bias.to(kind))


def to_int8(layer: nn.Linear) -> None:
    """Rounds the rows of a weight to 255 steps each, in place: for one row a pass, which costs reading the weights.

    That moves twice the probability that bfloat16 does, 0.10 and 0.05 % of it (`precision`, IRIS xs on Pong).
    """
    scale = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    whole = (layer.weight / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(whole, requires_grad=False)
    layer.bias = nn.Parameter(layer.bias.to(torch.bfloat16), requires_grad=False)
    layer.register_buffer("scale", scale.squeeze(1).to(torch.bfloat16))


# A token costs as many of these calls at width 256 as it costs arithmetic: plain views, and neither modules nor einops.
def to_qkv(x: Tensor, layers: Layers, rows: int, heads: int, kind: torch.dtype | None = None) -> Tensor:
    """Query, key and value: (B M, D) of B rows -> (3, R, M, d), of a number format if one is given."""
    parts = linear(norm(x, layers.norm1), layers.qkv).view(rows, -1, 3, heads, x.shape[1] // heads)
    parts = parts.permute(2, 0, 3, 1, 4).to(kind or parts.dtype, memory_format=torch.contiguous_format)
    return parts.reshape(3, rows * heads, -1, parts.shape[-1])


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rate: float = 0.0) -> Tensor:
    """Attention written out: q (R, M, d), k and v (R, S, d), bias (1 or R, M, S) -> (R, M, d).

    torch's own takes three times as long on a CPU, both for one query and many rows and, with dropout, in bf16.
    """
    scale = q.shape[-1] ** -0.5
    if q.shape[1] == 1:  # the same numbers; so the keys are read in the order in which they lie
        scores = torch.baddbmm(bias.transpose(1, 2), k, q.transpose(1, 2), alpha=scale).transpose(1, 2)
    else:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    weights = scores.softmax(-1)
    return torch.bmm(drop(weights.to(v.dtype), rate), v)


def after_attention(x: Tensor, mixed: Tensor, layers: Layers, rows: int, rate: float = 0.0) -> Tensor:
    """The rest of a block: x (B M, D), mixed (R, M, d), the rate of dropout."""
    mixed = mixed.view(rows, -1, *mixed.shape[1:]).transpose(1, 2).reshape(x.shape)
    x = x + drop(linear(mixed, layers.out), rate)
    return x + drop(linear(F.gelu(linear(norm(x, layers.norm2), layers.up)), layers.down), rate)


def mlp(x: Tensor, hidden: Affine, out: Affine) -> Tensor:
    """A head: (..., D) -> (..., K)."""
    return linear(F.relu(linear(x, hidden)), out)


def norm(x: Tensor, layer: Affine) -> Tensor:
    """LayerNorm."""
    return torch.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)


def linear(x: Tensor, layer: Affine) -> Tensor:
    """In the weights' number format; with int8 (M, D) in bfloat16."""
    if layer.scale is None:
        return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
    return torch._weight_int8pack_mm(x.to(torch.bfloat16), layer.weight, layer.scale).add_(layer.bias)


def hiding(key: Tensor, query: Tensor) -> Tensor:
    """A bias that hides later positions from earlier ones: 0, or -inf where key > query, as they broadcast."""
    return torch.zeros((), device=key.device).masked_fill(key > query, float("-inf"))


def drop(x: Tensor, rate: float) -> Tensor:
    """Dropout. From 16 random bits an element on a CPU, where torch's own takes five times as long."""
    if not rate:
        return x
    if not x.is_cpu:
        return F.dropout(x, rate)
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.long).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= round(rate * 2**16) - 2**15
    return x * kept.to(x.dtype).div_(1 - rate)
