"""How alike two frames look to a network that learned to see on photographs: LPIPS (Zhang et al. 2018) and its
shift-tolerant variant (Ghildyal & Liu 2022).

The weights come from packages of others, which are only read and never imported. Shapes: B batch, C H W picture.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.errors import UserError

Kind = Literal["none", "st_lpips", "lpips"]

ST_LPIPS = "weights/vST0.0/alex_shift_tolerant.pth"
HEADS = "weights/v0.1/vgg.pth"
VGG16 = "vgg16-397923af.pth"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in [-1, 1], from ImageNet's statistics
TINY = 1e-20  # squared length of features; less than any that are not all zero


class Likeness(nn.Module):
    """Squared distance of two frames' features, each normalised over its channels and weighed by a head, summed.

    `taps` are the layers whose outputs are compared. Nothing here is trained.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, layers: nn.Sequential, taps: Mapping[int, int]) -> None:
        super().__init__()
        self.layers, self.taps = layers, tuple(taps)
        self.heads = nn.ParameterList(torch.empty(channels) for channels in taps.values())
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, frame: Tensor, target: Tensor) -> Tensor:
        """Frames (..., C, H, W) in [0, 1], gray or RGB -> (...), 0 where they are equal."""
        total = torch.zeros((), device=frame.device)
        for head, a, b in zip(self.heads, self._features(frame), self._features(target), strict=True):
            total = total + ((a - b).square() * head.view(-1, 1, 1)).sum(1).mean((-2, -1))
        return total.view(frame.shape[:-3])

    def _features(self, frame: Tensor) -> list[Tensor]:
        x = frame.reshape(-1, *frame.shape[-3:]).expand(-1, 3, -1, -1)
        x = (2 * x - 1 - self.shift) / self.scale
        found = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                wide = x.float()
                found.append(wide * (wide.square().sum(1, keepdim=True) + TINY).rsqrt())
        return found


class Blur(nn.Module):
    """Half the size after a small blur, so that a shift by one pixel changes little (Zhang 2019)."""

    filt: Tensor  # (C, 1, 3, 3)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def load(kind: Kind, device: torch.device) -> Likeness | None:
    """The network of that kind, on the device; None for "none".

    Raises UserError when its weights are not on this machine.
    """
    if kind == "none":
        return None
    return (_shift_tolerant() if kind == "st_lpips" else _vgg()).to(device)


def _shift_tolerant() -> Likeness:
    """AlexNet's convolutions at stride 1, each halving after a blur. Layers are numbered as in the file."""
    network = Likeness(
        nn.Sequential(
            nn.Conv2d(3, 64, 11, padding=2), Blur(64), nn.ReLU(),
            nn.MaxPool2d(3, 1), Blur(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, 1), Blur(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        ),
        {2: 64, 6: 192, 10: 384, 12: 256, 14: 256},
    )  # fmt: skip
    path = _inside("stlpips_pytorch", ST_LPIPS)
    if path is None:
        raise UserError(
            'perceptual=st_lpips reads the weights in the package stlpips-pytorch: pip install ".[st_lpips]".'
        )
    state = _read(path)
    return _filled(network, {re.sub(r"^net\.slice\d\.", "layers.", key): value for key, value in state.items()}, path)


def _vgg() -> Likeness:
    """VGG16 as torchvision numbers its layers, and LPIPS's heads, version 0.1."""
    sizes = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: half the size
    layers: list[nn.Module] = []
    channels = 3
    for size in sizes:
        layers += [nn.Conv2d(channels, size, 3, padding=1), nn.ReLU()] if size else [nn.MaxPool2d(2)]
        channels = size or channels
    network = Likeness(nn.Sequential(*layers), {3: 64, 8: 128, 15: 256, 22: 512, 29: 512})
    heads, trunk = _inside("lpips", HEADS), Path(torch.hub.get_dir()) / "checkpoints" / VGG16
    if heads is None:
        raise UserError('perceptual=lpips reads the heads in the package lpips: pip install ".[lpips]".')
    if not trunk.is_file():
        raise UserError(
            f"perceptual=lpips reads torchvision's VGG16, which is not at {trunk}: load it once with "
            "python -c \"from torchvision.models import vgg16; vgg16(weights='IMAGENET1K_V1')\"."
        )
    features = {key.replace("features.", "layers."): value for key, value in _read(trunk).items() if "features" in key}
    return _filled(network, features | _read(heads), trunk)


def _inside(package: str, name: str) -> Path | None:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    paths = [Path(folder) / name for folder in (found.submodule_search_locations or ())] if found else []
    return next((path for path in paths if path.is_file()), None)


def _read(path: Path) -> dict[str, Tensor]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _filled(network: Likeness, state: dict[str, Tensor], path: Path) -> Likeness:
    """The network with these weights; heads are named lin0.model.1.weight (1, C, 1, 1) and so on."""
    heads = {f"heads.{i}": state.pop(f"lin{i}.model.1.weight", torch.empty(0)).flatten() for i in range(5)}
    scaling = {"shift": network.shift, "scale": network.scale}
    named = {key: value for key, value in state.items() if key.startswith("layers.")}
    try:
        network.load_state_dict(named | heads | scaling)
    except RuntimeError as problem:
        raise UserError(f"{path} does not hold the weights of a perceptual network.") from problem
    return network
