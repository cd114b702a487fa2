"""What a world model and a policy must know about a game: the shape of its pictures and of its actions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """`frame` is (C, H, W) of uint8; `action_size` counts the choices (discrete) or the dimensions (continuous)."""

    frame: tuple[int, int, int]
    action_size: int
    discrete: bool
