"""Checkpoints: written whole or not at all, two kept, read without running any code from the file."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from envs.episode import DAMAGE
from envs.errors import UserError
from runs.folder.files import write_atomic

KEPT = 2


def save(folder: Path, step: int, content: dict[str, Any]) -> Path:
    """Writes the checkpoint of this step and drops all but the newest two.

    `content` holds tensors, numbers, strings, bytes, lists and dicts, nothing else.
    """
    path = folder / f"{step:012d}.pt"
    buffer = io.BytesIO()  # torch hides the reason when its own writing fails, as on a full disk
    torch.save(content, buffer)
    write_atomic(path, buffer.getbuffer())
    for old in _newest_first(folder)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def load(folder: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Any], list[str]]:
    """The newest checkpoint that can be read, and a sentence for each newer one that could not.

    Raises:
        UserError: there is none, none is readable, or one holds objects that only running code could rebuild.
    """
    said: list[str] = []
    paths = _newest_first(folder)
    if not paths:
        raise UserError(f"{folder.parent} has no checkpoint yet: start the run again.")
    for path in paths:
        try:
            return _read(path, device), said
        except _Corrupt as problem:
            said.append(f"{path} is corrupt ({problem}); the one before it is used.")
    raise UserError(f"No checkpoint in {folder} can be read: {', '.join(path.name for path in paths)} corrupt.")


def drop_after(folder: Path, step: int) -> None:
    """Removes the checkpoints of later steps: unreadable ones that would otherwise be taken for the newest again."""
    for path in _newest_first(folder):
        if int(path.stem) > step:
            path.unlink(missing_ok=True)


def there(folder: Path) -> bool:
    """Whether anything has been saved here: a run that was killed before has nothing to go on with."""
    return any(folder.glob("*"))


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, readable or not; None without one."""
    return next((int(path.stem) for path in _newest_first(folder)), None)


class _Corrupt(Exception):
    pass


def _newest_first(folder: Path) -> list[Path]:
    numbered = [path for path in folder.glob("*.pt") if path.stem.isdigit()]
    return sorted(numbered, key=lambda path: int(path.stem), reverse=True)


def _read(path: Path, device: str | torch.device) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the checksums that it wrote
            broken = archive.testzip()
    except DAMAGE as problem:
        raise _Corrupt("not a complete file") from problem
    if broken is not None:
        raise _Corrupt("its checksums do not fit")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as problem:
        text = (
            f"{path} holds more than tensors and plain values: it is no checkpoint of this program and is not loaded."
        )
        raise UserError(text) from problem
    except DAMAGE as problem:
        raise _Corrupt("torch cannot read it") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint of this program.")
    state = content.get("state")
    if isinstance(state, dict) and not _finite(state.get("agent")):
        raise _Corrupt("some of its weights are no numbers")
    return content


def _finite(value: Any) -> bool:
    """Whether all weights in nested dicts are numbers."""
    if isinstance(value, dict):
        return all(_finite(part) for part in value.values())
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(value.isfinite().all())
