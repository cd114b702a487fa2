"""Which game outputs are pictures, and their conversion for agents and films.

Shapes: H W picture.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from gymnasium import spaces

SMALLEST_PICTURE = 16  # pixels; a smaller array of bytes is a board or a memory, not a picture


def is_picture(space: spaces.Space[Any]) -> bool:
    """Whether observations are what this program takes as they are: (H, W), (H, W, 1) or (H, W, 3) uint8 of 0..255."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) not in (2, 3):
        return False
    channels = space.shape[2] if len(space.shape) == 3 else 1
    return channels in (1, 3) and min(space.shape[:2]) >= SMALLEST_PICTURE and _span(space) == (0, 255)


def could_be_picture(space: spaces.Space[Any]) -> bool:
    """Whether `as_picture` makes a picture of an observation: channels first, opacity, or numbers of a range."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3) or _span(space) is None:
        return False
    shape = space.shape if len(space.shape) == 2 or space.shape[2] in (1, 3, 4) else space.shape[1:]
    many = len(space.shape) == 3 and space.shape[2] not in (1, 3, 4) and space.shape[0] not in (1, 3)
    whole = np.issubdtype(space.dtype, np.integer) and _span(space) != (0, 255)  # what stands where on a board
    return not many and not whole and min(shape[:2]) >= SMALLEST_PICTURE


def as_picture(given: Any, space: spaces.Space[Any] | None = None) -> np.ndarray | None:
    """(H, W), (H, W, 1) or (H, W, 3) uint8 of what a game gives, or None where that is no picture.

    Channels may come first; a fourth one (opacity) is left out where they come last. Four first are no colours but a
    stack of frames, of which nobody says which is the newest. Floats are scaled from the range of their space, or
    without one from 0..1, and whole numbers are taken as they are.
    """
    try:
        array = np.asarray(given)
    except ValueError:  # lists of different lengths
        return None
    if array.ndim not in (2, 3) or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        return None
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        if array.shape[0] not in (1, 3) or min(array.shape[1:]) < SMALLEST_PICTURE:
            return None
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 4:
        array = array[..., :3]
    if array.dtype == np.uint8:
        return array
    if np.issubdtype(array.dtype, np.integer):
        return array.astype(np.uint8) if array.min() >= 0 and array.max() <= 255 else None
    low, high = (_span(space) if isinstance(space, spaces.Box) else None) or (0, 1)
    if array.dtype != bool and not (np.isfinite(array).all() and array.min() >= low and array.max() <= high):
        return None
    return ((array.astype(np.float32) - low) / (high - low) * 255).round().astype(np.uint8)


def is_colour(picture: np.ndarray) -> bool:
    return picture.ndim == 3 and picture.shape[2] == 3


def coloured(picture: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 1) or (H, W, 3) -> (H, W, 3)."""
    return picture if is_colour(picture) else np.repeat(picture.reshape(*picture.shape[:2], 1), 3, axis=2)


def part_with_picture(space: spaces.Space[Any]) -> tuple[str | None, spaces.Space[Any]] | None:
    """Where a picture is that `as_picture` takes: a key (None: it is the whole) and its space; None for nowhere."""
    if isinstance(space, spaces.Dict):
        named = [(name, one) for name, one in space.items() if is_picture(one) or could_be_picture(one)]
        return named[0] if len(named) == 1 else None
    return (None, space) if is_picture(space) or could_be_picture(space) else None


def framed(picture: np.ndarray, size: tuple[int, int], *, gray: bool) -> np.ndarray:
    """(H, W), (H, W, 1) or (H, W, 3) uint8 as an agent's frame of `size`, height and width: (C, h, w) uint8."""
    if gray:
        flat = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if is_colour(picture) else picture
        return _resized(flat.reshape(flat.shape[:2]), size)[None]
    return _resized(coloured(picture), size).transpose(2, 0, 1)


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) or (H, W, 3) to `size`, height and width."""
    if picture.shape[:2] == size:
        return picture
    return cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)  # OpenCV names the width first


def _span(space: spaces.Box) -> tuple[float, float] | None:
    """The least and the greatest number of a space that is bounded alike everywhere."""
    low, high = float(space.low.min()), float(space.high.max())
    alike = low == float(space.low.max()) and high == float(space.high.min())
    return (low, high) if alike and np.isfinite([low, high]).all() and low < high else None
