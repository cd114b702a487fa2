"""Recordings: an mp4 (H.264) that grows picture by picture, and one of a session without any display."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import imageio_ffmpeg
import numpy as np

from play.session import GameSession

HEIGHT, GAP = 256, 8  # pixels of a picture on film, and between two
BACKDROP = 16  # gray value


class Film:
    """A video that appears under its name when it is complete, or not at all."""

    def __init__(self, path: Path, fps: float) -> None:
        """Nothing is written before the first picture, which decides the size."""
        self.path, self.fps = path, fps
        self.shape: tuple[int, ...] | None = None
        self._rest = path.with_name(f"{path.stem}.tmp.mp4")
        self._writer: Any = None
        self._added = 0

    def add(self, picture: np.ndarray) -> None:
        """One picture (H, W, 3) uint8 more, of even height and width, the same for all.

        Raises OSError where the file cannot be written.
        """
        if self._writer is None:
            self.shape = picture.shape
            self._open(picture.shape[1], picture.shape[0])
        assert picture.shape == self.shape
        try:
            self._writer.send(np.ascontiguousarray(picture))
        except StopIteration:  # of a writer that has failed before
            raise OSError(errno.EIO, "ffmpeg has ended", str(self.path)) from None
        except OSError as problem:
            raise self._explained(problem) from None
        self._added += 1

    def close(self) -> Path | None:
        """Completes the file; None when there was no picture. Raises OSError when it could not be written."""
        if self._writer is None:
            return None
        writer, self._writer = self._writer, None
        try:
            writer.close()
            if (found := _length(self._rest)) != self._added:  # ffmpeg's own exit code is not to be had
                raise OSError(errno.EIO, f"ffmpeg wrote {found} of {self._added} pictures", str(self.path))
            os.replace(self._rest, self.path)
        except OSError as problem:
            raise self._explained(problem) from None
        finally:
            self._rest.unlink(missing_ok=True)
        return self.path

    def discard(self) -> None:
        """Gives up and leaves no file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._rest.unlink(missing_ok=True)

    def _open(self, width: int, height: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            open(self._rest, "wb").close()  # noqa: SIM115  ffmpeg would tell in pages why it cannot
        except FileNotFoundError as problem:
            raise PermissionError(errno.EACCES, "no file can be made there", str(self.path)) from problem
        options = ["-crf", "18", "-preset", "veryfast", "-movflags", "+faststart"]
        self._writer = imageio_ffmpeg.write_frames(
            str(self._rest), (width, height), fps=self.fps, codec="libx264", macro_block_size=1, quality=None,
            output_params=options,
        )  # fmt: skip
        self._writer.send(None)

    def _explained(self, problem: OSError) -> OSError:
        # ffmpeg is a process of its own: a full disk arrives as a broken pipe with the reason in its text.
        full = "No space left" in str(problem)
        return OSError(errno.ENOSPC, "No space left on device", str(self.path)) if full else problem


def _length(path: Path) -> int:
    """Pictures of a video, by its index, which is written last; 0 where there is none."""
    if not path.exists() or not path.stat().st_size:
        return 0
    video = cv2.VideoCapture(str(path))
    try:
        return int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
    finally:
        video.release()


class Recorder:
    """What a visitor records: videos of all that is shown, and the real game as a person played it."""

    def __init__(self, session: GameSession, videos: Path, episodes: Path | None) -> None:
        """`videos` and `episodes` are folders; without the latter no episode is kept."""
        self.session, self.videos, self.episodes = session, videos, episodes
        self._film: Film | None = None

    def start(self) -> None:
        """Begins a video."""
        self.session.record(True)

    def add(self) -> list[Path]:
        """Takes in the present moment, while recording; returns the files that this has completed.

        Raises OSError where one cannot be written: `fail` ends the recording then.
        """
        if not self.session.recording:
            return []
        done = self._saved()
        picture = panel(self.session.now.pictures())
        if self._film is not None and self._film.shape not in (None, picture.shape):
            done += self._finished()  # another mode has another shape, and so another video
        if self._film is None:
            self._film = Film(self.videos / f"{_stamp()}.mp4", self.session.fps)
        self._film.add(picture)
        return done

    def stop(self) -> list[Path]:
        """Ends the recording; returns the files that this has completed. Raises OSError where one cannot be written."""
        self.session.record(False)
        try:
            done = self._saved()
        finally:
            film = self._finished()
        return done + film

    def fail(self, problem: OSError) -> str:
        """Ends a recording that cannot be written; returns the sentence that says so.

        Its video is lost, what a person played is saved with the next recording.
        """
        self.session.record(False)
        film, self._film = self._film, None
        if film is not None:
            film.discard()
        return f"The recording cannot be written: {problem.strerror or problem}."

    def _finished(self) -> list[Path]:
        film, self._film = self._film, None
        path = film.close() if film is not None else None
        return [] if path is None else [path]

    def _saved(self) -> list[Path]:
        saved = []
        while self.session.episodes:
            episode = self.session.episodes[-1]
            if self.episodes is not None:
                self.episodes.mkdir(parents=True, exist_ok=True)
                path = self.episodes / f"{_stamp()}.npz"
                episode.save(path)
                saved.append(path)
            self.session.episodes.pop()
        return saved


def panel(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) side by side, enlarged by a whole factor to about 256 high, with even sides."""
    parts: list[np.ndarray] = []
    for picture in map(enlarged, pictures.values()):
        gap = np.full((picture.shape[0], GAP, 3), BACKDROP, np.uint8)
        parts += [*([gap] if parts else []), picture]
    return even(np.concatenate(parts, 1))


def enlarged(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) by a whole factor to about 256 high: 64 pixels are a stamp on a screen."""
    factor = max(1, HEIGHT // picture.shape[0])
    return picture.repeat(factor, 0).repeat(factor, 1)


def even(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) with even sides, as H.264's yuv420p needs."""
    return np.pad(picture, ((0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)), mode="edge")


def film(
    session: GameSession, path: Path, steps: int, tell: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Plays `steps` steps without a display and films them; returns what happened, as plain JSON values."""
    video, began = Film(path, session.fps), time.perf_counter()
    total, games, side = 0.0, 1, "dream" if session.now.real is None else "real"
    try:
        video.add(panel(session.now.pictures()))
        for done in range(steps):
            session.step()
            video.add(panel(session.now.pictures()))
            if session.now.step:
                total += session.to_dict()["views"][side]["reward"] or 0.0
            else:
                games += 1
            tell(done + 1)
        video.close()
    finally:
        video.discard()
    seconds = time.perf_counter() - began
    return {"steps": steps, "games": games, "reward": round(total, 2), "steps_per_second": round(steps / seconds, 1)}


def _stamp() -> str:
    """A name that sorts by time and is not given twice."""
    seconds, rest = divmod(time.time_ns(), 10**9)
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(seconds)) + f"-{rest:09d}"
