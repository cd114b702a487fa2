"""Videos that every browser plays."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

from runs.files import adopt

SHOWN = 256  # pixels: smaller pictures are enlarged by a whole factor, because 64 pixels are a stamp on a screen


def write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Writes (T, H, W, 3) uint8 frames as H.264 in yuv420p, atomically.

    Pictures lower than 256 pixels are enlarged by a whole factor; odd sizes are padded to even ones, as yuv420p needs.

    Raises:
        ValueError: no frames, or another shape or type.
        OSError: ffmpeg could not write the file.
    """
    check_pictures(frames, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = enlarge(frames[0]).shape[:2]
    rest = path.with_name(path.stem + ".tmp.mp4")
    writer = imageio_ffmpeg.write_frames(
        str(rest),
        (width, height),
        fps=fps,
        codec="libx264",
        macro_block_size=1,
        quality=None,
        output_params=["-crf", "18", "-preset", "veryfast", "-movflags", "+faststart"],
    )
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(enlarge(frame)))
        writer.close()
        if not rest.exists() or rest.stat().st_size == 0:
            raise OSError(f"ffmpeg wrote no video to {path}.")
        adopt(rest, path)
    except OSError as problem:
        # ffmpeg is a process of its own: a full disk arrives as a broken pipe with the reason in its text.
        full = "No space left" in str(problem)
        raise OSError(errno.ENOSPC, "No space left on device", str(path)) if full else problem from None
    finally:
        writer.close()
        rest.unlink(missing_ok=True)


def gif(frames: np.ndarray, fps: float) -> bytes:
    """(T, H, W, 3) uint8 frames as an animated GIF: the one moving picture that TensorBoard shows."""
    pictures = [Image.fromarray(frame) for frame in frames]
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


def enlarge(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> the same picture, at least about 256 high, with even sides."""
    factor = max(1, SHOWN // frame.shape[0])
    frame = frame.repeat(factor, 0).repeat(factor, 1)
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
