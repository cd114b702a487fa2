"""Pictures for people: the real game, its reconstruction, and the dream under the same actions.

Shapes: B rows, T frames, N frames of the replay, C H W picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from agent.replay import Replay
from world_model.interface import WorldModel, to_pixels, to_unit
from world_model.noise import forked_rng

if TYPE_CHECKING:
    from agent.context import Logger


# Of a real segment (1, T, C, H, W) in [0, 1], its actions (1, T[, A]), and N frames from all over the replay.
Diagnostics = Callable[[WorldModel, torch.Tensor, torch.Tensor, torch.Tensor], dict[str, np.ndarray]]
GAP = 4  # white pixels between the pictures of a strip
FRAMES = 256  # of the replay, for diagnostics
FIXED = 10  # frames that are reconstructed again and again


def no_diagnostics(
    model: WorldModel, frame: torch.Tensor, action: torch.Tensor, frames: torch.Tensor
) -> dict[str, np.ndarray]:
    """Nothing beside the dream."""
    return {}


class Comparison(NamedTuple):
    """The same actions three times; (B, T, C, H, W) in [0, 1] each."""

    real: torch.Tensor
    reconstruction: torch.Tensor
    dream: torch.Tensor  # the first `context` frames are reconstructions


@torch.no_grad()
def compare(model: WorldModel, frame: torch.Tensor, action: torch.Tensor, context: int) -> Comparison:
    """Real segments (B, T, ...), what the latents keep of them, and what is dreamed on after `context` frames."""
    real = to_unit(frame)
    state = model.start(real[:, :1])
    followed = dreamed = [model.picture(state)]
    for t in range(1, real.shape[1]):
        if t == context:
            dream, dreamed = state, list(followed)
        if t >= context:
            dream = model.step(dream, action[:, t - 1]).state
            dreamed.append(model.picture(dream))
        state = model.step(state, action[:, t - 1], real[:, t]).state
        followed.append(model.picture(state))
    return Comparison(real, *(torch.stack(pictures, 1).float() for pictures in (followed, dreamed)))


def side_by_side(seen: Comparison, row: int, scale: int = 3) -> np.ndarray:
    """Video frames (T, H, 3 W, 3) of one row: real, reconstruction, dream, with a thin line between them."""
    parts = [to_pixels(part[row]).repeat(scale, 1).repeat(scale, 2) for part in seen]
    line = np.full((*parts[0].shape[:2], 2, 3), 255, np.uint8)
    return np.concatenate([parts[0], line, parts[1], line, parts[2]], 2)


def strip(seen: Comparison, row: int, count: int = 8, scale: int = 2) -> np.ndarray:
    """A picture (3 rows, `count` columns) of evenly spaced moments: real above, reconstruction, dream below."""
    times = np.linspace(0, seen.real.shape[1] - 1, count).astype(int)
    pictures = [to_pixels(part[row, times]).repeat(scale, 1).repeat(scale, 2) for part in seen]
    framed = [np.pad(one, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for one in pictures]
    return np.concatenate([np.concatenate(list(one), 1) for one in framed], 0)


def show_dream(
    model: WorldModel, replay: Replay, run: Logger, diagnostics: Diagnostics, *, step: int, context: int = 8,
    length: int = 72,
) -> None:  # fmt: skip
    """Writes a video and pictures of one segment, held out where there is one, at the run's `step`.

    Leaves every generator as it was.

    Of a model without pictures there is nothing to be seen but its `diagnostics`, which get a real segment
    (1, T, C, H, W) in [0, 1], without padding, its actions, and frames (N, C, H, W) from all over the replay.
    """
    split: Any = "validation" if replay.frames("validation") > length else "train"
    before, device = replay.rng.bit_generator.state, next(model.parameters()).device
    batch = replay.sample(1, length, split=split).to(device)
    frames = replay.sample(FRAMES, 1).frame[:, 0].to(device)
    replay.rng.bit_generator.state = before
    with forked_rng(device):
        watched = model.decode(model.start(to_unit(batch.frame[:, :1]))) is not None
        seen = compare(model, batch.frame, batch.action, context) if watched else None
        real = slice(int(batch.valid.sum()))  # a short episode is padded
        pictures = diagnostics(model, to_unit(batch.frame[:, real]), batch.action[:, real], to_unit(frames))
    if seen is not None:
        run.video(step, "dream", side_by_side(seen, 0))
        run.picture(step, "dream", strip(seen, 0))
    for name, image in pictures.items():
        run.picture(step, name, image)


def fixed_frames(replay: Replay, seed: int) -> torch.Tensor:
    """FIXED frames, each after the one before it (itself, of an episode's first), (N, 2, C, H, W) uint8.

    One of each tenth of the replay; the seed and what was played decide which.
    """
    episodes = [episode.frame for episode in replay.memory().values()]
    ends = np.cumsum([len(frames) for frames in episodes])
    bounds = np.linspace(0, ends[-1], FIXED + 1)
    chosen = np.random.default_rng(seed).uniform(bounds[:-1], bounds[1:]).astype(int)
    places = np.searchsorted(ends, chosen, side="right")
    now = [(episodes[i], int(t - ends[i] + len(episodes[i]))) for i, t in zip(places, chosen, strict=True)]
    return torch.from_numpy(np.stack([frames[[max(t - 1, 0), t]] for frames, t in now]))


@torch.no_grad()
def reconstruct(model: WorldModel, frame: torch.Tensor) -> np.ndarray | None:
    """Frames (N, C, H, W) uint8 and what the model makes of each, (N, H, 2 W, 3) uint8: real left, shown right.

    Each alone, or as pairs (N, 2, C, H, W) with those before them, which only who encodes pairs looks at.

    None for a model without pictures. Leaves the default generators as they were.
    """
    device = next(model.parameters()).device
    real = to_unit(frame.to(device))
    with forked_rng(device):
        shown = model.reconstruct(real if real.dim() == 5 else real.unsqueeze(1))
    real = real if real.dim() == 4 else real[:, -1]
    return None if shown is None else np.concatenate([to_pixels(real), to_pixels(shown.float())], 2)
