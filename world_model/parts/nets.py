"""Small networks that the systems share: perceptrons, and an encoder and a decoder of frames of any size.

Shapes: C H W picture, N channels, F features. Frames are 0 where nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 4  # pixels, both ways, that become the channels of one place
FIRST = 2  # the same of networks that halve a frame step by step: the first of the halvings
MULTIPLE = 16  # pixels: what the convolutions make one place of, so that frames are padded to a multiple of it


def mlp(inputs: int, hidden: int, outputs: int, *, layers: int = 2, zero: bool = False) -> nn.Sequential:
    """Linear-LayerNorm-SiLU `layers` times, then a linear output; `zero` starts the output at 0."""
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [nn.Linear(inputs if i == 0 else hidden, hidden, bias=False), nn.LayerNorm(hidden), nn.SiLU()]
    last = nn.Linear(hidden if layers else inputs, outputs)
    if zero:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, N, H, W); free of copies where memory is channels-last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def padded(height: int, width: int, multiple: int = MULTIPLE) -> tuple[int, int]:
    """The least multiples that hold a frame of this height and width."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def pad(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) with zeros below and to the right, up to `size`; the same tensor when it is of that size."""
    height, width = size[0] - frame.shape[-2], size[1] - frame.shape[-1]
    return F.pad(frame, (0, width, 0, height)) if height or width else frame


def shrunk(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames (B, C, H, W) in [0, 1], padded, at half the size: (B, 4 C, H' / 2, W' / 2) in [-1, 1]."""
    return F.pixel_unshuffle(pad(2 * frame - 1, size), FIRST)


def shrinking(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """Convolutions of these widths, each at half the size of the one before."""
    parts: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
    for both in pairwise(widths):
        parts += halving(*both)
    return nn.Sequential(*parts)


def halving(narrow: int, wide: int) -> list[nn.Module]:
    """Half the size; normed place by place, so that what happens far away changes nothing here."""
    return [nn.Conv2d(narrow, wide, 4, 2, 1), ChannelNorm(wide), nn.SiLU()]


def network_dtype(like: Tensor) -> torch.dtype:
    """The number format in which networks multiply beside this tensor: autocast's where it is on, else its own."""
    device = like.device.type
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if mixed else like.dtype


def to_blocks(frame: Tensor) -> Tensor:
    """(..., C, H, W) -> (B, 16 C, H' / 4, W' / 4): every 4 x 4 pixels as the channels of one place, channels-last.

    H' and W' are those of `padded`; what is padded is 0. Carries no gradient to the frame. `pixel_unshuffle` does the
    same pixel by pixel, which takes six times as long as moving four of them as one number.
    """
    frame = pad(frame, padded(*frame.shape[-2:]))
    c, height, width = frame.shape[-3:]
    kind = network_dtype(frame)  # as the convolutions will
    four = {2: torch.int64, 4: torch.complex128}[kind.itemsize]  # only moved
    rows = frame.detach().reshape(-1, c, height, width).to(kind).contiguous().view(four)
    rows = rows.unflatten(2, (-1, BLOCK)).permute(0, 2, 4, 1, 3).contiguous()  # (B, H / 4, W / 4, C, 4)
    return rows.flatten(3).view(kind).permute(0, 3, 1, 2)


class FrameEncoder(nn.Module):
    """(..., C, H, W) -> (..., outputs): 4 x 4 pixels to channels, two strided convolutions to 1/16, one linear."""

    def __init__(self, frame: tuple[int, int, int], channels: int, outputs: int) -> None:
        super().__init__()
        c, (height, width) = frame[0], padded(*frame[1:])
        self.convs = nn.Sequential(
            nn.Conv2d(16 * c, channels, 4, 2, 1, bias=False), ChannelNorm(channels), nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False), ChannelNorm(2 * channels), nn.SiLU(),
        )  # fmt: skip
        self.out = nn.Linear(2 * channels * (height // MULTIPLE) * (width // MULTIPLE), outputs)

    def forward(self, frame: Tensor) -> Tensor:
        return self.of_blocks(to_blocks(frame)).unflatten(0, frame.shape[:-3])

    def of_blocks(self, blocks: Tensor) -> Tensor:
        """The same of `to_blocks(frame)`: (B, outputs)."""
        return self.out(self.convs(blocks).permute(0, 2, 3, 1).flatten(1))


class FrameDecoder(nn.Module):
    """(..., inputs) -> (..., C, H, W): a linear to 1/8, two convolutions with pixel shuffle; no squashing.

    What is drawn is as large as the padded frame, and cut to the frame's size.
    """

    def __init__(self, frame: tuple[int, int, int], channels: int, inputs: int) -> None:
        super().__init__()
        self.frame = frame
        c, (height, width) = frame[0], padded(*frame[1:])
        self.grid = (height // 8, width // 8)
        wide, narrow = 3 * channels // 4, channels // 2
        self.channels = wide
        self.inp = nn.Linear(inputs, wide * self.grid[0] * self.grid[1])
        self.norm = ChannelNorm(wide)
        self.conv1 = nn.Conv2d(wide, 4 * narrow, 3, padding=1)
        self.conv2 = nn.Conv2d(narrow, 16 * c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        x = self.inp(x.reshape(-1, x.shape[-1])).view(-1, *self.grid, self.channels).permute(0, 3, 1, 2)
        x = F.pixel_shuffle(self.conv1(F.silu(self.norm(x))), 2)
        x = F.pixel_shuffle(self.conv2(F.silu(x)), 4)
        return x[..., : self.frame[1], : self.frame[2]].unflatten(0, lead)
