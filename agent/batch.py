"""Segments of episodes, side by side: what the trainer eats.

B segments, T indices each, C H W picture, A action size. Index t means what the timeline in `envs/episode.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from envs.episode import Episode
from envs.spec import Spec


class Batch(NamedTuple):
    """B segments of T consecutive indices."""

    frame: torch.Tensor  # (B, T, C, H, W) uint8; zeros where not valid
    action: torch.Tensor  # (B, T) int64 or (B, T, A) float32 in [-1, 1]; zeros where not acted
    reward: torch.Tensor  # (B, T) float32
    terminated: torch.Tensor  # (B, T) bool
    acted: torch.Tensor  # (B, T) bool: there is an action, and reward and terminated are what it brought
    valid: torch.Tensor  # (B, T) bool: the frame is real; padding comes only at the end of too short an episode
    weight: torch.Tensor  # (B,) float32: the episodes' weights, which have already made them more frequent here

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def cut(episodes: Sequence[Episode], starts: Sequence[int], length: int, *, spec: Spec) -> Batch:
    """One segment of `length` indices from each episode, beginning at its start and padded behind its end."""
    size = (len(episodes), length)
    batch = Batch(
        frame=torch.empty((*size, *spec.frame), dtype=torch.uint8),
        action=torch.zeros(size, dtype=torch.int64) if spec.discrete else torch.zeros((*size, spec.action_size)),
        reward=torch.zeros(size),
        terminated=torch.zeros(size, dtype=torch.bool),
        acted=torch.zeros(size, dtype=torch.bool),
        valid=torch.zeros(size, dtype=torch.bool),
        weight=torch.tensor([episode.weight for episode in episodes], dtype=torch.float32),
    )
    frame, action, reward, terminated, acted, valid, _ = (tensor.numpy() for tensor in batch)
    for b, (episode, start) in enumerate(zip(episodes, starts, strict=True)):
        frames, steps = min(length, len(episode.frame) - start), min(length, len(episode) - start)
        frame[b, :frames] = episode.frame[start : start + frames]
        frame[b, frames:] = 0
        valid[b, :frames] = True
        action[b, :steps] = episode.action[start : start + steps]
        reward[b, :steps] = episode.reward[start : start + steps]
        terminated[b, :steps] = episode.terminated[start : start + steps]
        acted[b, :steps] = True
    return batch
