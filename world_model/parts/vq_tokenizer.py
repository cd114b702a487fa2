"""Tokenizers of single frames: residual convolutional VQ-VAEs in two layouts.

`vqgan` is IRIS's, with self-attention (Micheli et al. 2023, appendix A.1): the layout of VQGAN (Esser et al. 2021) with
the same width at every level and no discriminator. `hires` is that of the Atari world model v2.1: each halving doubles
the width, all residual blocks stand at the smallest size, and the picture grows by repeated pixels.
Shapes: B batch, C H W picture, N tokens a frame (row by row of the grid h x w), D width of a code, V codes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from world_model.parts import quantizers
from world_model.parts.blocks import attend
from world_model.parts.nets import ChannelNorm, pad, padded
from world_model.parts.quantizers import Quantized, Quantizer

QuantizerKind = Literal["gradient", "ema", "fsq"]
Layout = Literal["vqgan", "hires"]


@dataclass(frozen=True)
class VQTokenizerConfig:
    """The paper's numbers. A level is what happens between two halvings of the picture."""

    layout: Layout = "vqgan"
    codes: int = 512
    width: int = 512  # of a code
    channels: int = 64  # hires: at the full size
    halvings: int = 4  # 64 x 64 pixels to 4 x 4 tokens
    blocks: int = 2  # residual blocks a level; the decoder has one more
    attention: tuple[int, ...] = (2, 3)  # levels with self-attention after each block: at 16 x 16 and 8 x 8
    patch: int = 1  # pixels, both ways, that become the channels of one place before anything else
    contrast: bool = False  # the networks see and show sigmas from the background, which know no bounds
    local: bool = False  # what becomes one token is encoded as a picture of its own, so that it holds nothing else
    quantizer: QuantizerKind = "gradient"
    levels: tuple[int, ...] = (8, 8, 8)  # fsq only: of each dimension of a code; `width` is then of the networks alone
    follow_every: int = 1  # ema only, as the next: updates between two of the codebook
    reset_every: int = 0  # updates between two looks for dead codes; 0: at each, and after a grace of 70
    rate: float = 0.0  # ema only: how much nearer a rare code must be to be chosen
    even: bool = False  # gradient only: a term for the even use of the codes

    def build(self, frame: tuple[int, int, int]) -> VQTokenizer:
        """The tokenizer for frames (C, H, W)."""
        return VQTokenizer(self, frame)


class VQTokenizer(nn.Module):
    """Frames in [0, 1] to integer tokens and back. The networks themselves see [-1, 1], as the published ones do.

    Frames that are no multiple of what becomes one token are padded with the networks' 0, and cut again when decoded.
    """

    def __init__(self, config: VQTokenizerConfig, frame: tuple[int, int, int]) -> None:
        super().__init__()
        colours, height, width = frame
        times = config.patch * 2**config.halvings
        if config.patch < 1 or config.halvings < 0:
            raise ValueError(f"frames cannot be halved {config.halvings} times in patches of {config.patch} pixels")
        if config.channels % min(32, config.channels):
            raise ValueError(f"more than 32 channels must be a multiple of 32, got {config.channels}")
        if config.layout == "vqgan" and not set(config.attention) <= set(range(config.halvings + 1)):
            raise ValueError(f"attention names levels 0 to {config.halvings}, got {config.attention}")
        self.config, self.frame = config, frame
        self.padded = padded(height, width, times)
        self.cell = (times, times)  # pixels that become one token
        self.grid = (self.padded[0] // times, self.padded[1] // times)
        self.tokens = self.grid[0] * self.grid[1]
        encoder, decoder = (_encoder, _decoder) if config.layout == "vqgan" else (_hires_encoder, _hires_decoder)
        self.encoder = encoder(config, colours * config.patch**2)
        self.embedding: Quantizer = quantizers.build(
            config.quantizer, config.codes, config.width, config.levels, follow_every=config.follow_every,
            reset_every=config.reset_every, even=config.even, rate=config.rate,
        )  # fmt: skip
        self.width = self.embedding.weight.shape[1]  # of a code
        self.pre_quant_conv = nn.Conv2d(config.width, self.width, 1)
        self.post_quant_conv = nn.Conv2d(self.width, config.width, 1)
        self.decoder = decoder(config, colours * config.patch**2)

    def encode(self, frame: Tensor) -> Tensor:
        """(..., C, H, W) in [0, 1] -> tokens (..., N) int64."""
        return self.nearest(self.latent(frame))

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (..., N) -> (..., C, H, W) in [0, 1]."""
        return self.picture(self.embedding(tokens)).float().clamp(0, 1)

    def latent(self, frame: Tensor) -> Tensor:
        """What is quantised: (..., C, H, W) in [0, 1] -> (..., N, D)."""
        lead, (height, width) = frame.shape[:-3], self.grid
        pixels = pad(2 * frame.reshape(-1, *self.frame) - 1, self.padded)
        if self.config.local:
            pixels = rearrange(pixels, "b c (h y) (w x) -> (b h w) c y x", h=height, w=width)
        z = self.pre_quant_conv(self.encoder(F.pixel_unshuffle(pixels, self.config.patch)))
        return rearrange(z, "b d h w -> (b h w) d").reshape(*lead, self.tokens, self.width)

    def nearest(self, latent: Tensor) -> Tensor:
        """The token of the nearest code: (..., N, D) -> (..., N) int64."""
        return self.embedding.nearest(latent)

    def reconstruct(self, frame: Tensor) -> tuple[Tensor, Tensor, Quantized]:
        """In training: the frames again (not clamped), the latents (..., N, D) and what became of them."""
        latent = self.latent(frame)
        quantized = self.embedding.quantize(latent)
        return self.picture(quantized.codes), latent, quantized

    def picture(self, codes: Tensor) -> Tensor:
        """Codes or latents (..., N, D) -> (..., C, H, W), in [0, 1] where they are right, and not clamped."""
        lead = codes.shape[:-2]
        height, width = self.grid
        z = rearrange(codes.reshape(-1, *codes.shape[-2:]), "b (h w) d -> b d h w", h=height, w=width)
        pixels = F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.patch)
        pixels = pixels[..., : self.frame[1], : self.frame[2]]
        return ((pixels + 1) / 2).reshape(*lead, *self.frame)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), 3 x 3, of the same width."""

    def __init__(self, channels: int, *, local: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels, local), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(channels, local), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class PlaceAttention(nn.Module):
    """x + attention of every place to every place, one head; query, key and value in one 1 x 1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels, local=False)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (part c) h w -> part b (h w) c", part=3)
        mixed = attend(q, k, v, q.new_zeros(1, 1, 1))
        return x + self.proj_out(rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[-2]))


class Halve(nn.Module):
    """Half the size by a strided convolution that looks one pixel past the right and lower edge only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Twice the size: every pixel becomes 2 x 2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _hires_encoder(config: VQTokenizerConfig, colours: int) -> nn.Sequential:
    widths = _widths(config)
    parts: list[nn.Module] = [nn.Conv2d(colours, widths[0], 3, padding=1)]
    for narrow, wide in pairwise(widths):
        parts += [nn.Conv2d(narrow, wide, 4, 2, 1), _norm(wide, config.local, groups=8), nn.GELU()]
    parts += [ResidualBlock(widths[-1], local=config.local) for _ in range(config.blocks)]
    return nn.Sequential(*parts, *_to(widths[-1], config.width))


def _hires_decoder(config: VQTokenizerConfig, colours: int) -> nn.Sequential:
    widths = _widths(config)
    parts: list[nn.Module] = [*_to(config.width, widths[-1])]
    parts += [ResidualBlock(widths[-1], local=config.local) for _ in range(config.blocks)]
    for wide, narrow in pairwise(reversed(widths)):
        parts += [nn.Upsample(scale_factor=2.0), nn.Conv2d(wide, narrow, 3, padding=1)]
        parts += [_norm(narrow, config.local, groups=8), nn.GELU()]
    # From -1 to 1: where the picture counts in sigmas from the background it reaches as far as needed.
    squash: tuple[nn.Module, ...] = () if config.contrast else (nn.Tanh(),)
    return nn.Sequential(*parts, nn.Conv2d(widths[0], colours, 3, padding=1), *squash)


def _widths(config: VQTokenizerConfig) -> list[int]:
    """Of each level, twice that of the one before."""
    return [config.channels * 2**level for level in range(config.halvings + 1)]


def _to(inputs: int, outputs: int) -> list[nn.Module]:
    """Between the networks' width and a code's, where they differ."""
    return [] if inputs == outputs else [nn.Conv2d(inputs, outputs, 1)]


# The parts are named as in a published state dict, with "/" for "." (which torch does not allow in a name).
def _encoder(config: VQTokenizerConfig, colours: int) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv_in"] = nn.Conv2d(colours, config.channels, 3, padding=1)
    for level in range(config.halvings + 1):
        parts |= _level(f"down/{level}", config, config.blocks, attention=level in config.attention)
        if level < config.halvings:
            parts[f"down/{level}/downsample"] = Halve(config.channels)
    parts |= _middle(config)
    parts |= _end(config, config.width)
    return nn.Sequential(parts)


def _decoder(config: VQTokenizerConfig, colours: int) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv_in"] = nn.Conv2d(config.width, config.channels, 3, padding=1)
    parts |= _middle(config)
    for level in reversed(range(config.halvings + 1)):  # level 0 is the full picture, as in the encoder
        parts |= _level(f"up/{level}", config, config.blocks + 1, attention=level in config.attention)
        if level > 0:
            parts[f"up/{level}/upsample"] = Double(config.channels)
    parts |= _end(config, colours)
    return nn.Sequential(parts)


def _level(name: str, config: VQTokenizerConfig, blocks: int, *, attention: bool) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {}
    for i in range(blocks):
        parts[f"{name}/block/{i}"] = ResidualBlock(config.channels, local=config.local)
        if attention:
            parts[f"{name}/attn/{i}"] = PlaceAttention(config.channels)
    return parts


def _middle(config: VQTokenizerConfig) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"mid/block_1": ResidualBlock(config.channels, local=config.local)}
    if not config.local:
        parts["mid/attn_1"] = PlaceAttention(config.channels)
    parts["mid/block_2"] = ResidualBlock(config.channels, local=config.local)
    return parts


def _end(config: VQTokenizerConfig, outputs: int) -> dict[str, nn.Module]:
    norm = _norm(config.channels, config.local)
    return {"norm_out": norm, "swish": nn.SiLU(), "conv_out": nn.Conv2d(config.channels, outputs, 3, padding=1)}


class _Norm(nn.GroupNorm):
    """In full precision: on a CPU its bfloat16 form takes eight times as long, and more than all convolutions.

    What it gives is of the input's precision again, so that what follows has half as much to read.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def _norm(channels: int, local: bool, groups: int = 32) -> nn.Module:
    return ChannelNorm(channels) if local else _Norm(min(groups, channels), channels, eps=1e-6)
