"""A tokenizer of frame pairs: the encoder sees two frames in a row, the decoder the first of them and the codes.

So the codes hold what happened in between and not where everything stands: what neural Atari calls latent actions, and
the codes of the Ms. Pac-Man latent GRU. With `positions` the whole transition becomes a few codes, and with one of few
codes an action (Bruce et al. 2024, "Genie"; Ye et al. 2024, "LAPA").
Shapes: B batch, C H W picture, N tokens a pair (row by row of the grid h x w), D width of a code, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from world_model.parts import quantizers
from world_model.parts.nets import FIRST, ChannelNorm, halving, padded, shrinking, shrunk
from world_model.parts.quantizers import Quantizer
from world_model.parts.vq_tokenizer import QuantizerKind

PairEncoder = Literal["conv", "cvivit"]
WIDEST = 4  # times the channels at most, however often the picture is halved


@dataclass(frozen=True)
class PairTokenizerConfig:
    """What it is built from."""

    encoder: PairEncoder = "conv"  # both frames as channels of one picture, or two stems and attention between them
    codes: int = 256
    width: int = 128  # of a code
    channels: int = 16  # of the encoder at half the size, doubled with each halving up to 4 times
    decoder_channels: int = 16  # the decoder's
    context: int = 1  # frames that the decoder draws on: with few codes it must know by itself how things were moving
    halvings: int = 4  # of the picture's sides: 112x80 pixels to 7x5 places
    layers: int = 4  # cvivit: of attention, of 4 heads
    positions: int = 0  # codes of a pair; 0: one for each place
    action_codes: int = 0  # of the codes, so many are the first position's own
    flow_steps: int = 0  # a picture flows from the last frame to the next in so many steps; 0: it is drawn at once
    residual: bool = False  # the decoder draws what changes, not the whole frame
    quantizer: QuantizerKind = "ema"
    levels: tuple[int, ...] = (8, 8, 4)
    follow_every: int = 1
    reset_every: int = 0
    rate: float = 0.0  # ema: how much nearer a rare code must be to be chosen
    even: bool = False  # gradient: a term for the even use of the codes

    def build(self, frame: tuple[int, int, int]) -> PairTokenizer:
        """The tokenizer for pairs of frames (C, H, W)."""
        return PairTokenizer(self, frame)


class PairTokenizer(nn.Module):
    """Pairs of frames in [0, 1] to integer tokens, and a frame with the tokens of what follows it to the next one."""

    def __init__(self, config: PairTokenizerConfig, frame: tuple[int, int, int]) -> None:
        super().__init__()
        if config.halvings < 1 or config.context < 1:
            raise ValueError("a pair tokenizer halves its frames at least once, and draws on at least one")
        if config.action_codes and config.positions < 2:
            raise ValueError("codes of the action's own need positions of at least 2: one for it, and the rest")
        self.config, self.frame = config, frame
        times = 2**config.halvings
        self.padded = padded(*frame[1:], times)
        self.cell = (times, times)
        self.places = (self.padded[0] // times, self.padded[1] // times)
        self.grid = (1, config.positions) if config.positions else self.places
        self.tokens = self.grid[0] * self.grid[1]
        self.embedding: Quantizer = quantizers.build(
            config.quantizer, config.codes, config.width, config.levels, follow_every=config.follow_every,
            reset_every=config.reset_every, even=config.even, rate=config.rate, apart=config.action_codes,
        )  # fmt: skip
        self.width = self.embedding.weight.shape[1]
        colours, count = frame[0] * FIRST**2, self.places[0] * self.places[1]
        encoder = _ConvEncoder if config.encoder == "conv" else _CrossEncoder
        self.encoder = encoder(config, colours, count)
        wide = self.encoder.width
        pooled = config.positions
        self.to_codes = nn.Linear(count * wide if pooled else wide, (pooled or 1) * self.width)
        self.decoder = _Decoder(config, colours)
        deep = self.decoder.deepest
        self.from_codes = nn.Linear((pooled or 1) * self.width, count * deep if pooled else deep)

    def encode(self, before: Tensor, frame: Tensor) -> Tensor:
        """Two frames in a row, (..., C, H, W) each, -> tokens (..., N) int64 of the transition."""
        return self.embedding.nearest(self.latent(before, frame))

    def latent(self, before: Tensor, frame: Tensor) -> Tensor:
        """What is quantised: (..., N, D)."""
        lead = frame.shape[:-3]
        z = self.encoder(self._shrunk(before), self._shrunk(frame))  # (B, P, W)
        z = self.to_codes(z.flatten(1) if self.config.positions else z)
        return z.reshape(*lead, self.tokens, self.width)  # type: ignore[no-any-return]

    def picture(self, before: Tensor, codes: Tensor) -> Tensor:
        """Frames (..., context, C, H, W) and the codes (..., N, D) of what follows -> the next one, not clamped."""
        shown, steps = before[..., -1, :, :, :], self.config.flow_steps
        if not steps:
            return self.drawn(before, codes)
        for step in range(steps):  # Euler: from here straight to where it says that it ends, a step's part of the way
            end = self.drawn(before, codes, shown, shown.new_full(codes.shape[:-2], step / steps))
            shown = shown + (end - shown) / (steps - step)
        return shown

    def drawn(
        self, before: Tensor, codes: Tensor, under_way: Tensor | None = None, time: Tensor | None = None
    ) -> Tensor:
        """One pass of the decoder; of a flow, where it ends that is under way (..., C, H, W) at a time (...) in [0, 1).

        Flow matching between the last frame and the next (Lipman et al. 2023; Albergo & Vanden-Eijnden 2023), the
        network predicting the end instead of the velocity (end - under way) / (1 - time).
        """
        lead = codes.shape[:-2]
        told = self.from_codes(codes.reshape(-1, self.tokens * self.width) if self.config.positions else
                               codes.reshape(-1, self.tokens, self.width))  # fmt: skip
        told = rearrange(
            told.reshape(len(told), self.places[0] * self.places[1], -1), "b (h w) d -> b d h w", h=self.places[0]
        )
        seen = self._shrunk(before).unflatten(0, (-1, self.config.context)).flatten(1, 2)
        if under_way is not None and time is not None:
            moment = time.reshape(-1, 1, 1, 1).expand(-1, 1, *seen.shape[-2:])
            seen = torch.cat([seen, self._shrunk(under_way), moment], 1)
        pixels = F.pixel_shuffle(self.decoder(seen, told), FIRST)
        pixels = pixels[..., : self.frame[1], : self.frame[2]].reshape(*lead, *self.frame)
        return before[..., -1, :, :, :] + pixels if self.config.residual else (pixels + 1) / 2

    def _shrunk(self, frame: Tensor) -> Tensor:
        """(..., C, H, W) -> (B, 4 C, H' / 2, W' / 2) in [-1, 1]."""
        return shrunk(frame.reshape(-1, *self.frame), self.padded)


class _ConvEncoder(nn.Module):
    """Both frames as the channels of one picture."""

    def __init__(self, config: PairTokenizerConfig, colours: int, places: int) -> None:
        super().__init__()
        widths = _widths(config.channels, config.halvings)
        self.width = widths[-1]
        self.convs = shrinking(2 * colours, widths)

    def forward(self, before: Tensor, frame: Tensor) -> Tensor:
        return self.convs(torch.cat([before, frame], 1)).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class _CrossEncoder(nn.Module):
    """Each frame by a stem of its own; then the places of the second look at those of the first (after C-ViViT)."""

    def __init__(self, config: PairTokenizerConfig, colours: int, places: int) -> None:
        super().__init__()
        if config.width % _CrossAttention.HEADS:
            raise ValueError(
                f"cvivit has {_CrossAttention.HEADS} heads, among which a code's width must be shared evenly"
            )
        widths = _widths(config.channels, config.halvings)
        self.width = config.width
        self.before, self.frame = (
            nn.Sequential(shrinking(colours, widths), nn.Conv2d(widths[-1], self.width, 1)) for _ in range(2)
        )
        self.place = nn.Parameter(0.02 * torch.randn(places, self.width))
        self.layers = nn.ModuleList(_CrossAttention(self.width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(self.width)

    def forward(self, before: Tensor, frame: Tensor) -> Tensor:
        past, x = (
            stem(part).flatten(2).transpose(1, 2) + self.place
            for stem, part in ((self.before, before), (self.frame, frame))
        )
        for layer in self.layers:
            x = layer(x, past)
        return self.norm(x)  # type: ignore[no-any-return]


class _CrossAttention(nn.Module):
    """x + attention to the past, then x + perceptron."""

    HEADS = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_past, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        heads = "b p (h d) -> b h p d"
        q = rearrange(self.q(self.norm(x)), heads, h=self.HEADS)
        k, v = (rearrange(part, heads, h=self.HEADS) for part in self.kv(self.norm_past(past)).chunk(2, -1))
        x = x + self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h p d -> b p (h d)"))
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]


class _Decoder(nn.Module):
    """Down from the frames before, where the codes join it, and up again with what each size had seen."""

    def __init__(self, config: PairTokenizerConfig, colours: int) -> None:
        super().__init__()
        widths = _widths(config.decoder_channels, config.halvings)
        self.deepest = widths[-1]
        flow = colours + 1 if config.flow_steps else 0  # the picture under way, and the time
        self.first = nn.Conv2d(config.context * colours + flow, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Sequential(*halving(*both)) for both in pairwise(widths))
        self.join = nn.Sequential(ChannelNorm(self.deepest), nn.SiLU(), nn.Conv2d(self.deepest, self.deepest, 3, 1, 1))
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(narrow, 4 * wide, 1), nn.PixelShuffle(2))
            for narrow, wide in pairwise(reversed(widths))
        )
        self.mix = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * wide, wide, 3, padding=1), ChannelNorm(wide), nn.SiLU())
            for wide in reversed(widths[:-1])
        )
        self.last = nn.Conv2d(widths[0], colours, 3, padding=1)

    def forward(self, before: Tensor, told: Tensor) -> Tensor:
        """(B, 4 C context [+ 4 C + 1], H / 2, W / 2), (B, deepest, h, w) -> (B, 4 C, H / 2, W / 2)."""
        seen = [self.first(before)]
        for halve in self.down:
            seen.append(halve(seen[-1]))
        x = seen.pop() + told
        x = x + self.join(x)
        for up, mix in zip(self.up, self.mix, strict=True):
            x = mix(torch.cat([up(x), seen.pop()], 1))
        return self.last(x)  # type: ignore[no-any-return]


def _widths(channels: int, halvings: int) -> list[int]:
    """Of each size, from half the picture's on."""
    return [channels * min(2**level, WIDEST) for level in range(halvings)]
