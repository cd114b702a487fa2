"""CarRacing drawn with less work: the same frames, rewards and endings as gymnasium's own, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest

from envs import GameConfig, Games, Spec
from envs.car_racing import CarRacingGames
from envs.gym import GymGames
from envs.make import make_games
from tests.opened import opened

ENV = "CarRacing-v3"


def build(num: int = 1, env: str = ENV, **settings: Any) -> Games:
    games = opened(make_games(env, GameConfig(**settings), num))
    assert isinstance(games, CarRacingGames)
    return games


def generic(num: int = 1, env: str = ENV, **settings: Any) -> Games:
    """The path that any gymnasium game takes."""
    return opened(GymGames(env, num, config=GameConfig(**settings)))


def random_actions(seed: int, steps: int) -> np.ndarray:
    """(steps, 3) float32 in [-1, 1], each held for up to 8 steps."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.uniform(-1, 1, (steps, 3)), rng.integers(1, 9, steps), axis=0)[:steps].astype(np.float32)


def steering(seed: int, steps: int) -> np.ndarray:
    """Gas at first and now and then, left and right all the time, a brake in between: skids, grass, many tiles."""
    t = np.arange(steps)
    steer = 0.6 * np.sin(t / (9 + seed)) + 0.3 * np.sin(t / 31 + seed)
    gas = np.where((t < 80) | (t % 50 < 15), 0.6, -1.0)
    brake = np.where(t % 97 > 90, 0.4, -1.0)
    return np.stack([steer, gas, brake], 1).astype(np.float32)


def to_the_edge(pair: tuple[Games, Games], steps: int) -> Iterator[np.ndarray]:
    """Puts the cars 12 units before the edge of the playing field, beyond which all is black, and gives full gas."""
    for games in pair:
        car = games._copies[0].unwrapped.car  # type: ignore[attr-defined]
        up = 321 - car.hull.position[1]
        for body in (car.hull, *car.wheels):
            body.position = (body.position[0] + 60, body.position[1] + up)
    yield from np.tile(np.array([0, 1, -1], np.float32), (steps, 1))


def following(games: Games, steps: int) -> Iterator[np.ndarray]:
    """Drives along the track: towards the tile four ahead, at 30 units a second."""
    game: Any = games._copies[0].unwrapped  # type: ignore[attr-defined]
    for _ in range(steps):
        hull = game.car.hull
        track = np.array(game.track)[:, 2:]
        nearest = int(((track - np.array(hull.position)) ** 2).sum(1).argmin())
        x, y = hull.GetLocalPoint(track[(nearest + 4) % len(track)].tolist())  # the car looks along y
        gas = 0.0 if hull.linearVelocity.length < 30 else -1.0
        yield np.array([np.clip(2 * np.arctan2(x, y), -1, 1), gas, -1], np.float32)


def compare(fast: Games, slow: Games, seed: int, actions: Iterable[np.ndarray]) -> tuple[float, int, bool]:
    """Steps both and compares every field; returns the score, the tiles touched and whether it ended."""
    np.testing.assert_array_equal(fast.reset([seed]), slow.reset([seed]))
    score, tiles, step = 0.0, 0, None
    for t, action in enumerate(actions):
        step, other = fast.step(action[None]), slow.step(action[None])
        for name in step._fields:
            ours, theirs = getattr(step, name), getattr(other, name)
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{name} after {t + 1} steps")
            assert ours.dtype == theirs.dtype
        score += float(step.score[0])
        tiles += int(step.score[0] > 0)
        if step.done[0]:
            break
    assert step is not None
    return score, tiles, bool(step.terminated[0])


@pytest.mark.parametrize(("seed", "drives"), [pytest.param(0, False, marks=pytest.mark.slow), (1, True)])
def test_400_steps_are_gymnasium_s_own(seed: int, drives: bool) -> None:
    settings: dict[str, Any] = {"gray": False, "size": 96}  # 96: as the game draws it
    fast, slow = build(**settings), generic(**settings)
    _, tiles, _ = compare(fast, slow, seed, following(slow, 400) if drives else random_actions(seed, 400))
    assert tiles > (40 if drives else 3), "a car that stands still compares little"
    np.testing.assert_array_equal(fast.render(), slow.render())


@pytest.mark.parametrize("gray", [True, False])
def test_the_small_picture_and_action_repeats(gray: bool) -> None:
    settings: dict[str, Any] = {"gray": gray, "action_repeat": 3, "clip_rewards": True, "max_steps": 60}
    compare(build(**settings), generic(**settings), 3, steering(3, 100))


def test_over_the_edge_of_the_playing_field() -> None:
    fast, slow = build(gray=False, size=96), generic(gray=False, size=96)
    score, _, ended = compare(fast, slow, 7, to_the_edge((fast, slow), 300))
    assert ended and score < -50, "never came to the edge"


def test_a_finished_lap_is_no_ending_to_be_feared() -> None:
    fast, slow = build(gray=False), generic(gray=False)
    for games in (fast, slow):
        games.reset([3])
        game: Any = games._copies[0].unwrapped  # type: ignore[attr-defined]
        game.tile_visited_count = len(game.track)  # all of them
    ours, theirs = (games.step(np.zeros((1, 3), np.float32)) for games in (fast, slow))
    assert theirs.terminated[0] and theirs.done[0] and not theirs.truncated[0]
    assert ours.truncated[0] and ours.done[0] and not ours.terminated[0]
    np.testing.assert_array_equal(ours.score, theirs.score)


def test_a_speed_the_indicators_have_no_room_for() -> None:
    """No car reaches it; one that did would be drawn by gymnasium itself."""
    fast, slow = build(gray=False, size=96), generic(gray=False, size=96)
    for games in (fast, slow):
        games.reset([0])
        wheel = games._copies[0].unwrapped.car.wheels[0]  # type: ignore[attr-defined]
        wheel.omega = 3000.0
    action = np.zeros((1, 3), np.float32)
    ours, theirs = fast.step(action).frame, slow.step(action).frame
    np.testing.assert_array_equal(ours, theirs)
    assert (ours[0, 2, 60:84, 17:19] > 200).all(), "the indicator stays in the panel: nothing is tested"


@pytest.mark.parametrize("kwargs", [{"domain_randomize": True}, {"continuous": False}])
def test_other_arguments_of_the_game(kwargs: dict[str, Any]) -> None:
    gymnasium.registry.pop("CarOther-v0", None)
    entry = gymnasium.spec(ENV).entry_point
    gymnasium.register("CarOther-v0", entry, kwargs=kwargs, max_episode_steps=40)
    fast, slow = build(env="CarOther-v0", gray=False), generic(env="CarOther-v0", gray=False)
    actions = steering(4, 60)
    if not kwargs.get("continuous", True):
        assert fast.spec.discrete and fast.spec.action_size == 5
        actions = np.random.default_rng(0).integers(0, 5, 60)
    compare(fast, slow, 4, actions)


def test_an_episode_is_a_function_of_seed_and_actions() -> None:
    games, alone = build(3), build()
    first = games.reset([7, 8, 9])
    assert len({frame.tobytes() for frame in first}) == 3, "three seeds are three tracks"
    actions = np.stack([random_actions(row, 40) for row in range(3)], 1)  # (T, 3, 3)
    alone.reset([123])
    for action in actions[:5]:
        alone.step(action[:1])  # leaves a past behind
    np.testing.assert_array_equal(alone.reset([8])[0], first[1])
    for t, action in enumerate(actions):
        many, one = games.step(action), alone.step(action[1:2])
        for name in many._fields:
            np.testing.assert_array_equal(getattr(many, name)[1], getattr(one, name)[0], err_msg=name)
        if t == 20:
            games.reset([50, 51], rows=[2, 0])


def test_restore_brings_rows_of_different_ages_back() -> None:
    games, again = build(2), build(2)
    games.reset([1, 2])
    actions = np.stack([steering(row, 40) for row in range(2)], 1)
    seen = [games.step(action) for action in actions[:25]]
    first = games.reset([60], rows=[1])[1]
    seen += [games.step(action) for action in actions[25:]]
    traces = again.restore([1, 60], [actions[:, 0], actions[25:, 1]])
    np.testing.assert_array_equal(traces[0].frame[1:], [step.frame[0] for step in seen])
    np.testing.assert_array_equal(traces[1].frame, [first, *(step.frame[1] for step in seen[25:])])
    np.testing.assert_array_equal(traces[1].score, [step.score[1] for step in seen[25:]])
    for action in random_actions(3, 5):
        both = np.tile(action, (2, 1))
        np.testing.assert_array_equal(again.step(both).frame, games.step(both).frame)


def test_spec_and_the_bounds_of_actions() -> None:
    games = build(2, gray=False)
    assert games.spec == Spec((3, 64, 64), 3, discrete=False)
    assert games.description == "3 continuous actions, its observation as 64x64 RGB"
    np.testing.assert_array_equal(games.action_low, [-1, 0, 0])
    np.testing.assert_array_equal(games.action_high, [1, 1, 1])
    assert games.render().shape == (400, 600, 3)
    assert games.keys_to_action() is None


def test_steps_in_between_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from envs.car_rendering import Renderer

    rendered: list[Any] = []
    render = Renderer.render

    def counted(self: Renderer, game: Any) -> np.ndarray:
        rendered.append(game)
        return render(self, game)

    monkeypatch.setattr(Renderer, "render", counted)
    games = build(2, action_repeat=5)
    games.reset([0, 1])
    games.step(np.zeros((2, 3), np.float32))
    assert len(rendered) == 4


def test_frames_of_height_x_width() -> None:
    fast, slow = build(size="84x64", gray=False), generic(size="84x64", gray=False)
    frame = fast.reset([3])
    assert frame.shape == (1, 3, 84, 64) and "84x64 RGB" in fast.description
    np.testing.assert_array_equal(frame, slow.reset([3]))


def test_missing_box2d_is_named() -> None:
    """In another process, because here it is there and loaded."""
    code = f"""
import sys
sys.modules["Box2D"] = None
from envs import GameConfig, UserError
from envs.make import make_games
try:
    make_games("{ENV}", GameConfig(), 1)
except UserError as problem:
    print(problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ENV in done.stdout and "gymnasium[box2d]" in done.stdout
