"""A convolutional variational autoencoder (Ha & Schmidhuber 2018, appendix A.1), and the discriminator that makes it a
VAE-GAN (Larsen et al. 2016).

Shapes: C H W picture, N channels of the first convolution, Z latent dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.parts.nets import pad

SIZE, STEP = 64, 16  # pixels: the least side that the decoder draws, and what each further place of its grid adds
WIDE = 8 * 2 * 2  # channels of a place of the decoder's grid, in units of N


def grid_of(frame: tuple[int, int, int]) -> tuple[int, int]:
    """Rows and columns that the decoder begins with, for frames (C, H, W): 1 x 1 up to 64 x 64 pixels.

    Without padding in the convolutions, only sides of 48 + 16 g pixels come out as large as they went in: others are
    padded to the next of these, and what is drawn is cut. The encoder ends with one row and column more.
    """
    height, width = (max(1, -(-(side - SIZE) // STEP) + 1) for side in frame[1:])
    return height, width


def drawn(grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what is drawn from such a grid, in pixels."""
    return SIZE + STEP * (grid[0] - 1), SIZE + STEP * (grid[1] - 1)


def kl_from_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) in nats of each dimension, (..., Z), in float32."""
    mean, log_var = mean.float(), log_var.float()
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


def draw_latent(mean: Tensor, log_var: Tensor) -> Tensor:
    """A draw from N(mean, exp(log_var)) with a gradient to both, (..., Z)."""
    return mean + (0.5 * log_var).exp() * torch.randn_like(mean)


def _flat(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., C, H, W) -> (B, C, *size), channels-last: on a CPU the convolutions are faster so. Black where padded."""
    return pad(frame.reshape(-1, *frame.shape[-3:]), size).contiguous(memory_format=torch.channels_last)


def _begin(module: nn.Module) -> None:
    """Weights under which signals keep their size through ReLUs (He et al. 2015), and no biases.

    The library's own shrink them: after eight layers no frame differs from another, and on mostly black games the
    decoder turns black, its units die, and it stays so.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan_in: float = part.weight[0].numel()
            if isinstance(part, nn.ConvTranspose2d):  # of a kernel, each pixel gets what the stride leaves
                taps = 1 if isinstance(part, _OnePixelDeconv) else (part.kernel_size[0] / part.stride[0]) ** 2
                fan_in = part.in_channels * taps
            nn.init.normal_(part.weight, std=(2 / fan_in) ** 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class _OnePixelDeconv(nn.ConvTranspose2d):
    """A transposed convolution of a single pixel: (B, I) -> (B, N, k, k). A matrix product, six times as fast so."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert self.bias is not None
        side, outputs = self.kernel_size[0], self.out_channels
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # no copy: the weights are channels-last
        y = torch.addmm(self.bias.repeat(side * side), x, weight)
        return y.view(-1, side, side, outputs).permute(0, 3, 1, 2)


class ConvVAE(nn.Module):
    """Frames to Z Gaussians and back. For 64x64 RGB, 32 channels and Z = 32 the paper's net of 4,348,547 parameters.

    For larger frames the paper's layers see and draw more places, and the linear layers grow with their number.
    """

    def __init__(self, frame: tuple[int, int, int], z: int, channels: int = 32) -> None:
        super().__init__()
        c, n, self.frame, self.grid = frame[0], channels, frame, grid_of(frame)
        rows, columns = self.grid
        seen = 8 * n * (rows + 1) * (columns + 1)
        first = _OnePixelDeconv if self.grid == (1, 1) else nn.ConvTranspose2d
        self.convs = nn.Sequential(
            nn.Conv2d(c, n, 4, 2), nn.ReLU(), nn.Conv2d(n, 2 * n, 4, 2), nn.ReLU(),
            nn.Conv2d(2 * n, 4 * n, 4, 2), nn.ReLU(), nn.Conv2d(4 * n, 8 * n, 4, 2), nn.ReLU(),
        )  # fmt: skip
        self.mean = nn.Linear(seen, z)
        self.log_var = nn.Linear(seen, z)
        self.inp = nn.Linear(z, WIDE * n * rows * columns)
        self.deconvs = nn.Sequential(
            first(WIDE * n, 4 * n, 5, 2), nn.ReLU(), nn.ConvTranspose2d(4 * n, 2 * n, 5, 2), nn.ReLU(),
            nn.ConvTranspose2d(2 * n, n, 6, 2), nn.ReLU(), nn.ConvTranspose2d(n, c, 6, 2),
        )  # fmt: skip
        _begin(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C, H, W) in [0, 1] -> mean and log-variance of the latent, (..., Z) each, float32."""
        deep = self.convs(_flat(frame, drawn(self.grid))).permute(0, 2, 3, 1).flatten(1)
        mean, log_var = (part(deep).float().reshape(*frame.shape[:-3], -1) for part in (self.mean, self.log_var))
        return mean, log_var

    def decode(self, z: Tensor) -> Tensor:
        """(..., Z) -> (..., C, H, W) in [0, 1], float32."""
        deep = self.inp(z.reshape(-1, z.shape[-1]))
        if self.grid != (1, 1):
            deep = deep.unflatten(1, (*self.grid, -1)).permute(0, 3, 1, 2)
        frame = self.deconvs(deep)[..., : self.frame[1], : self.frame[2]].float().sigmoid()
        return frame.reshape(*z.shape[:-1], *frame.shape[1:])


class Discriminator(nn.Module):
    """Says whether a frame is real, in terms that a VAE-GAN measures likeness in.

    The convolutions of the encoder. Larsen et al. normalise over the batch; here every frame is judged alone. A norm
    over channels instead would blow up what is hardly there, and games are black in large parts.
    """

    def __init__(self, frame: tuple[int, int, int], channels: int = 32) -> None:
        super().__init__()
        c, n, self.grid = frame[0], channels, grid_of(frame)
        self.inner = nn.Sequential(
            nn.Conv2d(c, n, 4, 2), nn.LeakyReLU(0.2),
            nn.Conv2d(n, 2 * n, 4, 2), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * n, 4 * n, 4, 2),
        )  # fmt: skip
        self.outer = nn.Sequential(nn.Conv2d(4 * n, 8 * n, 4, 2), nn.LeakyReLU(0.2))
        self.logit = nn.Linear(8 * n * (self.grid[0] + 1) * (self.grid[1] + 1), 1)
        _begin(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C, H, W) in [0, 1] -> logit of being real (...), features of the third layer, flat (..., 4 N * y * x).

        There are 6 x 6 places in that layer for frames of 64x64 pixels.
        """
        lead = frame.shape[:-3]
        features = self.inner(_flat(frame, drawn(self.grid)))
        deep = self.outer(F.leaky_relu(features, 0.2)).permute(0, 2, 3, 1).flatten(1)
        return self.logit(deep).float().view(lead), features.float().reshape(*lead, -1)
