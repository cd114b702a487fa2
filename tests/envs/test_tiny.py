"""Gymnasium environments in general, on the tiny games and a few made for the purpose, and what is refused how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import error, spaces
from gymnasium.utils.env_checker import check_env

import envs  # registers the games
from envs import GameConfig, Games, UserError, nearest
from envs.make import make_games
from envs.tiny import counted

TINY = ("Count-v0", "Catch-v0", "CatchContinuous-v0")


class Asked(gymnasium.Env[Any, Any]):
    """Takes any space of actions and remembers what it was given; its picture is its observation."""

    def __init__(self, actions: spaces.Space[Any], observations: spaces.Space[Any]) -> None:
        self.action_space, self.observation_space = actions, observations
        self.given: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.given.append(action)
        return self.observation_space.sample(), 2.5, False, False, {}


PICTURE = spaces.Box(0, 255, (48, 40, 3), np.uint8)


def register(name: str, actions: spaces.Space[Any], observations: spaces.Space[Any] = PICTURE, **kwargs: Any) -> str:
    gymnasium.registry.pop(name, None)
    gymnasium.register(name, lambda **_: Asked(actions, observations), **kwargs)
    return name


def build(env: str, num: int = 1, **settings: Any) -> Games:
    return make_games(env, GameConfig(**settings), num)


def random_actions(games: Games, rng: np.random.Generator) -> np.ndarray:
    if games.spec.discrete:
        return rng.integers(0, games.spec.action_size, games.num_envs)
    return rng.uniform(-1, 1, (games.num_envs, games.spec.action_size)).astype(np.float32)


@pytest.mark.parametrize("env", TINY)
def test_gymnasium_accepts_the_tiny_games(env: str) -> None:
    check_env(gymnasium.make(env, render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("size", [32, "32", "84x64", "64x84", "210x160"])
def test_frames_of_height_x_width(size: int | str) -> None:
    """The rows come first: what Count-v0 shows can be read at any size, and only if it is not turned."""
    games = build("Count-v0", 2, size=size)
    height, width = (int(side) for side in (str(size).split("x") * 2)[:2])
    assert games.spec.frame == (1, height, width)
    frames = games.reset([0, 1])
    for number in range(6):
        assert frames.shape == (2, 1, height, width) and [counted(frame) for frame in frames] == [number, number]
        frames = games.step(np.zeros(2, np.int64)).frame
    games.close()


@pytest.mark.parametrize(
    "size", [7, 1025, -64, "64x", "x64", "64x64x3", "64 x 48", "8.5", "84*64", "", "2000x64", True]
)
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(UserError, match="game.size must be between 8 and 1024.*height x width like 84x64, not "):
        GameConfig(size=size).check()


@pytest.mark.parametrize("env", TINY)
def test_the_tiny_games_are_deterministic(env: str) -> None:
    games, alone = build(env, 3), build(env)
    first = games.reset([1, 2, 3])
    np.testing.assert_array_equal(alone.reset([2])[0], first[1])
    rng = np.random.default_rng(0)
    for _ in range(200):
        actions = random_actions(games, rng)
        many, one = games.step(actions), alone.step(actions[1:2])
        for name in many._fields:
            np.testing.assert_array_equal(getattr(many, name)[1], getattr(one, name)[0], err_msg=name)
        if many.done[1]:
            return
        others = np.flatnonzero(many.done).tolist()
        if others:
            games.reset([9] * len(others), rows=others)
    raise AssertionError("the episode never ended")


@pytest.mark.parametrize("size", [16, 32, 64, 96])
@pytest.mark.parametrize("gray", [True, False])
def test_count_shows_its_step_and_rewards_belong_to_the_frame_before(size: int, gray: bool) -> None:
    games = build("Count-v0", 2, size=size, gray=gray)
    frames = games.reset([0, 1])
    rng = np.random.default_rng(1)
    for t in range(20):
        assert [counted(frame) for frame in frames] == [t, t]
        actions = random_actions(games, rng)
        step = games.step(actions)
        np.testing.assert_array_equal(step.reward, (t + actions) % 2)
        frames = step.frame
    assert step.done.all() and step.terminated.all() and [counted(frame) for frame in frames] == [20, 20]


def test_an_action_repeat_adds_rewards_and_stops_at_the_end() -> None:
    games = build("Count-v0", action_repeat=3)
    assert games.description == "3 game steps a step, 2 actions, its observation as 64x64 gray"
    games.reset([0])
    steps = [games.step(np.ones(1, np.int64)) for _ in range(7)]
    assert [counted(step.frame[0]) for step in steps] == [3, 6, 9, 12, 15, 18, 20]
    assert [float(step.score[0]) for step in steps] == [2, 1, 2, 1, 2, 1, 1]
    assert [bool(step.done[0]) for step in steps] == [False] * 6 + [True]


def test_a_time_limit_of_the_id_and_one_of_ours_are_truncations() -> None:
    env = register("Limited-v0", spaces.Discrete(2), max_episode_steps=5)
    for limit, expected in ((None, 5), (3, 3)):
        games = build(env, max_steps=limit)
        games.reset([0])
        steps = [games.step(np.zeros(1, np.int64)) for _ in range(expected)]
        assert [bool(step.truncated[0]) for step in steps] == [False] * (expected - 1) + [True]
        assert steps[-1].done[0] and not steps[-1].terminated[0]
    games = build("Count-v0", max_steps=20)  # both at once: the game is over
    games.reset([0])
    last = [games.step(np.zeros(1, np.int64)) for _ in range(20)][-1]
    assert last.terminated[0] and not last.truncated[0]


def see(frame: np.ndarray) -> tuple[float, float]:
    """Reads the columns of the block and the paddle, in cells, off the picture alone."""
    cell = frame.shape[-1] // 8
    block = np.flatnonzero((frame[0] == 255).any(0)).mean() - (cell - 1) / 2
    paddle = np.flatnonzero(frame[0, -1] == 160)[0]
    return float(block) / cell, float(paddle) / cell


def chase(frame: np.ndarray) -> int:
    block, paddle = see(frame)
    return 1 + int(np.sign(round(block - paddle)))


def chase_smoothly(frame: np.ndarray) -> np.ndarray:
    block, paddle = see(frame)
    return np.array([np.clip(block - paddle, -1, 1)], np.float32)


def caught(env: str, act: Callable[[np.ndarray], Any]) -> float:
    """Returns the share of blocks caught over 8 episodes."""
    games = build(env, 8)
    frames = games.reset(range(8))
    score, done, steps = 0.0, np.zeros(8, bool), 0
    while not done.all():
        step = games.step(np.stack([act(frame) for frame in frames]))
        frames, done, steps = step.frame, step.done, steps + 1
        score += float(step.score.sum())
    assert steps == 79
    return (score / 80 + 1) / 2


@pytest.mark.parametrize(("env", "oracle"), [("Catch-v0", chase), ("CatchContinuous-v0", chase_smoothly)])
def test_catch_can_be_solved_from_its_picture_and_not_by_chance(env: str, oracle: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    assert caught(env, oracle) == 1.0

    def guess(frame: np.ndarray) -> Any:
        return rng.integers(3) if env == "Catch-v0" else rng.uniform(-1, 1, 1).astype(np.float32)

    assert caught(env, guess) < 0.4


def test_continuous_actions_are_scaled_to_the_game_s_bounds() -> None:
    box = spaces.Box(np.array([0, -2], np.float32), np.array([1, 6], np.float32))
    games = build(register("Scaled-v0", box))
    assert games.spec == envs.Spec((1, 64, 64), 2, False)
    assert games.description == "2 continuous actions, its observation as 64x64 gray"
    np.testing.assert_array_equal(games.action_low, [0, -2])
    np.testing.assert_array_equal(games.action_high, [1, 6])
    games.reset([0])
    for action in ([-1, -1], [1, 1], [0, 0.5], [5, -9]):
        games.step(np.array([action], np.float32))
    given: list[np.ndarray] = games._copies[0].unwrapped.given  # type: ignore[attr-defined]
    np.testing.assert_allclose(given, np.array([[0, -2], [1, 6], [0.5, 4], [1, -2]]))
    assert all(action.dtype == np.float32 and box.contains(action) for action in given)


def test_discrete_actions_may_start_anywhere() -> None:
    games = build(register("Started-v0", spaces.Discrete(3, start=5)))
    games.reset([0])
    games.step(np.array([2]))
    assert games._copies[0].unwrapped.given == [7]  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="no such action"):
        games.step(np.array([3]))


@pytest.mark.parametrize("shape", [(48, 40, 3), (48, 40, 1), (48, 40)])
@pytest.mark.parametrize("gray", [True, False])
def test_pictures_of_any_size_and_colour(shape: tuple[int, ...], gray: bool) -> None:
    games = build(register("Shaped-v0", spaces.Discrete(2), spaces.Box(0, 255, shape, np.uint8)), gray=gray, size=32)
    assert games.reset([0]).shape == (1, 1 if gray else 3, 32, 32)
    assert games.render().shape == (48, 40, 3)


def test_rewards_are_clipped_and_scores_are_not() -> None:
    games = build(register("Paid-v0", spaces.Discrete(2)), clip_rewards=True)
    games.reset([0])
    step = games.step(np.zeros(1, np.int64))
    assert step.reward[0] == 1.0 and step.score[0] == 2.5


def test_keys() -> None:
    keys = build("CatchContinuous-v0").keys_to_action()
    assert keys is not None and keys[("a",)] == -1 and keys[("d",)] == 1
    assert build("Catch-v0").keys_to_action() == {("a",): 0, ("e",): 1, ("d",): 2}
    assert build("Count-v0").keys_to_action() is None


@pytest.mark.parametrize(
    ("actions", "observations", "sentence"),
    [
        (spaces.Discrete(2), spaces.Box(-1, 1, (4,)), "has no pictures"),
        (spaces.Discrete(2), spaces.Box(0, 255, (128,), np.uint8), "has no pictures"),
        (spaces.Discrete(2), spaces.Box(0, 255, (4, 4), np.uint8), "has no pictures"),
        (spaces.MultiDiscrete([2, 2]), PICTURE, "has MultiDiscrete actions"),
        (spaces.Dict({"a": spaces.Discrete(2)}), PICTURE, "has Dict actions"),
        (spaces.Box(-np.inf, np.inf, (2,)), PICTURE, "without bounds"),
    ],
)
def test_games_that_cannot_be_played_are_refused(actions: Any, observations: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(register("Refused-v0", actions, observations))


def test_a_missing_package_is_named() -> None:
    def fail(**_: Any) -> gymnasium.Env[Any, Any]:
        raise error.DependencyNotInstalled('Box2D is not installed, run `pip install "gymnasium[box2d]"`')

    gymnasium.registry.pop("Missing-v0", None)
    gymnasium.register("Missing-v0", fail)
    with pytest.raises(UserError, match=r'needs a package.*pip install "gymnasium\[box2d\]"'):
        build("Missing-v0")


@pytest.mark.parametrize("settings", [{"sticky": 0.25}, {"noops": 30}, {"life_loss": True}])
def test_settings_for_atari_are_refused_elsewhere(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"game.{next(iter(settings))} is for Atari"):
        build("Catch-v0", **settings)
    build("Catch-v0", sticky=0.0, noops=0, life_loss=False)


@pytest.mark.parametrize(
    ("env", "hint"),
    [
        ("ALE/Pnog-v5", "Did you mean ALE/Pong-v5?"),
        ("pong", "Did you mean ALE/Pong-v5?"),
        ("PongNoFrameskp-v4", "Did you mean PongNoFrameskip-v4?"),
        ("CarRacing", "Did you mean CarRacing-v3?"),
        ("Cach-v0", "Did you mean Catch-v0?"),
        ("qwertzuiop", "for example ALE/Pong-v5"),
        ("no_such_module:Game-v0", "cannot be imported"),
    ],
)
def test_an_unknown_environment_is_one_sentence_with_a_hint(env: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        build(env)
    assert hint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"size": 4}, {"sticky": 1.5}, {"noops": -1}, {"action_repeat": 0}, {"max_steps": 0}, {"num_envs": 0}],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"game.{next(iter(settings))} must be"):
        make_games("ALE/Pong-v5", GameConfig(**settings))


def test_nearest() -> None:
    assert nearest("Evaluate", ["evaluate", "train"]) == "Did you mean evaluate?"
    assert nearest("evl", ["evaluate", "train"]) == ""
    assert nearest("evalute", ["evaluate", "train"]) == "Did you mean evaluate?"
    assert nearest("lr", ["batch", "model.lr"]) == "Did you mean model.lr?"
    assert nearest("", ["a"]) == nearest("zzz", []) == ""
