"""The record of an episode: its file is whole or absent, and nothing altered is ever used."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest

from envs.episode import FIRST_CAPACITY, CorruptEpisode, Episode, Recording
from tests import numbered
from tests.numbered import CONTINUOUS, DISCRETE


def same(a: Episode, b: Episode) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(Episode)]
    return all(np.array_equal(x, y) and np.asarray(x).dtype == np.asarray(y).dtype for x, y in pairs)


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_file_returns_the_same_episode(tmp_path: Path, spec: numbered.Spec) -> None:
    episode = numbered.episode(300, 40, spec, weight=2.5)
    episode.save(tmp_path / "a.npz")
    assert same(Episode.load(tmp_path / "a.npz"), episode)
    assert not episode.problem(spec)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    with np.load(tmp_path / "a.npz") as opened:  # anybody's numpy reads it
        assert np.array_equal(opened["frame"], episode.frame)


def test_damage_is_never_used(tmp_path: Path) -> None:
    """Bytes flipped all over, the end cut off: either the very same episode or CorruptEpisode, mostly the latter."""
    path, episode = tmp_path / "a.npz", numbered.episode(7, 12)
    episode.save(path)
    content, refused = path.read_bytes(), 0
    for i in range(0, len(content), 3):
        path.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        try:
            assert same(Episode.load(path), episode)
        except CorruptEpisode as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > len(content) / 3 / 2
    for length in range(0, len(content), 20):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptEpisode):
            Episode.load(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reward": np.zeros(3, np.float32)}, "reward is float32 (3,) and should be float32 (5,)"),
        ({"frame": np.zeros((6, 1, 2, 2), np.float32)}, "frame is float32"),
        ({"reward": np.full(5, np.nan, np.float32)}, "not a usable number"),
        ({"weight": 0.0}, "not a usable number"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    dataclasses.replace(numbered.episode(1, 5), **change).save(tmp_path / "a.npz")  # type: ignore[arg-type]
    with pytest.raises(CorruptEpisode, match="not a usable episode") as caught:
        Episode.load(tmp_path / "a.npz")
    assert reason in str(caught.value)


def test_another_games_episode_is_named() -> None:
    assert "frame is uint8 (6, 1, 2, 2) and should be uint8 (6, 3, 2, 2)" in numbered.episode(1, 5).problem(CONTINUOUS)
    assert "outside 0..1" in numbered.episode(1, 5).problem(dataclasses.replace(DISCRETE, action_size=2))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptEpisode, match="nothing.npz is missing"):
        Episode.load(tmp_path / "nothing.npz")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    old = numbered.episode(1, 3)
    old.save(tmp_path / "old.npz")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    for name in ("old.npz", "new.npz"):
        with pytest.raises(OSError, match="No space left"):
            numbered.episode(2, 4).save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.npz"]
    assert same(Episode.load(tmp_path / "old.npz"), old)


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize("steps", [0, 1, FIRST_CAPACITY, 2 * FIRST_CAPACITY + 1])
def test_recording_grows_into_the_episode(spec: numbered.Spec, steps: int) -> None:
    whole = numbered.episode(5, steps, spec)
    recording = Recording(spec, numbered.frame(5, 0, spec), seed=5)
    for t in range(steps):
        recording.append(numbered.action(5, t, spec), numbered.step(5, t, t == steps - 1, spec))
    assert same(recording.view(), whole) and same(recording.finish(), whole)
    resumed = Recording.resumed(spec, whole)
    assert same(resumed.view(), whole) and resumed.nbytes == recording.nbytes


def test_finished_episode_shares_nothing_with_its_recording() -> None:
    recording = Recording(DISCRETE, numbered.frame(5, 0), seed=5)
    recording.append(1, numbered.step(5, 0, True))
    assert not np.shares_memory(recording.finish().frame, recording.view().frame)
    assert recording.finish().frame.base is None  # nor does it keep the spare capacity alive


@pytest.mark.parametrize("bad", [np.zeros((1, 2, 2), np.float32), np.zeros((2, 2), np.uint8)], ids=["float", "flat"])
def test_frames_are_not_silently_converted(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="should be uint8"):
        Recording(DISCRETE, bad, seed=0)
    with pytest.raises(ValueError, match="should be uint8"):
        Recording(DISCRETE, numbered.frame(0, 0), seed=0).append(0, numbered.step(0, 0, False)._replace(frame=bad))
