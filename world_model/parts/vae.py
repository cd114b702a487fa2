"""A convolutional variational autoencoder (Ha & Schmidhuber 2018, appendix A.1), and the discriminator that makes it a
VAE-GAN (Larsen et al. 2016).

Shapes: C H W picture, N channels of the first convolution, Z latent dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 64  # pixels, both sides: without padding, no other picture comes out of the decoder as large as it went in
DEEP = 8 * 2 * 2  # numbers behind the last convolution, in units of N


def check_frame(frame: tuple[int, int, int]) -> int:
    """The channels of (C, H, W), if the networks here can take it; raises ValueError otherwise."""
    channels, height, width = frame
    if (height, width) != (SIZE, SIZE):
        raise ValueError(f"this autoencoder is for frames of {SIZE} x {SIZE} pixels, got {height} x {width}")
    return channels


def kl_from_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) in nats of each dimension, (..., Z), in float32."""
    mean, log_var = mean.float(), log_var.float()
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


def draw_latent(mean: Tensor, log_var: Tensor) -> Tensor:
    """A draw from N(mean, exp(log_var)) with a gradient to both, (..., Z)."""
    return mean + (0.5 * log_var).exp() * torch.randn_like(mean)


def _flat(frame: Tensor) -> Tensor:
    """(..., C, H, W) -> (B, C, H, W), channels-last: on a CPU the convolutions are faster so."""
    return frame.reshape(-1, *frame.shape[-3:]).contiguous(memory_format=torch.channels_last)


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
    """64x64 frames to Z Gaussians and back; with 32 channels and Z = 32 the paper's net of 4,348,547 parameters.

    Raises ValueError for frames of another size.
    """

    def __init__(self, frame: tuple[int, int, int], z: int, channels: int = 32) -> None:
        super().__init__()
        c, n = check_frame(frame), channels
        self.convs = nn.Sequential(
            nn.Conv2d(c, n, 4, 2), nn.ReLU(), nn.Conv2d(n, 2 * n, 4, 2), nn.ReLU(),
            nn.Conv2d(2 * n, 4 * n, 4, 2), nn.ReLU(), nn.Conv2d(4 * n, 8 * n, 4, 2), nn.ReLU(),
        )  # fmt: skip
        self.mean = nn.Linear(DEEP * n, z)
        self.log_var = nn.Linear(DEEP * n, z)
        self.inp = nn.Linear(z, DEEP * n)
        self.deconvs = nn.Sequential(
            _OnePixelDeconv(DEEP * n, 4 * n, 5, 2), nn.ReLU(), nn.ConvTranspose2d(4 * n, 2 * n, 5, 2), nn.ReLU(),
            nn.ConvTranspose2d(2 * n, n, 6, 2), nn.ReLU(), nn.ConvTranspose2d(n, c, 6, 2),
        )  # fmt: skip
        _begin(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C, 64, 64) in [0, 1] -> mean and log-variance of the latent, (..., Z) each, float32."""
        deep = self.convs(_flat(frame)).permute(0, 2, 3, 1).flatten(1)
        mean, log_var = (part(deep).float().reshape(*frame.shape[:-3], -1) for part in (self.mean, self.log_var))
        return mean, log_var

    def decode(self, z: Tensor) -> Tensor:
        """(..., Z) -> (..., C, 64, 64) in [0, 1], float32."""
        deep = self.inp(z.reshape(-1, z.shape[-1]))
        frame = self.deconvs(deep).float().sigmoid()
        return frame.reshape(*z.shape[:-1], *frame.shape[1:])


class Discriminator(nn.Module):
    """Says whether a frame is real, in terms that a VAE-GAN measures likeness in.

    The convolutions of the encoder. Larsen et al. normalise over the batch; here every frame is judged alone. A norm
    over channels instead would blow up what is hardly there, and games are black in large parts.
    """

    def __init__(self, frame: tuple[int, int, int], channels: int = 32) -> None:
        super().__init__()
        c, n = check_frame(frame), channels
        self.inner = nn.Sequential(
            nn.Conv2d(c, n, 4, 2), nn.LeakyReLU(0.2),
            nn.Conv2d(n, 2 * n, 4, 2), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * n, 4 * n, 4, 2),
        )  # fmt: skip
        self.outer = nn.Sequential(nn.Conv2d(4 * n, 8 * n, 4, 2), nn.LeakyReLU(0.2))
        self.logit = nn.Linear(DEEP * n, 1)
        _begin(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C, 64, 64) in [0, 1] -> logit of being real (...), features of the third layer (..., 4 N * 6 * 6)."""
        lead = frame.shape[:-3]
        features = self.inner(_flat(frame))
        deep = self.outer(F.leaky_relu(features, 0.2)).permute(0, 2, 3, 1).flatten(1)
        return self.logit(deep).float().view(lead), features.float().reshape(*lead, -1)
