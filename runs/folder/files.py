"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from envs.episode import sync_folder


def file_name(text: str) -> str:
    """A game's or a recipe's name as part of a file's: "ALE/Pong-v5" and "my_games:Dodge-v0" with hyphens."""
    return text.replace("/", "-").replace(":", "-")


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Writes a temporary file, syncs it, then gives it its name; an error leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = path.with_name(path.name + ".tmp")
    try:
        with open(rest, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(rest, path)
        sync_folder(path.parent)  # so that the name, too, survives a power cut
    finally:
        rest.unlink(missing_ok=True)


TEMPORARY = (".recorded-", ".weights-")  # folders within a run's, as long as one process works


class Lock:
    """A file that one process holds; whatever ends the process sets it free. Where its disk knows no locks, nothing.

    Raises BlockingIOError when another one, or another Lock of this process, holds it.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a")  # noqa: SIM115  held until it is released
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise
        except OSError:  # some network file systems have none
            pass

    def release(self) -> None:
        """Lets others have it."""
        self._file.close()


def remove_leftovers(folder: Path) -> None:
    """Deletes unfinished files of a run that trained here and was killed; nothing in a folder that is no run's.

    What others write there without the run's lock (recordings, evaluations, exports) is left alone.
    """
    if not (folder / "config.json").exists():
        return
    drafts = [folder / f"{name}.tmp" for name in ("config.json", "meta.json", "metrics.jsonl")]
    for place, pattern in (("checkpoints", "*.pt.tmp"), ("episodes", ".*.npz.tmp"), ("pictures", "*.png.tmp"),
                           ("reconstructions", "*.png.tmp"), ("videos", "dream-*.tmp.mp4")):  # fmt: skip
        drafts += (folder / place).glob(pattern)
    for path in drafts:
        if path.is_file():
            path.unlink(missing_ok=True)
    for prefix in TEMPORARY:
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes (H, W, 3) uint8 as PNG, atomically; raises OSError when it cannot be encoded."""
    done, data = cv2.imencode(".png", np.ascontiguousarray(image[..., ::-1]))
    if not done:
        raise OSError(f"{path} could not be encoded.")
    write_atomic(path, data.tobytes())


def write_figure(path: Path, figure: Any) -> None:
    """Writes a matplotlib figure as PNG, atomically."""
    data = io.BytesIO()
    figure.savefig(data, dpi=110)
    write_atomic(path, data.getvalue())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes indented JSON atomically; numbers that are not finite become null."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    write_atomic(path, text.encode())


def plain(value: Any) -> Any:
    """Values as JSON knows them: arrays become lists, numpy's numbers Python's, nan and inf None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
