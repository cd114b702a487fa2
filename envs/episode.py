"""The record of one episode, while it is played, in memory and on disk.

    t          0        1        2     index t holds frame[t], the action[t] taken on seeing it, and what that
    frame      f0       f1       f2    action brought: reward[t], terminated[t], truncated[t].
    action       a0 ->    a1 ->        frame[t + 1] belongs to t + 1. An episode of n steps has n + 1 frames;
    reward       r0       r1           the last one has no action.

Shapes: n agent steps, C H W picture, A action size.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from envs.games import Transition
from envs.spec import Spec

FIRST_CAPACITY = 256  # steps; doubled whenever it is full, so the capacity depends on nothing but the length
# What Python's zip and numpy's array readers raise on bytes that nobody has written.
DAMAGE: tuple[type[Exception], ...] = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError)
DAMAGE += (LookupError, ValueError, TypeError, RuntimeError)
PER_STEP = ("action", "reward", "terminated", "truncated")


class CorruptEpisode(ValueError):
    """An episode file that cannot be trusted; the message is one sentence that names the file and the reason."""


@dataclass(eq=False)
class Episode:
    """One episode of n agent steps.

    frame (n + 1, C, H, W) uint8; action (n,) int64 or (n, A) float32 in [-1, 1]; reward (n,) float32 as the agent
    learns it; terminated and truncated (n,) bool; score: the sum in the game's own units since the game's reset; seed:
    what the game was reset with; weight: how much more often than an ordinary episode it is replayed; piece_of: -1 for
    an episode that begins with its game; a later piece of one that was too long for the memory (`agent.replay`) has the
    number of the first piece, what a person recorded from within a game the game's seed.
    """

    frame: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    score: float
    seed: int
    weight: float = 1.0
    piece_of: int = -1

    def __len__(self) -> int:
        """The number of agent steps, n."""
        return len(self.action)

    @property
    def nbytes(self) -> int:
        """Bytes of memory its arrays take."""
        return self.frame.nbytes + sum(getattr(self, name).nbytes for name in PER_STEP)

    def problem(self, spec: Spec | None = None) -> str:
        """What is wrong with its types and shapes (those of the game `spec`, when given), or "" when nothing is."""
        n, continuous = len(self.action), self.action.ndim == 2
        shapes = {"frame": (n + 1, *self.frame.shape[1:]), "action": (n, *self.action.shape[1:2])}
        if spec is not None:
            shapes = {"frame": (n + 1, *spec.frame), "action": (n,) if spec.discrete else (n, spec.action_size)}
        types = {"frame": np.uint8, "action": np.float32 if continuous else np.int64, "reward": np.float32}
        for name in ("frame", *PER_STEP):
            array, shape, kind = getattr(self, name), shapes.get(name, (n,)), np.dtype(types.get(name, np.bool_))
            if array.dtype != kind or array.shape != shape:
                return f"{name} is {array.dtype} {array.shape} and should be {kind} {shape}"
        if self.frame.ndim != 4:
            return f"frame has {self.frame.ndim} axes and should have 4"
        if not (np.isfinite(self.reward).all() and np.isfinite(self.score) and 0 < self.weight < np.inf):
            return "a reward, the score or the weight is not a usable number"
        choices = spec.action_size if spec is not None and spec.discrete else None
        if choices and n and not 0 <= self.action.min() <= self.action.max() < choices:
            return f"an action is outside 0..{choices - 1}"
        return ""

    def save(self, path: Path) -> None:
        """Write it, compressed, to `path`: either the whole file appears or none. `numpy.load` opens it too.

        Raises OSError (a full disk, for one), and leaves no partial file behind.
        """
        draft = path.with_name(f".{path.name}.tmp")
        try:
            with open(draft, "wb") as file:
                # Level 1 costs 7 us a 64x64 frame; level 6 more than doubles that to save a third of 80 bytes.
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                    for field in fields(self):
                        content = BytesIO()
                        np.lib.format.write_array(content, np.asarray(getattr(self, field.name)), allow_pickle=False)
                        entry = zipfile.ZipInfo(f"{field.name}.npy")  # a fixed date: equal episodes, equal files
                        entry.compress_type = zipfile.ZIP_DEFLATED
                        archive.writestr(entry, content.getbuffer(), compresslevel=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(path.parent)

    @staticmethod
    def load(path: Path) -> Episode:
        """Read one episode; every byte is checked against the checksums (CRC-32) in the file.

        Raises CorruptEpisode for a missing, truncated or altered file, and for arrays that do not fit together.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                # The whole member first: its checksum is compared only at its end, before anything is made of it.
                old = "piece_of.npy" not in archive.namelist()  # of a run from before it was told
                names = [field.name for field in fields(Episode) if not (old and field.name == "piece_of")]
                read = {name: _array(archive.read(f"{name}.npy")) for name in names}
            score, seed, weight = float(read.pop("score")), int(read.pop("seed")), float(read.pop("weight"))
            piece_of = int(read.pop("piece_of", -1))
            episode = Episode(**read, score=score, seed=seed, weight=weight, piece_of=piece_of)  # type: ignore[arg-type]
            problem = episode.problem()
        except FileNotFoundError:
            raise CorruptEpisode(f"{path} is missing.") from None
        except DAMAGE as error:
            raise CorruptEpisode(f"{path} is damaged ({str(error).rstrip('.') or type(error).__name__}).") from error
        if problem:
            raise CorruptEpisode(f"{path} is not a usable episode: {problem}.")
        return episode


def _own(episode: Episode) -> Episode:
    """The same with arrays of its own."""
    return replace(episode, **{name: getattr(episode, name).copy() for name in ("frame", *PER_STEP)})


def _array(content: bytes) -> np.ndarray:
    return np.lib.format.read_array(BytesIO(content), allow_pickle=False)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Recording:
    """An episode in progress: growing arrays, O(1) a step, readable at any moment."""

    def __init__(self, spec: Spec, frame: np.ndarray, *, seed: int):
        """`frame` (C, H, W) uint8 is the first one, straight from the reset with `seed`."""
        self.spec, self.seed, self.score, self.length, self.piece_of = spec, seed, 0.0, 0, -1
        kind, shape = (np.int64, ()) if spec.discrete else (np.float32, (spec.action_size,))
        self._columns: dict[str, np.ndarray] = {
            "frame": np.empty((FIRST_CAPACITY + 1, *spec.frame), np.uint8),
            "action": np.empty((FIRST_CAPACITY, *shape), kind),
            "reward": np.empty(FIRST_CAPACITY, np.float32),
            "terminated": np.empty(FIRST_CAPACITY, np.bool_),
            "truncated": np.empty(FIRST_CAPACITY, np.bool_),
        }
        self._columns["frame"][0] = self._checked(frame)
        self.nbytes = sum(column.nbytes for column in self._columns.values())  # of memory, free capacity included

    @staticmethod
    def resumed(spec: Spec, episode: Episode) -> Recording:
        """Go on recording where `episode` stops."""
        recording = Recording(spec, episode.frame[0], seed=episode.seed)
        recording._reserve(len(episode))
        recording.length, recording.score, recording.piece_of = len(episode), episode.score, episode.piece_of
        recording._columns["frame"][: len(episode) + 1] = episode.frame
        for name in PER_STEP:
            recording._columns[name][: len(episode)] = getattr(episode, name)
        return recording

    def __len__(self) -> int:
        """The number of agent steps so far."""
        return self.length

    def append(self, action: Any, step: Transition) -> None:
        """Add one action and what it brought; `step` holds one row's values (frame (C, H, W), the rest scalars)."""
        t = self.length
        self._reserve(t + 1)
        columns = self._columns
        columns["action"][t] = action
        columns["frame"][t + 1] = self._checked(step.frame)
        columns["reward"][t] = step.reward
        columns["terminated"][t] = step.terminated
        columns["truncated"][t] = step.truncated
        self.score += float(step.score)
        self.length = t + 1

    def view(self) -> Episode:
        """The episode so far; its arrays share memory with the recording."""
        frame, *steps = (self._columns[name] for name in ("frame", *PER_STEP))
        action, reward, terminated, truncated = (column[: self.length] for column in steps)
        columns = frame[: self.length + 1], action, reward, terminated, truncated
        return Episode(*columns, self.score, self.seed, piece_of=self.piece_of)

    def finish(self) -> Episode:
        """The whole episode with arrays of its own, free of spare capacity."""
        return _own(self.view())

    @property
    def full(self) -> bool:
        """Whether one more step doubles its memory."""
        return self.length == len(self._columns["action"])

    def cut(self, number: int) -> tuple[Episode, Recording]:
        """The older half as an episode of its own, with this number, and a recording that goes on with the newer one.

        The newer half begins with the frame that the older one ends with. Both have the score so far.
        """
        whole, at = self.view(), self.length - self.length // 2
        older = {"frame": whole.frame[: at + 1]} | {name: getattr(whole, name)[:at] for name in PER_STEP}
        newer = {"frame": whole.frame[at:]} | {name: getattr(whole, name)[at:] for name in PER_STEP}
        of = number if whole.piece_of < 0 else whole.piece_of
        return _own(replace(whole, **older)), Recording.resumed(self.spec, replace(whole, **newer, piece_of=of))

    def _checked(self, frame: np.ndarray) -> np.ndarray:
        # numpy would turn [0, 1] floats into a black picture, and stretch (H, W) over the channels, without a word.
        if frame.dtype != np.uint8 or frame.shape != self.spec.frame:
            raise ValueError(f"a frame is {frame.dtype} {frame.shape} and should be uint8 {self.spec.frame}")
        return frame

    def _reserve(self, steps: int) -> None:
        capacity = len(self._columns["action"])
        if steps <= capacity:
            return
        while capacity < steps:
            capacity *= 2
        for name, column in self._columns.items():
            grown = np.empty((capacity + (name == "frame"), *column.shape[1:]), column.dtype)
            grown[: len(column)] = column
            self._columns[name] = grown
        self.nbytes = sum(column.nbytes for column in self._columns.values())
