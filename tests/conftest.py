"""What every test may count on: one torch thread, no window, no sound."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.opened import OPENED

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _close_games() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()
