"""What the loop is given: the run's folder, the person at the terminal, the policy's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np


class Logger(Protocol):
    """Where a run is written; `runs.folder.run.Run` is one."""

    def log(self, step: int, scalars: dict[str, float]) -> None: ...
    def picture(self, step: int, name: str, image: np.ndarray) -> Any: ...
    def reconstructions(self, step: int, updates: int, frames: np.ndarray) -> Any: ...
    def video(self, step: int, name: str, frames: np.ndarray, fps: float = 15) -> Any: ...
    def save_checkpoint(self, state: dict[str, Any], step: int) -> Any: ...


class Screen(Protocol):
    """What tells a person; `runs.folder.progress.Progress` is one."""

    def phase(self, name: str) -> None: ...
    def update(self, step: int, **values: float | str | None) -> None: ...  # None removes a value
    def episode(self, ret: float, length: int) -> None: ...


class ImaginationConfig(Protocol):
    """How the policy's dreams are made; the policy's own configuration says it."""

    @property
    def starts(self) -> int: ...
    @property
    def horizon(self) -> int: ...
    @property
    def temperature(self) -> float: ...


class Context(NamedTuple):
    """Where a training run reports, and who may ask it to stop."""

    run: Logger
    screen: Screen
    asked_to_stop: Callable[[], bool]
