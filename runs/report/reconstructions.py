"""The same frames of the real game over the course of training: what a model learns to see, and in which order.

The loop writes them (`agent.loop.Loop.reconstruct`): after 1, 2, 4, 8, ... updates and with every video of a dream.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from agent.dream_video import FIXED
from runs.folder.files import write_png
from runs.folder.run import Run
from runs.report.diagnostics import table

MOMENTS = 12  # at most


def draw_reconstructions(run: Run) -> Path | None:
    """Draws the real frames beside what each of up to MOMENTS moments made of them; returns the file.

    None for a run without such moments: of an older program, of a model without pictures, of PPO.
    """
    found = {int(path.stem.split("-")[1]): path for path in sorted(run.reconstructions_folder.glob("*.png"))}
    if not found:
        return None
    updates = spread(sorted(found))
    pairs = [_read(found[count]) for count in updates]  # (N, H, 2 W, 3)
    width = pairs[-1].shape[2] // 2
    columns = [pairs[-1][:, :, :width], *(pair[:, :, width:] for pair in pairs)]
    names = ["real", *(f"{count:,} update{'s'[: count > 1]}" for count in updates)]
    image = table([*np.stack(columns, 1)], [f"frame {i + 1}" for i in range(FIXED)], names)
    path = run.folder / "pictures" / "reconstructions.png"
    write_png(path, image)
    return path


def spread(updates: list[int]) -> list[int]:
    """Up to MOMENTS of ascending counts of updates, the first and the last among them, evenly by their cube root.

    Evenly by distance, background and bars would be there in the second one; by ratio, half of all would be noise.
    """
    root, kept = np.cbrt(updates), [0]
    for aim in np.linspace(root[0], root[-1], min(MOMENTS, len(updates)))[1:]:
        later = kept[-1] + 1
        kept.append(later + int(np.abs(root[later:] - aim).argmin()) if later < len(updates) else kept[-1])
    return [updates[i] for i in sorted({*kept, len(updates) - 1})]


def _read(path: Path) -> np.ndarray:
    """(N, H, 2 W, 3) uint8, as `agent.dream_video.reconstruct` made it."""
    image = cv2.imread(str(path))
    assert image is not None, path
    return image[..., ::-1].reshape(FIXED, -1, *image.shape[1:])
