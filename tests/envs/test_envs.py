"""Atari: the id's own meaning, exact replay, endings, and the settings that all games share."""

from __future__ import annotations

from typing import Any

import cv2
import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import AtariPreprocessing

import envs  # registers the games
from envs import GameConfig, Games, Transition
from envs.atari import AtariGames
from envs.gym import GymGames
from envs.make import make_games
from tests.opened import opened


def build(env: str, num: int = 1, **settings: Any) -> Games:
    return opened(make_games(env, GameConfig(**settings), num))


def play(games: Games, actions: np.ndarray) -> list[Transition]:
    return [games.step(row) for row in actions]


def some_actions(seed: int, steps: int, num: int, choices: int) -> np.ndarray:
    """Random actions, each held for a few steps, as (steps, num) int64."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.integers(0, choices, (steps // 4 + 1, num)), 4, axis=0)[:steps]


@pytest.mark.parametrize("gray", [True, False])
@pytest.mark.parametrize(("env", "repeat"), [("ALE/Pong-v5", 4), ("ALE/MsPacman-v5", 4), ("PongNoFrameskip-v4", 1)])
def test_frames_and_rewards_are_those_of_gymnasium(env: str, repeat: int, gray: bool) -> None:
    games = build(env, sticky=0.0, gray=gray)
    raw = gymnasium.make(env, frameskip=1, repeat_action_probability=0.0)
    oracle = AtariPreprocessing(raw, noop_max=0, frame_skip=repeat, screen_size=64, grayscale_obs=gray)
    picture, _ = oracle.reset(seed=0)
    frame = games.reset([0])[0]
    total = 0.0
    for action in some_actions(0, 100, 1, games.spec.action_size):
        np.testing.assert_array_equal(frame, picture[None] if gray else picture.transpose(2, 0, 1))
        picture, reward, *_ = oracle.step(action[0])
        step = games.step(action)
        frame = step.frame[0]
        assert step.reward[0] == step.score[0] == reward
        total += abs(float(reward))
    assert total > 0 or repeat == 1, "100 steps without a reward compare nothing"


@pytest.mark.parametrize("gray", [True, False])
@pytest.mark.parametrize("size", ["84x64", "112x80", "210x160"])
def test_frames_of_height_x_width(size: str, gray: bool) -> None:
    """As OpenCV makes them of the console's picture; at its own size it is that picture."""
    games = build("PongNoFrameskip-v4", size=size, gray=gray)
    height, width = map(int, size.split("x"))
    assert games.spec.frame == (1 if gray else 3, height, width) and f" {size} " in games.description
    frame = games.reset([0])[0]
    for action in some_actions(0, 30, 1, 6):
        assert frame.shape == games.spec.frame
        frame = games.step(action).frame[0]
    console = gymnasium.make("PongNoFrameskip-v4", obs_type="grayscale" if gray else "rgb")
    picture = console.reset(seed=0)[0]
    for action in some_actions(0, 30, 1, 6):
        picture = console.step(action[0])[0]
    shown = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(frame, shown[None] if gray else shown.transpose(2, 0, 1))


def test_a_v5_id_means_skip_4_sticky_and_minimal_actions() -> None:
    games = build("ALE/Pong-v5", 2)
    assert games.description == "4 frames a step, sticky 0.25, 6 actions, 64x64 gray"
    assert games.action_names == ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
    assert games.spec == envs.Spec((1, 64, 64), 6, True)
    actions = some_actions(1, 60, 2, 6)
    actions[:, 1] = actions[:, 0]

    def frames(**settings: Any) -> np.ndarray:
        other = build("ALE/Pong-v5", 2, **settings)
        other.reset([1, 2])
        return np.stack([step.frame for step in play(other, actions)])

    as_is = frames()
    np.testing.assert_array_equal(as_is, frames(sticky=0.25, action_repeat=4, noops=0))
    assert (as_is[:, 0] != as_is[:, 1]).any(), "with sticky actions two seeds must part"
    exact = frames(sticky=0.0)
    np.testing.assert_array_equal(exact[:, 0], exact[:, 1])


def test_settings_are_described() -> None:
    assert (
        build("PongNoFrameskip-v4").description
        == "1 frame a step (most skip: game.action_repeat=4), sticky 0, 6 actions, 64x64 gray"
    )
    game = build("ALE/Pong-v5", size=48, gray=False, action_repeat=2, **envs.PROTOCOLS["atari100k"])
    assert game.description == "2 frames a step, sticky 0, up to 30 no-ops, 6 actions, 48x48 RGB"
    assert game.reset([3]).shape == (1, 3, 48, 48) == (1, *game.spec.frame)
    random_skip = build("Pong-v4")
    assert isinstance(random_skip, GymGames)
    assert (
        random_skip.description == "2 to 4 frames a step at random, sticky 0, 6 actions, its observation as 64x64 gray"
    )
    assert isinstance(build("Pong-v4", action_repeat=4), AtariGames)


def test_action_repeat_counts_emulator_frames() -> None:
    short, long = build("ALE/Pong-v5", sticky=0.0, action_repeat=2), build("ALE/Pong-v5", sticky=0.0)
    short.reset([0])
    long.reset([0])
    for action in some_actions(2, 40, 1, 6):
        short.step(action)
        np.testing.assert_array_equal(short.step(action).frame, long.step(action).frame)


def test_noops_depend_on_the_seed_alone() -> None:
    games = build("ALE/Seaquest-v5", 8, sticky=0.0, noops=30)
    first = games.reset(range(8))
    assert len({frame.tobytes() for frame in first}) > 4
    np.testing.assert_array_equal(build("ALE/Seaquest-v5", sticky=0.0, noops=30).reset([5])[0], first[5])
    without = build("ALE/Seaquest-v5", 8, sticky=0.0).reset(range(8))
    assert len({frame.tobytes() for frame in without}) == 1


@pytest.mark.parametrize("noops", [0, 30])
def test_an_episode_is_a_function_of_seed_and_actions(noops: int) -> None:
    games = build("ALE/Breakout-v5", 3, noops=noops)
    games.reset([7, 8, 9])
    actions = some_actions(3, 400, 3, 4)
    seen: list[Transition] = []
    for t, action in enumerate(actions):
        seen.append(games.step(action))
        if seen[-1].done[1]:
            break
        others = np.flatnonzero(seen[-1].done)
        if len(others):
            games.reset([100 + t] * len(others), rows=others.tolist())
    assert seen[-1].done[1] and len(seen) > 50
    alone = build("ALE/Breakout-v5", noops=noops)
    alone.reset([123])
    play(alone, some_actions(4, 5, 1, 4))  # leave a past behind
    alone.reset([8])
    for action, before in zip(actions, seen, strict=False):
        after = alone.step(action[1:2])
        for name in Transition._fields:
            np.testing.assert_array_equal(getattr(after, name)[0], getattr(before, name)[1], err_msg=name)


def test_a_partial_reset_leaves_the_other_rows_alone() -> None:
    games, undisturbed = build("ALE/Pong-v5", 3), build("ALE/Pong-v5", 3)
    start = games.reset([1, 2, 3])
    undisturbed.reset([1, 2, 3])
    actions = some_actions(5, 80, 3, 6)
    before = play(games, actions[:40])[-1]
    play(undisturbed, actions[:40])
    frames = games.reset([77, 1], rows=[2, 0])  # in any order
    np.testing.assert_array_equal(frames[1], before.frame[1])
    np.testing.assert_array_equal(frames[0], start[0])
    alone = build("ALE/Pong-v5")
    alone.reset([77])
    for action in actions[40:]:
        step, same = games.step(action), undisturbed.step(action)
        np.testing.assert_array_equal(step.frame[1], same.frame[1])
        np.testing.assert_array_equal(step.frame[2], alone.step(action[2:]).frame[0])
        assert step.score[1] == same.score[1]


def test_the_final_frame_is_kept_and_nothing_resets_by_itself() -> None:
    games = build("ALE/Breakout-v5", 2)
    start = games.reset([4, 5])
    steps = []
    for action in some_actions(6, 600, 2, 4):
        steps.append(games.step(action))
        if steps[-1].done.any():
            break
    last = steps[-1]
    row = int(np.flatnonzero(last.done)[0])
    assert last.terminated[row] and not last.truncated[row]
    assert (last.frame[row] != start[row]).any()
    with pytest.raises(RuntimeError, match="must be reset"):
        games.step(np.zeros(2, np.int64))
    frames = games.reset([4 + row], rows=[row])
    np.testing.assert_array_equal(frames[row], start[row])
    np.testing.assert_array_equal(frames[1 - row], last.frame[1 - row])


def test_a_time_limit_is_not_an_ending() -> None:
    games = build("ALE/Pong-v5", 2, max_steps=10)
    games.reset([1, 2])
    steps = play(games, some_actions(7, 6, 2, 6))
    assert not any(step.done.any() for step in steps)
    games.reset([3], rows=[1])
    steps = play(games, some_actions(8, 4, 2, 6))
    assert [step.truncated.tolist() for step in steps] == [[False, False]] * 3 + [[True, False]]
    assert not steps[-1].terminated.any() and steps[-1].done.tolist() == [True, False]


def test_the_emulator_s_own_limit_is_not_an_ending_either() -> None:
    if "ShortPong-v5" not in gymnasium.registry:
        kwargs = {**gymnasium.spec("ALE/Pong-v5").kwargs, "max_num_frames_per_episode": 40}
        gymnasium.register("ShortPong-v5", "ale_py.env:AtariEnv", kwargs=kwargs)
    games = build("ShortPong-v5")
    games.reset([1])
    steps = play(games, some_actions(9, 10, 1, 6))
    assert [bool(step.truncated[0]) for step in steps] == [False] * 9 + [True]
    assert steps[-1].done[0] and not steps[-1].terminated[0]


def test_a_lost_life_is_an_ending_to_learn_and_the_game_goes_on() -> None:
    plain, flagged = build("ALE/Breakout-v5"), build("ALE/Breakout-v5", life_loss=True, clip_rewards=True)
    np.testing.assert_array_equal(plain.reset([11]), flagged.reset([11]))
    endings, score = 0, 0.0
    for action in some_actions(10, 800, 1, 4):
        a, b = plain.step(action), flagged.step(action)
        np.testing.assert_array_equal(a.frame, b.frame)
        assert a.done[0] == b.done[0] and a.score[0] == b.score[0]
        assert a.terminated[0] == a.done[0]
        endings += int(b.terminated[0])
        score += float(a.score[0])
        if a.done[0]:
            break
    assert a.done[0] and b.terminated[0]
    assert endings == 5, "Breakout has five lives"
    assert score > 0


def test_clipped_rewards_and_scores_in_the_game_s_units() -> None:
    games = build("ALE/MsPacman-v5", 4, clip_rewards=True)
    games.reset(range(4))
    steps = play(games, some_actions(11, 150, 4, games.spec.action_size))
    score = np.stack([step.score for step in steps])
    reward = np.stack([step.reward for step in steps])
    assert score.max() >= 10
    np.testing.assert_array_equal(reward, np.sign(score))
    assert reward.dtype == score.dtype == np.float32


def test_render_is_the_console_s_own_picture() -> None:
    games = build("PongNoFrameskip-v4", 2, noops=0)
    console = gymnasium.make("PongNoFrameskip-v4", render_mode="rgb_array")
    console.reset(seed=0)
    games.reset([0, 0])
    actions = some_actions(12, 90, 2, 6)
    for t, action in enumerate(actions):
        games.step(action)
        console.step(action[1])
        if t in (30, 31, 89):  # late, then following
            picture = games.render(1)
            assert picture.shape == (210, 160, 3) and picture.dtype == np.uint8
            np.testing.assert_array_equal(picture, console.render())
    other = games.render(0)
    assert (other != picture).any()
    games.reset([0], rows=[1])
    console.reset(seed=0)
    np.testing.assert_array_equal(games.render(1), console.render())
    np.testing.assert_array_equal(games.render(0), other)


def test_restore_brings_rows_of_different_ages_back() -> None:
    games = build("ALE/Breakout-v5", 3)
    games.reset([1, 2, 3])
    actions = some_actions(13, 130, 3, 4)
    record: list[list[Transition]] = [[], [], []]
    begun, seeds = [0, 0, 0], [1, 2, 3]
    for t, action in enumerate(actions):
        step = games.step(action)
        ended = {*np.flatnonzero(step.done).tolist(), *{100: [2], 129: [0]}.get(t, [])}
        for row in range(3):
            record[row] = [] if row in ended else [*record[row], step]
        for row in ended:
            begun[row], seeds[row] = t + 1, 50 + t
            frames = games.reset([seeds[row]], rows=[row])
    again = build("ALE/Breakout-v5", 3)
    traces = again.restore(seeds, [actions[begun[row] :, row] for row in range(3)])
    assert [len(trace.reward) for trace in traces] == [len(steps) for steps in record]
    assert len(record[0]) == 0 and len(record[2]) == 29 and len(record[1]) > 0
    np.testing.assert_array_equal(traces[0].frame[-1], frames[0])
    for row in (1, 2):
        for name in ("reward", "score", "terminated", "truncated"):
            expected = [getattr(step, name)[row] for step in record[row]]
            np.testing.assert_array_equal(getattr(traces[row], name), expected)
        np.testing.assert_array_equal(traces[row].frame[1:], [step.frame[row] for step in record[row]])
    for action in some_actions(14, 20, 3, 4):
        np.testing.assert_array_equal(again.step(action).frame, games.step(action).frame)
    since = [0, len(record[1]) - 3, 20]
    later = build("ALE/Breakout-v5", 3).restore(seeds, [actions[begun[row] :, row] for row in range(3)], since)
    for whole, part, skipped in zip(traces, later, since, strict=True):
        for name in whole._fields:
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[skipped:])


def test_keys_are_those_of_the_game() -> None:
    keys = build("ALE/Pong-v5").keys_to_action()
    assert keys is not None and keys[("d",)] == 2 and keys[(" ",)] == 1
