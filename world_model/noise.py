"""The random numbers of a dream: torch's own, or, for a graph that is exported, numbers that come in from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor


class Numbers:
    """Random numbers to be taken in the order in which they are asked for.

    Attributes:
        taken: how many of each kind have been asked for: of uniform ones in [0, 1) and of normal ones.
    """

    def __init__(self, uniform: Tensor | None = None, normal: Tensor | None = None) -> None:
        """uniform (U,) and normal (N,); None draws them from torch's generator, so that they are only counted."""
        self._given = {"uniform": uniform, "normal": normal}
        self.taken = {"uniform": 0, "normal": 0}

    def take(self, kind: str, shape: torch.Size, device: torch.device) -> Tensor:
        """The next numbers, in this shape."""
        count, at, given = prod(shape), self.taken[kind], self._given[kind]
        self.taken[kind] = at + count
        if given is None:
            return _drawn(kind, shape, device)
        return given[at : at + count].reshape(shape)


_numbers: Numbers | None = None  # a plain name: torch.compile reads no context variable


@contextmanager
def from_outside(numbers: Numbers) -> Iterator[Numbers]:
    """Within it `uniform` and `normal` take these numbers instead of torch's."""
    global _numbers
    before, _numbers = _numbers, numbers
    try:
        yield numbers
    finally:
        _numbers = before


@contextmanager
def forked_rng(device: torch.device | str = "cpu") -> Iterator[None]:
    """Leaves torch's generators as they were: the processor's and the device's. torch alone would touch every GPU."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def uniform(shape: torch.Size, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float32."""
    return _drawn("uniform", shape, device) if _numbers is None else _numbers.take("uniform", shape, device)


def normal(like: Tensor) -> Tensor:
    """Standard normal numbers in the shape and type of `like`."""
    if _numbers is None:
        return torch.randn_like(like)
    return _numbers.take("normal", like.shape, like.device).to(like.dtype)


def _drawn(kind: str, shape: torch.Size, device: torch.device) -> Tensor:
    return torch.rand(shape, device=device) if kind == "uniform" else torch.randn(shape, device=device)
