"""What every test may count on: one torch thread, no window, no sound."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
torch.set_num_threads(1)
