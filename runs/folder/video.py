"""Videos that every browser plays."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from play.film import Film, enlarged, even


def write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Writes (T, H, W, 3) uint8 frames as H.264 in yuv420p, atomically.

    Pictures lower than 256 pixels are enlarged by a whole factor; odd sizes are padded to even ones, as yuv420p needs.

    Raises:
        ValueError: no frames, or another shape or type.
        OSError: ffmpeg could not write the file.
    """
    check_pictures(frames, 4)
    film = Film(path, fps)
    try:
        for frame in frames:
            film.add(even(enlarged(frame)))
        film.close()
    finally:
        film.discard()


def gif(frames: np.ndarray, fps: float) -> bytes:
    """(T, H, W, 3) uint8 frames as an animated GIF: the one moving picture that TensorBoard shows."""
    # Each with 256 colours of its own, found by an octree: a tenth of the time that Pillow's median cut takes.
    pictures = [Image.fromarray(frame).quantize(method=Image.Quantize.FASTOCTREE) for frame in frames]
    file = io.BytesIO()
    duration = max(20, round(1000 / fps))  # milliseconds; browsers slow down anything faster
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return file.getvalue()


def check_pictures(pictures: np.ndarray, dimensions: int) -> None:
    """Raises ValueError unless `pictures` is a filled uint8 array (..., H, W, 3) with so many dimensions."""
    good = pictures.ndim == dimensions and pictures.shape[-1] == 3 and pictures.dtype == np.uint8 and pictures.size > 0
    if not good:
        shape = "(T, H, W, 3)" if dimensions == 4 else "(H, W, 3)"
        raise ValueError(f"expected {shape} uint8, got {pictures.shape} {pictures.dtype}")
