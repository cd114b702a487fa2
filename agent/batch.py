"""Segments of episodes, cut out and laid side by side: the trainer's batches.

B segments, T indices each, C H W picture, A action size. Index t means what the timeline in `envs/episode.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from envs.episode import Episode
from envs.spec import Spec
from world_model.interface import Batch


def cut(
    episodes: Sequence[Episode], starts: Sequence[int], length: int, *, spec: Spec, codes: Sequence[np.ndarray] = ()
) -> Batch:
    """One segment of `length` indices from each episode, beginning at its start and padded behind its end.

    `codes` holds, for each of them, what stands for its frames: (frames of the episode, ...).
    """
    size = (len(episodes), length)
    batch = Batch(
        frame=torch.from_numpy(np.empty((*size, *episodes[0].frame.shape[1:]), episodes[0].frame.dtype)),
        action=torch.zeros(size, dtype=torch.int64) if spec.discrete else torch.zeros((*size, spec.action_size)),
        reward=torch.zeros(size),
        terminated=torch.zeros(size, dtype=torch.bool),
        has_action=torch.zeros(size, dtype=torch.bool),
        valid=torch.zeros(size, dtype=torch.bool),
        code=torch.zeros((*size, *codes[0].shape[1:]), dtype=torch.from_numpy(codes[0]).dtype) if codes else None,
        is_first=torch.tensor(
            [start == 0 and one.piece_of < 0 for one, start in zip(episodes, starts, strict=True)], dtype=torch.bool
        ),
    )
    frame, action, reward, terminated, has_action, valid = (tensor.numpy() for tensor in batch[:6])
    for b, (episode, start) in enumerate(zip(episodes, starts, strict=True)):
        frames, steps = min(length, len(episode.frame) - start), min(length, len(episode) - start)
        frame[b, :frames] = episode.frame[start : start + frames]
        frame[b, frames:] = 0
        valid[b, :frames] = True
        action[b, :steps] = episode.action[start : start + steps]
        reward[b, :steps] = episode.reward[start : start + steps]
        terminated[b, :steps] = episode.terminated[start : start + steps]
        has_action[b, :steps] = True
        if batch.code is not None:
            batch.code[b, :frames] = torch.from_numpy(codes[b][start : start + frames])
    return batch
