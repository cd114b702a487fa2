"""A screen and a run that keep to themselves, for what is measured and not kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


class Phases:
    """A screen that only counts the seconds of each phase."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self.name, self._sync, self._entered = "start", sync, time.perf_counter()

    def phase(self, name: str) -> None:
        self._sync()  # what was launched belongs to the phase that launched it
        now = time.perf_counter()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self._entered
        self.name, self._entered = name, now

    def update(self, step: int, **values: float | str | None) -> None: ...
    def episode(self, ret: float, length: int) -> None: ...


class Nowhere:
    """A run that is not written."""

    def log(self, step: int, scalars: dict[str, float]) -> None: ...
    def picture(self, step: int, name: str, image: np.ndarray) -> None: ...
    def reconstructions(self, step: int, updates: int, frames: np.ndarray) -> None: ...
    def video(self, step: int, name: str, frames: np.ndarray, fps: float = 15) -> None: ...
    def save_checkpoint(self, state: dict[str, Any], step: int) -> None: ...
