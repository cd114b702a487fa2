"""A stopped run finds its replay again: the same episodes, the same next samples, and a word on what is lost."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent.replay import Replay, ReplayConfig
from envs import GameConfig
from envs.episode import PER_STEP, Episode
from envs.make import make_games
from tests import numbered
from tests.agent.test_replay import equal, fill, fresh, seeds
from tests.numbered import CONTINUOUS, DISCRETE


def saved(replay: Replay) -> dict[str, Any]:
    """The state after the way through a checkpoint file."""
    file = io.BytesIO()
    torch.save(replay.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_resumed_sampling_is_bit_identical(tmp_path: Path) -> None:
    """Episodes finish in another order than they began; two are open, one past its first capacity; memory is tight."""
    replay = fresh(tmp_path, memory_gb=2e-5, recency=0.3, recent_steps=40)
    numbered.play(replay, 1, 0, 300, finish=False)
    fill(replay, [20] * 30, first=1)
    replay.add_episode(numbered.episode(31, 10), human=True)
    numbered.play(replay, 0, 32, 7, finish=False)
    replay.sample(3, 4)
    state = saved(replay)
    expected = [replay.sample(16, 8) for _ in range(4)]
    # A killed run goes on for a while, and dies in the middle of a file.
    replay.add(0, numbered.action(32, 7), numbered.step(32, 7, True))
    fill(replay, [5, 5], first=33)
    (tmp_path / ".000035.npz.tmp").write_bytes(b"half")
    assert len(list(tmp_path.iterdir())) == 35
    again = Replay(tmp_path, DISCRETE, replay.config, seed=99)
    again.load_state_dict(state, numbered.again)
    assert not again.skipped and (again.steps, again.episodes) == (300 + 600 + 10 + 7, 31)
    assert {path.name for path in tmp_path.iterdir()} == {f"{n:06d}.npz" for n in range(1, 32)}
    assert all(equal(again.sample(16, 8), batch) for batch in expected)
    again.add(0, numbered.action(32, 7), numbered.step(32, 7, True))
    assert Episode.load(tmp_path / "000032.npz").score == numbered.episode(32, 8).score


def test_games_without_an_end_fit_into_the_bound(tmp_path: Path) -> None:
    """Two rows that never end: the newest steps are in memory, all on disk, and a resumed replay goes on the same."""
    replay, steps = fresh(tmp_path, memory_gb=2e-5, validation=0), 3_000
    for row, seed in ((0, 1), (1, 2)):
        replay.begin(row, frame=numbered.frame(seed, 0), seed=seed)
    for t in range(steps):
        for row, seed in ((0, 1), (1, 2)):
            assert replay.add(row, numbered.action(seed, t), numbered.step(seed, t, False)) is None
            assert replay.memory_bytes <= 2e4
    assert replay.steps == 2 * steps and replay.frames("train") > 500
    assert all(len(episode) >= 128 for episode in replay.open().values())
    at = {1: 0, 2: 0}
    for path in sorted(tmp_path.iterdir()):
        piece = Episode.load(path)
        assert not piece.truncated.any() and numbered.read(piece.frame[0]) == (piece.seed, at[piece.seed])
        at[piece.seed] += len(piece)
        assert numbered.read(piece.frame[-1]) == (piece.seed, at[piece.seed])
    assert [at[row + 1] + len(episode) for row, episode in replay.open().items()] == [steps, steps]

    def again(seed: int, actions: np.ndarray) -> Episode:
        whole, past = numbered.again(seed, actions), at[seed]
        parts = {name: getattr(whole, name)[past:] for name in ("frame", *PER_STEP)}
        return replace(whole, **parts)

    state = saved(replay)
    expected = [replay.sample(16, 8) for _ in range(4)]
    numbered_end(replay, 0, 1, steps)
    other = Replay(tmp_path, DISCRETE, replay.config, seed=99)
    other.load_state_dict(state, again)
    assert not other.skipped and all(equal(other.sample(16, 8), batch) for batch in expected)
    last = numbered_end(other, 0, 1, steps)
    assert last is not None and last.score == numbered.episode(1, steps + 1).score and last.truncated[-1]


def numbered_end(replay: Replay, row: int, seed: int, t: int) -> Episode | None:
    """The game in `row` ends with its step `t`."""
    return replay.add(row, numbered.action(seed, t), numbered.step(seed, t, True))


def test_unusable_files_are_reported_and_skipped(tmp_path: Path) -> None:
    replay = fresh(tmp_path)
    fill(replay, [10] * 6)
    state = saved(replay)
    (tmp_path / "000001.npz").write_bytes((tmp_path / "000001.npz").read_bytes()[:-40])
    (tmp_path / "000002.npz").write_text("not an episode")
    (tmp_path / "000003.npz").unlink()
    numbered.episode(4, 10, CONTINUOUS).save(tmp_path / "000004.npz")
    again = fresh(tmp_path)
    again.load_state_dict(state, numbered.again)
    words = ("000001.npz is damaged", "000002.npz is damaged", "000003.npz is missing", "000004.npz is of another game")
    assert len(again.skipped) == 4 and all(word in line for word, line in zip(words, again.skipped, strict=True))
    assert set(seeds(again.sample(500, 4))) == {0, 5}


def test_without_a_folder_there_is_no_way_back() -> None:
    replay = fresh()
    fill(replay, [5])
    with pytest.raises(ValueError, match="without a folder"):
        fresh().load_state_dict(replay.state_dict(), numbered.again)


def test_a_failing_disk_loses_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error reaches the caller; the episode counts as finished, and a resumed run names its missing file."""
    replay = fresh(tmp_path)
    fill(replay, [5])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("os.fsync", full)
        fill(replay, [5], first=1)
    again = fresh(tmp_path)
    again.load_state_dict(saved(replay), numbered.again)
    assert replay.episodes == 2 and len(again.skipped) == 1 and "000001.npz is missing" in again.skipped[0]


def test_a_game_that_does_not_replay_is_no_match(tmp_path: Path) -> None:
    replay = fresh(tmp_path)
    numbered.play(replay, 0, 0, 7, finish=False)
    with pytest.raises(ValueError, match="seed 0 did not replay"):
        fresh(tmp_path).load_state_dict(saved(replay), lambda seed, taken: numbered.again(seed, taken[:-1]))


def test_state_holds_no_frames(tmp_path: Path) -> None:
    replay = fresh(tmp_path)
    fill(replay, [500] * 5)
    file = io.BytesIO()
    torch.save(replay.state_dict(), file)
    assert len(file.getvalue()) < 4000 and json.loads(replay.state_dict()["rng"])["bit_generator"] == "PCG64"


class Elsewhere:
    """A tensor on a GPU, which must come to the processor before numpy sees it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def cpu(self) -> torch.Tensor:
        return self.tensor


def test_a_state_that_was_loaded_onto_a_gpu_is_resumed(tmp_path: Path) -> None:
    replay = fresh(tmp_path)
    numbered.play(replay, 0, 0, 30, finish=False)
    state = saved(replay)
    state["open"] = [entry | {"actions": Elsewhere(entry["actions"])} for entry in state["open"]]
    again = Replay(tmp_path, DISCRETE, replay.config, seed=1)
    again.load_state_dict(state, numbered.again)
    assert again.steps == 30 and equal(replay.sample(4, 8), again.sample(4, 8))


def test_resume_on_a_real_game(tmp_path: Path) -> None:
    """Open episodes of Pong, sticky actions and all, come back from `Games.restore`, and the game goes on the same."""
    games, rng = make_games("ALE/Pong-v5", GameConfig(num_envs=2, max_steps=50)), np.random.default_rng(1)
    replay = Replay(tmp_path, games.spec, ReplayConfig(), seed=0)
    replay.begin_rows(range(2), games.reset([0, 1]), [0, 1])
    for i in range(75):
        step = games.step(actions := rng.integers(0, games.spec.action_size, 2))
        replay.add_rows(actions, step)
        if len(rows := np.flatnonzero(step.done).tolist()):
            begun = [100 * i + row for row in rows]
            replay.begin_rows(rows, games.reset(begun, rows)[rows], begun)
    other = make_games("ALE/Pong-v5", GameConfig(num_envs=2, max_steps=50))
    again = Replay(tmp_path, games.spec, ReplayConfig(), seed=5)
    state = saved(replay)
    going = [(entry["seed"], entry["actions"].numpy()) for entry in state["open"]]
    traces = dict(zip([seed for seed, _ in going], other.restore(*zip(*going, strict=True)), strict=True))

    def replay_game(seed: int, taken: np.ndarray) -> Episode:
        trace = traces[seed]
        steps = (taken, trace.reward, trace.terminated, trace.truncated)
        return Episode(trace.frame, *steps, score=float(trace.score.sum()), seed=seed)

    again.load_state_dict(state, replay_game)
    assert equal(replay.sample(12, 24), again.sample(12, 24))
    for _ in range(30):
        actions = rng.integers(0, games.spec.action_size, 2)
        a, b = games.step(actions), other.step(actions)
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        if a.done.any():
            break
    games.close()
    other.close()


def test_the_experience_of_another_replay_is_taken_over_whole(tmp_path: Path) -> None:
    first = Replay(tmp_path / "first", DISCRETE, ReplayConfig(), seed=0)
    for seed in range(12):
        first.add_episode(numbered.episode(seed, 5 + seed))
    (tmp_path / "first" / "000003.npz").write_bytes(b"torn")
    second = Replay(tmp_path / "second", DISCRETE, ReplayConfig(), seed=0)
    assert second.take_over(tmp_path / "first") == 11
    assert second.steps == sum(5 + seed for seed in range(12) if seed != 3)
    assert len(second.skipped) == 1 and "000003.npz" in second.skipped[0]
    assert [len(episode) for episode in second.memory().values()] == [5 + seed for seed in range(12) if seed != 3]
    assert len(list((tmp_path / "second").glob("*.npz"))) == 11  # it does not need the other folder any more
