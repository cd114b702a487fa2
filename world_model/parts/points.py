"""Places of things as categorical variables: heat maps read as a column and a row each, and stamps drawn there.

A small moving thing costs a flat code thousands of combinations, each learned by itself; encoded as "which column"
and "which row" it is two variables, what is seen or drawn in one place is known in all, and the dynamics of the two are
apart. Keypoints (Jakab et al. 2018; Kulkarni et al. 2019), here discrete, as part of a categorical latent.

Shapes: B batch, C H W picture, M points, K cells along each axis of the padded picture (`nets.padded`), R terms of a
stamp, y x blocks of 4 x 4 pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.parts.nets import BLOCK, ChannelNorm, FrameDecoder, FrameEncoder, padded, to_blocks

SHARPNESS = 4.0  # of the heat maps at the start, so that a map can soon decide
HOTTEST = 20.0  # where a heat map is cut off: its exponentials are summed in float32
REACH = 8  # pixels a stamp reaches to either side of its point
RANK = 4  # terms of a stamp: a bar or a ball is one


class PointEncoder(nn.Module):
    """(..., C, H, W) -> logits (..., 2 M K + rest): each point's columns and rows, then what a FrameEncoder gives."""

    def __init__(self, frame: tuple[int, int, int], channels: int, points: int, cells: int, rest: int) -> None:
        super().__init__()
        c, sides = frame[0], padded(*frame[1:])
        self.points, self.cells = points, cells
        self.folds = tuple(-(-cells * BLOCK // side) for side in sides)  # parts of a block told apart
        narrow = channels // 2
        self.seen = nn.Sequential(
            nn.Conv2d(BLOCK * BLOCK * c, narrow, 3, padding=1, bias=False), ChannelNorm(narrow), nn.SiLU(),
            nn.Conv2d(narrow, points * self.folds[0] * self.folds[1], 1),
        )  # fmt: skip
        self.usual = nn.Parameter(torch.zeros(points, 2, cells))  # where a point is when its thing is nowhere
        self.rest = FrameEncoder(frame, channels, rest)

    def forward(self, frame: Tensor) -> Tensor:
        lead, blocks = frame.shape[:-3], to_blocks(frame)
        return torch.cat([self._places(blocks), self.rest.of_blocks(blocks).float()], -1).unflatten(0, lead)

    def _places(self, blocks: Tensor) -> Tensor:
        """The marginals of each map over its columns and its rows, as logits: (B, 2 M K)."""
        heat = self.seen(blocks).permute(0, 2, 3, 1).float()  # (B, y, x, M * fold * fold)
        heat = heat.mul(SHARPNESS).clamp(max=HOTTEST).exp()
        fine = (self.points, *self.folds)
        columns = heat.sum(1).unflatten(-1, fine).sum(-2)  # (B, x, M, fold): sums over the large axis first
        rows = heat.sum(2).unflatten(-1, fine).sum(-1)
        told = [self._pooled(side.transpose(1, 2).flatten(2)) for side in (columns, rows)]
        return (torch.stack(told, 2).add(1e-8).log() + self.usual).flatten(1)

    def _pooled(self, side: Tensor) -> Tensor:
        return side if side.shape[-1] == self.cells else F.adaptive_avg_pool1d(side, self.cells)


class PointDecoder(nn.Module):
    """The reverse: (..., 2 M K + rest) -> (..., C, H, W), a FrameDecoder's picture plus every point's stamp.

    A stamp is a sum of R products of a profile across and a profile down; the same one is used in every place.
    """

    across: Tensor
    down: Tensor

    def __init__(self, frame: tuple[int, int, int], channels: int, points: int, cells: int, rest: int) -> None:
        super().__init__()
        c, (height, width) = frame[0], padded(*frame[1:])
        self.points, self.cells = points, cells
        self.rest = FrameDecoder(frame, channels, rest)
        self.tall = nn.Parameter(torch.randn(points, RANK, 2 * REACH) * 0.3)
        self.broad = nn.Parameter(torch.randn(points, RANK, c, 2 * REACH) * 0.3)
        self.register_buffer("across", _stamped(cells, width)[:, : frame[2]], persistent=False)
        self.register_buffer("down", _stamped(cells, height)[:, : frame[1]], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        split = 2 * self.points * self.cells
        places = x[:, :split].unflatten(-1, (self.points, 2, self.cells))
        broad = F.pad(self.broad, (0, 1))[..., self.across].to(x.dtype)  # (M, R, C, K, W)
        broad = torch.einsum("bmk,mrckw->bmrwc", places[:, :, 0], broad).flatten(3).flatten(1, 2)
        tall = F.pad(self.tall, (0, 1))[..., self.down].to(x.dtype)  # (M, R, K, H)
        tall = torch.einsum("bmk,mrkh->bhmr", places[:, :, 1], tall).flatten(2)
        stamps = (tall @ broad).unflatten(-1, (-1, self.broad.shape[2])).permute(0, 3, 1, 2)
        return (self.rest(x[:, split:]) + stamps).unflatten(0, lead)


class Distances(nn.Module):
    """How far apart every two points are, across and down, in soft bins: one-hot places (..., 2 M, K) -> (..., size).

    Encoded as one column of K and another, whether two things touch is K x K cases to be memorised; as a
    distance it is one, and what was learned of it in one place holds in all. Carries no gradient to the places.
    """

    pairs: Tensor
    cells: Tensor
    bins: Tensor
    NEAR = (0.0, 1.0, 2.0, 4.0, 7.0, 12.0, 20.0)  # cells: fine where things touch, coarse where they do not
    WIDE = (0.8, 0.8, 1.2, 2.0, 3.2, 5.2, 6.4)

    def __init__(self, points: int, cells: int) -> None:
        super().__init__()
        near, wide = torch.tensor(self.NEAR), torch.tensor(self.WIDE)
        centres, wide = torch.cat([-near[1:].flip(0), near]), torch.cat([wide[1:].flip(0), wide])
        apart = torch.arange(1 - cells, cells).unsqueeze(1)
        self.register_buffer("pairs", torch.triu_indices(points, points, 1), persistent=False)
        self.register_buffer("cells", torch.arange(cells, dtype=torch.float32), persistent=False)
        bins = (apart - centres).div(wide).square().mul(-0.5).exp()
        self.register_buffer("bins", bins, persistent=False)  # (2 K - 1, bins)
        self.size = self.pairs.shape[1] * 2 * len(centres)

    def forward(self, places: Tensor) -> Tensor:
        # Looked up, which takes a third of the time of computing it; whole numbers up to 256 are exact in bfloat16.
        at = (places.detach() @ self.cells.to(places.dtype)).long().unflatten(-1, (-1, 2))  # (..., M, 2)
        apart = at[..., self.pairs[0], :] - at[..., self.pairs[1], :] + len(self.cells) - 1
        return F.embedding(apart, self.bins.to(places.dtype)).flatten(-3)


def _stamped(cells: int, side: int) -> Tensor:
    """For a point in each cell, which pixel of its profile every pixel shows: (K, side), 2 REACH where none."""
    middle = (torch.arange(cells).unsqueeze(1) + 0.5) * side / cells
    pixel = (torch.arange(side) - middle + REACH).floor().long()
    return torch.where((pixel >= 0) & (pixel < 2 * REACH), pixel, 2 * REACH)
