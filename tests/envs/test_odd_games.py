"""Games that are not as gymnasium's: what is taken, what is mended and said, and what is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import WrapperSpec

from envs import GameConfig, Games, UserError
from envs.atari import AtariGames
from envs.controls import Controls
from envs.games import GameFailed
from envs.gym import GymGames, find
from envs.make import make_games, timing_of
from envs.pictures import as_picture, could_be_picture

SIDE = 24
SHOWN = np.full((SIDE, SIDE, 3), 90, np.uint8)  # what it draws
SHOWN[4:12, 4:12] = (250, 10, 10)


class Odd(gymnasium.Env[Any, Any]):
    """Every part can be replaced: `draws` and `sees` give pictures, `pays` rewards, `lasts` steps."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def __init__(
        self, render_mode: str | None = None, *, space: spaces.Space[Any] | None = None,
        actions: spaces.Space[Any] | None = None, sees: Callable[[], Any] = SHOWN.copy,
        draws: Callable[[int], Any] = lambda t: SHOWN, pays: Callable[[int], Any] = lambda t: 1.0,
        lasts: int = 8, more: int = 0,
    ) -> None:  # fmt: skip
        self.render_mode, self.sees, self.draws, self.pays, self.lasts = render_mode, sees, draws, pays, lasts
        self.observation_space = space or spaces.Box(0, 255, SHOWN.shape, np.uint8)
        self.action_space = actions or spaces.Discrete(3 + more)
        self.t, self.given = 0, list[Any]()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.t = 0
        return self.sees(), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.t += 1
        self.given.append(action)
        return self.sees(), self.pays(self.t), self.t >= self.lasts, False, {}

    def render(self) -> Any:
        return self.draws(self.t)


def made(kind: Callable[..., Any] = Odd, num: int = 1, settings: dict[str, Any] | None = None, **kwargs: Any) -> Games:
    gymnasium.registry.pop("Odd-v0", None)
    gymnasium.register("Odd-v0", kind, kwargs=kwargs)
    return make_games("Odd-v0", GameConfig(gray=False, size=SIDE, **(settings or {})), num)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    gymnasium.registry.pop("Odd-v0", None)


def raising() -> Any:
    raise RuntimeError("cannot open display\nand more")


SAME = SHOWN.transpose(2, 0, 1)
GRAY = SHOWN[..., 0]


@pytest.mark.parametrize(
    ("space", "sees", "draws", "seen", "expected"),
    [
        (None, SHOWN.copy, lambda t: None, "observation", SHOWN),
        (None, SHOWN.copy, lambda t: raising(), "observation", SHOWN),
        (None, lambda: (SHOWN / 255).astype(np.float32), lambda t: SHOWN, "render", SHOWN),
        (None, lambda: (SHOWN / 255).astype(np.float32), lambda t: None, "observation", SHOWN),
        (spaces.Box(0, 3, (20, 20), np.uint8), lambda: np.ones((20, 20), np.uint8), lambda t: SHOWN, "render", SHOWN),
        (spaces.Box(-1, 1, (2,)), lambda: np.zeros(2), lambda t: np.dstack([SHOWN, GRAY]), "render", SHOWN),
        (spaces.Box(-1, 1, (2,)), lambda: np.zeros(2), lambda t: GRAY, "render", np.stack([GRAY] * 3, 2)),
        (spaces.Box(-1, 1, (2,)), lambda: np.zeros(2), lambda t: SHOWN / 255, "render", SHOWN),
        (spaces.Box(-1, 1, (2,)), lambda: np.zeros(2), lambda t: SHOWN.tolist(), "render", SHOWN),
        (spaces.Box(0, 255, SAME.shape, np.uint8), lambda: SAME, lambda t: None, "observation", SHOWN),
        (spaces.Box(-1, 1, SHOWN.shape), lambda: SHOWN / 127.5 - 1, lambda t: None, "observation", SHOWN),
        (
            spaces.Dict(image=spaces.Box(0, 255, SHOWN.shape, np.uint8), pocket=spaces.Discrete(3)),
            lambda: {"image": SHOWN, "pocket": 1}, lambda t: None, "observation", SHOWN,
        ),
    ],
)  # fmt: skip
def test_a_picture_is_found(space: Any, sees: Any, draws: Any, seen: str, expected: np.ndarray) -> None:
    """Whatever its layout and numbers; which one it is stands in the description, and films are of the same."""
    games = made(space=space, sees=sees, draws=draws)
    assert f"its {seen} as {SIDE}x{SIDE} RGB" in games.description
    assert ("although its space says otherwise" in games.description) == (space is None and sees().dtype != np.uint8)
    for frame in (games.reset([0])[0], games.step(np.array([1])).frame[0]):
        assert np.abs(frame.transpose(1, 2, 0).astype(int) - expected).max() <= 1
    assert np.abs(games.render().astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("space", "draws", "words"),
    [
        (spaces.Box(-1, 1, (2,)), lambda t: None, r"float32 \(2,\) of -1 to 1.*it gives NoneType"),
        (spaces.Box(0, 3, (20, 20), np.uint8), lambda t: raising(), "raises RuntimeError: cannot open display"),
        (spaces.Box(-1, 1, (2,)), lambda t: np.zeros((4, 4, 7)), r"it gives float64 \(4, 4, 7\)"),
        (spaces.Discrete(3), lambda t: [SHOWN], "it gives list"),
    ],
)
def test_no_picture_is_said_with_what_there_is(space: Any, draws: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"has no pictures: its observations are none .*{words}"):
        made(space=space, sees=lambda: np.zeros(2), draws=draws)


def test_a_film_is_of_the_observation_where_the_render_fails_later() -> None:
    games = made(draws=lambda t: SHOWN if t < 2 else raising())
    games.reset([0])
    for _ in range(4):
        games.step(np.array([0]))
        assert np.array_equal(games.render(), SHOWN)


@pytest.mark.parametrize("reward", [np.array([2.0]), np.array([[2]]), 2, np.float64(2), True + 1])
def test_a_reward_of_one_number_is_taken(reward: Any) -> None:
    games = made(pays=lambda t: reward)
    games.reset([0])
    assert games.step(np.array([0])).reward.tolist() == [2.0]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1e39, None, np.ones(2), "two"])
def test_any_other_reward_is_refused_where_it_enters(reward: Any) -> None:
    games = made(pays=lambda t: reward if t == 3 else 0)
    games.reset([0])
    games.step(np.array([0]))
    games.step(np.array([0]))
    with pytest.raises(GameFailed, match="Odd-v0 failed in step 3 of an episode: its reward is no finite number"):
        games.step(np.array([0]))


def test_what_the_game_raises_is_one_sentence() -> None:
    games = made(pays=lambda t: raising() if t == 2 else 0)
    games.reset([0])
    games.step(np.array([0]))
    with pytest.raises(GameFailed) as failed:
        games.step(np.array([0]))
    said, place = str(failed.value).split(" (")
    assert said == "Odd-v0 failed in step 2 of an episode: RuntimeError: cannot open display"
    assert place.startswith("test_odd_games.py:")
    later = made(space=spaces.Box(-1, 1, (2,)), sees=lambda: np.zeros(2), draws=lambda t: SHOWN if t < 2 else None)
    later.reset([0])
    later.step(np.array([0]))
    with pytest.raises(GameFailed, match="it gives NoneType"):
        later.step(np.array([0]))


class Refuses(Odd):
    def __init__(self, level: int, render_mode: str | None = None) -> None:
        super().__init__(render_mode, more=level)
        if level > 3:
            raise RuntimeError("no licence for the engine")


def test_a_game_is_made_with_its_arguments() -> None:
    assert made(Refuses, settings={"kwargs": {"level": 2}}).spec.action_size == 5
    with pytest.raises(UserError, match=r"Odd-v0 cannot be made: .*'level'.*game.kwargs=\{name: value\}"):
        made(Refuses)
    with pytest.raises(UserError, match="Odd-v0 cannot be made: RuntimeError: no licence for the engine.$"):
        made(Refuses, settings={"kwargs": {"level": 4}})


# ---- actions ----
class Named(Odd):
    """Six actions with names and keys."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode, more=3)

    def get_action_meanings(self) -> list[str]:
        return ["NOOP", "UP", "DOWN", "LEFT", "RIGHT", "FIRE"]

    def get_keys_to_action(self) -> dict[tuple[str, ...], int]:
        return {("w",): 1, (" ",): 5}


class Fewer(gymnasium.ActionWrapper[Any, Any, Any]):
    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.action_space = spaces.Discrete(3)

    def action(self, action: int) -> int:
        return [0, 3, 5][action]


def test_the_action_space_alone_decides() -> None:
    plain = made(Named)
    assert plain.action_names[5] == "FIRE" and plain.keys_to_action() == {("w",): 1, (" ",): 5}
    fewer = made(lambda render_mode=None: Fewer(Named(render_mode)))
    assert fewer.action_names == ("action 0", "action 1", "action 2") and fewer.keys_to_action() is None
    fewer.reset([0])
    fewer.step(np.array([2]))
    assert fewer._copies[0].unwrapped.given == [5]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("low", "high"),
    [([-0.3] * 3, [0.9] * 3), ([-1, 0.5], [1, 0.5]), ([0, -0.52], [800, 0.52]), ([-0.1], [0.7])],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_lie_within_their_bounds(low: list[float], high: list[float], dtype: Any) -> None:
    """To the last bit and in the space's own type (the game asserts it); a constant stays one, in the controls too."""
    space = spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    games = made(actions=space, lasts=400)
    games.reset([0])
    rng, size = np.random.default_rng(0), len(low)
    for actions in (-np.ones(size), np.ones(size), *rng.uniform(-1, 1, (200, size))):
        games.step(actions[None].astype(np.float32))
    assert games._copies[0].unwrapped.given[0].tolist() == space.low.tolist()  # type: ignore[attr-defined]
    controls = Controls.of(games)
    assert controls == Controls.from_dict(controls.to_dict())
    assert all(np.isfinite(action).all() for _, action in controls.keys)


@pytest.mark.parametrize("bound", [np.inf, np.finfo(np.float32).max])
def test_bounds_that_nothing_can_be_scaled_to_are_refused(bound: float) -> None:
    with pytest.raises(UserError, match="without bounds"):
        made(actions=spaces.Box(-bound, bound, (1,)))


# ---- ids ----
def test_a_module_before_an_id_stays_in_the_suggestion() -> None:
    with pytest.raises(UserError, match="Did you mean envs:Catch-v0?"):
        find("envs:Catch")
    assert isinstance(make_games("ale_py:ALE/Pong-v5", GameConfig(), 1), AtariGames)


ATARI = {"game": "pong", "frameskip": 4, "repeat_action_probability": 0.0}


@pytest.mark.parametrize(
    ("more", "plain"),
    [({}, True), ({"difficulty": 1}, False), ({"mode": 1}, False), ({"obs_type": "grayscale"}, False)],
)
def test_atari_by_one_s_own_registration_means_what_it_says(more: dict[str, Any], plain: bool) -> None:
    gymnasium.registry.pop("Odd-v0", None)
    gymnasium.register("Odd-v0", "ale_py.env:AtariEnv", kwargs=ATARI | more)
    games = make_games("Odd-v0", GameConfig(), 1)
    assert isinstance(games, AtariGames if plain else GymGames) and games.spec.action_size == 6
    assert games.reset([0]).shape == (1, 1, 64, 64)
    games.close()


def test_limits_and_wrappers_of_an_atari_game_count() -> None:
    gymnasium.register("Odd-v0", "ale_py.env:AtariEnv", max_episode_steps=5, kwargs=ATARI)
    games = make_games("Odd-v0", GameConfig(), 1)
    games.reset([0])
    assert [bool(games.step(np.array([0])).truncated[0]) for _ in range(5)] == [False] * 4 + [True]
    gymnasium.registry.pop("Odd-v0")
    wrapped = (WrapperSpec("Fewer", f"{__name__}:Fewer", {}),)
    gymnasium.register("Odd-v0", "ale_py.env:AtariEnv", additional_wrappers=wrapped, kwargs=ATARI)
    assert make_games("Odd-v0", GameConfig(), 1).spec.action_size == 3
    with pytest.raises(UserError, match="game.noops is for Atari games with a fixed frame skip"):
        make_games("Odd-v0", GameConfig(noops=3), 1)


def test_what_gymnasium_plays_of_atari_skips_and_repeats_as_it_is_asked_to() -> None:
    """Not on top of what its id does."""
    config = GameConfig(sticky=0.5, action_repeat=3, kwargs={"difficulty": 1})
    games = make_games("ALE/Pong-v5", config, 1)
    assert isinstance(games, GymGames) and games.description.startswith("3 frames a step, sticky 0.5")
    emulator = games._copies[0].unwrapped.ale  # type: ignore[attr-defined]
    assert emulator.getFloat("repeat_action_probability") == 0.5
    games.reset([0])
    before = emulator.getEpisodeFrameNumber()
    games.step(np.array([0]))
    assert emulator.getEpisodeFrameNumber() == before + 3
    assert timing_of("ALE/Pong-v5", config) == {"action_repeat": 3, "sticky": 0.5}
    games.close()


class Changes(gymnasium.Env[np.ndarray, int]):
    """Says that it shows bytes, and shows something else after a reset."""

    observation_space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    action_space = spaces.Discrete(2)  # type: ignore[assignment]
    then: Any = None

    def reset(self, **how: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.full((32, 32, 3), 255, np.uint8), {}

    def step(self, action: int) -> Any:
        if isinstance(self.then, Exception):
            raise self.then
        return self.then, 0.0, False, False, {}


@pytest.mark.parametrize(
    ("then", "sentence"),
    [
        (
            np.ones((32, 32, 3)),
            r"step 1 of an episode: an observation is float64 \(32, 32, 3\), and the first was uint8",
        ),
        (np.zeros((16, 32, 3), np.uint8), r"an observation is uint8 \(16, 32, 3\), and the first was"),
        (np.zeros(12), r"step 1 of an episode: an observation is no picture but float64 \(12,\)"),
        (KeyError("ghost"), r"step 1 of an episode: KeyError: 'ghost' \(test_odd_games.py:\d+\)"),
    ],
)
def test_what_a_game_does_wrong_in_a_step_is_told_with_what_and_where(then: Any, sentence: str) -> None:
    gymnasium.registry.pop("Changes-v0", None)
    gymnasium.register("Changes-v0", f"{__name__}:Changes", disable_env_checker=True)
    Changes.then = then
    games = make_games("Changes-v0", GameConfig(), 1)
    games.reset([0])
    with pytest.raises(GameFailed, match=sentence):
        games.step(np.array([0]))


def test_a_stack_of_gray_frames_is_no_colour_picture() -> None:
    """Its last frame would be left out for opacity."""
    assert as_picture(np.zeros((4, 84, 84), np.uint8)) is None
    assert not could_be_picture(spaces.Box(0, 255, (4, 84, 84), np.uint8))
    seen = as_picture(np.zeros((84, 84, 4), np.uint8))
    assert seen is not None and seen.shape == (84, 84, 3)
