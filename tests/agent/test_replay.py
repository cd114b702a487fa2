"""The replay: what is sampled, how often, and what is kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import ale_py
import numpy as np
import pytest
import torch

from agent.replay import Replay, ReplayConfig
from envs import GameConfig, Transition, UserError, settings
from envs.episode import Episode
from envs.make import make_games
from tests import numbered
from tests.numbered import CONTINUOUS, DISCRETE
from world_model.interface import Batch


def fresh(folder: Path | None = None, spec: numbered.Spec = DISCRETE, **config: Any) -> Replay:
    return Replay(folder, spec, ReplayConfig(**config), seed=0)


def fill(replay: Replay, lengths: list[int], *, first: int = 0) -> None:
    """Finished episodes, one after the other; seed = number."""
    for number, steps in enumerate(lengths, first):
        numbered.play(replay, 0, number, steps)


def seeds(batch: Batch) -> list[int]:
    return [numbered.read(frame)[0] for frame in batch.frame[:, 0].numpy()]


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:6], b[:6], strict=True))


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_every_index_matches_the_timeline(spec: numbered.Spec) -> None:
    replay, steps, length = fresh(spec=spec), [30, 4, 300, 9, 1], 8
    fill(replay, steps)
    numbered.play(replay, 0, len(steps), 6, finish=False)
    steps.append(6)
    whole = [numbered.episode(seed, n, spec) for seed, n in enumerate(steps)]
    whole[-1].terminated[:] = [t % 3 == 2 for t in range(6)]  # its last step is not the end
    batch = replay.sample(500, length)
    assert batch.frame.dtype == torch.uint8 and batch.frame.shape == (500, length, *spec.frame)
    assert batch.action.shape == ((500, length) if spec.discrete else (500, length, 2))
    starts = set()
    for row in range(500):
        seed, start = numbered.read(batch.frame[row, 0].numpy())
        episode, n = whole[seed], steps[seed]
        starts.add((seed, start))
        assert start <= max(0, n + 1 - length)  # padded only when the episode is too short
        for i in range(length):
            t = start + i
            assert batch.valid[row, i] == (t <= n) and batch.has_action[row, i] == (t < n)
            assert np.array_equal(batch.frame[row, i], episode.frame[t] if t <= n else np.zeros(spec.frame))
            assert np.array_equal(batch.action[row, i], episode.action[t] if t < n else 0 * episode.action[0])
            assert batch.reward[row, i] == (episode.reward[t] if t < n else 0)
            assert batch.terminated[row, i] == (episode.terminated[t] if t < n else False)
    assert {seed for seed, _ in starts} == set(range(6)) and len(starts) > 150


def test_an_open_episode_is_sampled_at_once() -> None:
    replay = fresh()
    with pytest.raises(ValueError, match="no train episode yet"):
        replay.sample(1, 4)
    replay.begin(0, frame=numbered.frame(0, 0), seed=0)
    batch = replay.sample(2, 4)
    assert batch.valid.tolist() == [[True, False, False, False]] * 2 and not batch.has_action.any()
    replay.add(0, 3, numbered.step(0, 0, False))
    batch = replay.sample(1, 4)
    assert batch.valid[0].tolist() == [True, True, False, False]
    assert batch.has_action[0].tolist() == [True, False, False, False]


def test_rows_at_once_equal_rows_one_by_one() -> None:
    one, many = fresh(), fresh()
    many.begin_rows([0, 1], np.stack([numbered.frame(s, 0) for s in (0, 1)]), [0, 1])
    for seed in (0, 1):
        one.begin(seed, frame=numbered.frame(seed, 0), seed=seed)
    for t in range(5):
        each = [numbered.step(seed, t, seed == 1 and t == 4) for seed in (0, 1)]
        alone = [one.add(seed, numbered.action(seed, t), each[seed]) for seed in (0, 1)]
        actions = np.array([numbered.action(seed, t) for seed in (0, 1)])
        ended = many.add_rows(actions, Transition(*(np.stack(column) for column in zip(*each, strict=True))))
        assert [e.seed for e in ended] == [e.seed for e in alone if e is not None] == ([1] if t == 4 else [])
    assert equal(one.sample(50, 3), many.sample(50, 3))
    assert one.steps == many.steps == 10 and one.episodes == many.episodes == 1
    assert ended[0].score == sum(2 * numbered.reward(1, t) for t in range(5))


def test_rows_must_begin_before_they_go_on() -> None:
    replay = fresh()
    with pytest.raises(ValueError, match="row 2 has no episode"):
        replay.add(2, 0, numbered.step(0, 0, False))
    replay.begin(2, frame=numbered.frame(0, 0), seed=0)
    with pytest.raises(ValueError, match="row 2 is in the middle"):
        replay.begin(2, frame=numbered.frame(0, 0), seed=0)


def test_coverage_is_even_up_to_the_edges() -> None:
    """One episode of 50 frames, segments of 8: counts against the exact expectation, frame by frame."""
    replay, frames, length, draws = fresh(), 50, 8, 40_000
    fill(replay, [frames - 1])
    expected = np.zeros(frames)
    for raw in range(-(length - 1), frames):
        start = min(max(raw, 0), frames - length)
        expected[start : start + length] += 1 / (frames + length - 1)
    middle = length / (frames + length - 1)
    assert expected[0] == pytest.approx(middle) and expected[-1] == pytest.approx(middle)
    assert expected.min() == pytest.approx(middle) and expected.max() < 2 * middle
    batch = replay.sample(draws, length)
    seen = [numbered.read(frame)[1] for frame in batch.frame.flatten(0, 1).numpy()]
    counts = np.bincount(seen, minlength=frames)
    deviation = (counts / draws - expected) / np.sqrt(expected * (1 - expected) / draws)
    assert batch.valid.all() and np.abs(deviation).max() < 4


def test_long_episodes_and_heavy_ones_are_drawn_more_often() -> None:
    replay = fresh(human_weight=4.0)
    fill(replay, [9, 29])  # 10 and 30 frames
    replay.add_episode(numbered.episode(2, 9), human=True)
    replay.add_episode(numbered.episode(3, 9, weight=2.0))
    batch = replay.sample(20_000, 6)
    drawn = Counter(seeds(batch))
    shares = {0: 10 / 100, 1: 30 / 100, 2: 40 / 100, 3: 20 / 100}
    assert {seed: drawn[seed] / 20_000 for seed in shares} == pytest.approx(shares, abs=0.015)


def test_an_episode_of_another_game_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit this game: frame is uint8"):
        fresh(spec=CONTINUOUS).add_episode(numbered.episode(0, 3))


def test_recency_gives_the_newest_steps_their_share() -> None:
    """1,000 frames; the newest 60, an episode of 40 and the last 20 of the one before, get half the draws, and luck."""
    replay = fresh(recency=0.5, recent_steps=60)
    fill(replay, [899, 59, 39])
    batch = replay.sample(20_000, 1)
    drawn = Counter(numbered.read(frame) for frame in batch.frame[:, 0].numpy())
    recent = sum(count for (seed, t), count in drawn.items() if seed == 2 or (seed == 1 and t >= 40))
    assert recent / 20_000 == pytest.approx(0.5 + 0.5 * 60 / 1000, abs=0.015)
    replay.config = ReplayConfig(recency=1.0, recent_steps=60)
    batch = replay.sample(2_000, 5)
    assert all(seed == 2 or (seed == 1 and t >= 40) for seed, t in map(numbered.read, batch.frame[:, 0].numpy()))


def test_what_is_recent_is_drawn_as_whole_segments() -> None:
    replay = fresh(recency=1.0, recent_steps=4)
    fill(replay, [50])
    batch = replay.sample(500, 10)
    assert batch.valid.all() and {numbered.read(frame) for frame in batch.frame[:, 0].numpy()} == {(0, 41)}


def test_episodes_in_progress_share_what_is_recent() -> None:
    replay = fresh(recency=1.0, recent_steps=60)
    fill(replay, [100])
    for row, steps in enumerate((100, 100, 5)):
        numbered.play(replay, row, row + 1, steps, finish=False)
    drawn = {numbered.read(frame) for frame in replay.sample(5_000, 1).frame[:, 0].numpy()}
    spans = {seed: sorted(t for of, t in drawn if of == seed) for seed in range(4)}
    assert spans[1] == spans[2] == list(range(81, 101)) and spans[3] == list(range(6))
    assert spans[0] == list(range(87, 101)), "and the finished one has the rest"


def test_pieces_of_an_episode_are_trained_on_all_or_none(tmp_path: Path) -> None:
    replay = fresh(tmp_path, memory_gb=5e-5, validation=0.5)  # the second is held out
    for row in (0, 1):
        numbered.play(replay, row, row, 0, finish=False)
    for t in range(1_500):
        for row in (0, 1):
            replay.add(row, numbered.action(row, t), numbered.step(row, t, False))
    assert len(replay.memory()) > 4 and set(seeds(replay.sample(500, 3))) == {0}
    assert set(seeds(replay.sample(500, 3, split="validation"))) == {1}
    (tmp_path / "human").mkdir()
    other = fresh(tmp_path / "other", validation=0.5)
    other.take_over(tmp_path)
    assert set(seeds(other.sample(500, 3))) == {0} and set(seeds(other.sample(500, 3, split="validation"))) == {1}
    third = fresh(validation=0.5)
    for number, (path, seed) in enumerate({"a": 5, "b": 6, "c": 6, "d": 6}.items()):  # as a person recorded them
        piece = numbered.episode(seed, 10 + number)
        piece = replace(piece, piece_of=seed if path > "b" else -1)
        piece.save(tmp_path / "human" / f"{path}.npz")
    third.take_in(tmp_path / "human")
    assert set(seeds(third.sample(500, 3))) == {5} and set(seeds(third.sample(500, 3, split="validation"))) == {6}
    begins = {numbered.read(frame)[1] for frame in other.sample(500, 3, first=True).frame[:, 0].numpy()}
    assert begins == {0}, "a piece is no beginning of a game"
    batch = other.sample(500, 3)
    assert batch.is_first is not None
    assert batch.is_first.tolist() == [numbered.read(frame)[1] == 0 for frame in batch.frame[:, 0].numpy()]


def test_validation_is_one_in_ten_and_never_trained_on() -> None:
    replay = fresh(recency=0.5, recent_steps=20)
    fill(replay, [5] * 9)
    with pytest.raises(ValueError, match="no validation episode yet"):
        replay.sample(1, 2, split="validation")
    fill(replay, [5] * 30, first=9)
    assert set(seeds(replay.sample(5_000, 3))) == {n for n in range(39) if n % 10 != 9}
    assert set(seeds(replay.sample(500, 3, split="validation"))) == {9, 19, 29}
    assert replay.frames("validation") == 3 * 6 and replay.frames("train") == 36 * 6
    numbered.play(replay, 0, 39, 4, finish=False)  # an open one belongs to its split from its first frame on
    assert 39 not in seeds(replay.sample(5_000, 3)) and 39 in seeds(replay.sample(500, 3, split="validation"))


@pytest.mark.parametrize(("share", "held_out"), [(0.0, set()), (0.1, {9, 19, 29, 39}), (0.25, set(range(3, 40, 4)))])
def test_the_share_of_validation(share: float, held_out: set[int]) -> None:
    replay = fresh(validation=share)
    fill(replay, [5] * 40)
    assert set(seeds(replay.sample(5_000, 3))) == set(range(40)) - held_out
    assert replay.frames("validation") == 6 * len(held_out)


def test_recency_falls_back_when_all_that_is_recent_is_for_validation() -> None:
    replay = fresh(recency=1.0, recent_steps=5)
    fill(replay, [5] * 10)
    assert set(seeds(replay.sample(2_000, 3))) == set(range(9))


def test_memory_is_bounded_and_the_disk_keeps_all(tmp_path: Path) -> None:
    one = numbered.episode(0, 50).nbytes
    replay = fresh(tmp_path, memory_gb=4.5 * one / 1e9)
    for number in range(8):
        replay.add_episode(numbered.episode(number, 50))
    assert replay.memory_bytes == 4 * one
    assert set(seeds(replay.sample(2_000, 5))) == {4, 5, 6, 7}
    replay.add_episode(numbered.episode(8, 101))  # as large as two
    assert set(seeds(replay.sample(2_000, 5))) == {6, 7, 8} and one * 4 < replay.memory_bytes < one * 4.1
    numbered.play(replay, 0, 10, 3, finish=False)  # room for the open one is made as well
    assert replay.frames("train") == 102 and replay.frames("validation") == 4 and replay.episodes == 9
    assert [Episode.load(path).seed for path in sorted(tmp_path.iterdir())] == list(range(9))


def test_a_long_game_that_is_held_out_leaves_something_to_train_on() -> None:
    one = numbered.episode(0, 50).nbytes
    replay = fresh(memory_gb=2.5 * one / 1e9, validation=0.5)
    for number in range(2):
        replay.add_episode(numbered.episode(number, 50))
    for number in range(6):  # pieces of the second, which is held out
        replay.add_episode(replace(numbered.episode(1, 50 + number), piece_of=1))
    assert set(seeds(replay.sample(500, 5))) == {0}
    assert replay.frames("validation") == 56 and replay.frames("train") == 51


@pytest.mark.parametrize(
    ("key", "value"), [("memory_gb", 0), ("recency", 1.5), ("recent_steps", 0), ("human_weight", -1)]
)
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"replay.{key}"):
        settings.check(ReplayConfig(**{key: value}), "replay.")  # type: ignore[arg-type]


def test_stored_frames_are_the_games_own_pixels(tmp_path: Path) -> None:
    """Breakout through Games, replay, disk and sampling, against the emulator asked a second time."""
    games = make_games("ALE/Breakout-v5", GameConfig(num_envs=2, max_steps=60))
    replay, rng = Replay(tmp_path, games.spec, ReplayConfig(), seed=0), np.random.default_rng(0)
    replay.begin_rows(range(2), games.reset([11, 12]), [11, 12])
    actions = rng.integers(0, games.spec.action_size, (60, 2))
    picture: dict[str, Any] = {"img_height": 64, "img_width": 64, "stack_num": 1}
    rules: dict[str, Any] = {"use_fire_reset": False, "noop_max": 0, "repeat_action_probability": 0.25}
    own = ale_py.AtariVectorEnv("breakout", num_envs=2, num_threads=1, **picture, **rules)
    pixels = [own.reset(seed=np.array([11, 12]))[0]]
    for taken in actions:
        replay.add_rows(taken, games.step(taken))
        pixels.append(own.step(taken)[0])
    assert replay.episodes == 2
    for row in range(2):
        stored = Episode.load(tmp_path / f"{row:06d}.npz")
        expected = np.stack([np.asarray(frame[row]).reshape(1, 64, 64) for frame in pixels])
        assert stored.seed == 11 + row and np.array_equal(stored.frame, expected) and len(np.unique(expected)) > 5
    batch = replay.sample(20, 61)  # the whole episodes
    assert all(any(np.array_equal(f, Episode.load(p).frame) for p in tmp_path.iterdir()) for f in batch.frame.numpy())
    games.close()
