"""What keys mean: the game's own, arrows beside letters, and something to press in games that name no keys."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from envs.controls import Controls
from envs.games import GameConfig
from envs.make import make_games


def of(env: str) -> Controls:
    games = make_games(env, GameConfig(gray=False), 1)
    try:
        return Controls.of(games)
    finally:
        games.close()


class Named:
    """Stands for a game that names no keys."""

    def __init__(self, low: Any = None, high: Any = None, names: tuple[str, ...] = ()) -> None:
        self.action_low, self.action_high = (None if b is None else np.array(b, np.float32) for b in (low, high))
        self.action_names = names or tuple(f"action {i}" for i in range(len(low)))

    def keys_to_action(self) -> None:
        return None


def made(*args: Any, **kwargs: Any) -> Controls:
    return Controls.of(Named(*args, **kwargs))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("held", "name"),
    [
        ((), "NOOP"),
        (("space",), "FIRE"),
        (("d",), "RIGHT"),
        (("right",), "RIGHT"),
        (("left", "space"), "LEFTFIRE"),
        (("d", "space", "q"), "RIGHTFIRE"),
        (("up",), "RIGHT"),  # nothing goes up in Pong, whose paddle goes up on RIGHT
        (("s",), "LEFT"),
        (("q",), "NOOP"),
    ],
)
def test_pong(held: tuple[str, ...], name: str) -> None:
    pong = of("ALE/Pong-v5")
    action = pong.action(held)
    assert isinstance(action, int) and pong.names[action] == name and pong.native(action) == action


def test_where_up_has_a_meaning_it_is_up() -> None:
    boxing = of("ALE/Boxing-v5")
    chosen = [boxing.action(held) for held in (("up",), ("up", "right"), ("down", "left", "space"))]
    assert [boxing.names[action] for action in chosen if isinstance(action, int)] == ["UP", "UPRIGHT", "DOWNLEFTFIRE"]


def test_a_game_that_waits_with_another_action_than_0() -> None:
    catch = of("Catch-v0")
    assert catch.action([]) == 1 and catch.action(["left"]) == 0 and catch.action(["right"]) == 2


def test_continuous_actions_of_the_games_own_keys() -> None:
    catch = of("CatchContinuous-v0")
    assert [catch.action(held) for held in ([], ["left"], ["d"])] == [(0.0,), (-1.0,), (1.0,)]
    assert catch.low == (-1.0,) and not catch.discrete


def test_digits_choose_where_no_keys_are_named() -> None:
    lander = made(names=("nothing", "left", "main", "right"))
    assert [lander.action(held) for held in ([], ["1"], ["3"], ["4", "x"], ["5"])] == [0, 0, 2, 3, 0]


def test_one_sided_dimensions_have_one_key_as_in_car_racing() -> None:
    car = made([-1, 0, 0], [1, 1, 1])
    assert car.action([]) == (0, -1, -1) and car.native(car.action([])).tolist() == [0, 0, 0]
    assert car.native(car.action(["left", "up"])).tolist() == [-1, 1, 0]
    assert car.native(car.action(["d", "s"])).tolist() == [1, 0, 1], "letters stand for arrows"


def test_two_dimensions_and_more_than_there_are_keys_for() -> None:
    arm = made([-2] * 6, [2] * 6)
    assert arm.action(["right", "down", "a"]) == (1, -1, -1, 0, 0, 0)
    assert arm.native(arm.action(["up"])).tolist() == [0, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("env", ["ALE/Pong-v5", "CatchContinuous-v0", "Count-v0"])
def test_as_json(env: str) -> None:
    controls = of(env)
    assert Controls.from_dict(json.loads(json.dumps(controls.to_dict()))) == controls


@pytest.mark.parametrize(
    "change", [{"names": []}, {"keys": [[["a"], 1]]}, {"keys": 3}, {"low": ["x"]}, {"names": None}]
)
def test_what_is_no_controls(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Controls.from_dict(of("Count-v0").to_dict() | change)
    with pytest.raises(ValueError):
        Controls.from_dict({})
