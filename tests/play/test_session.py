"""The table: what keys, rewinding, keeping and switching do to the dream and to the real game."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from envs.controls import Controls
from envs.errors import UserError
from play import keys, past
from play.session import GameSession
from tests import tables
from tests.tables import WAYS, follow, seen
from world_model import trees
from world_model.interface import to_pixels, to_unit


def same(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("mode", ["real", "both"])
def test_keys_reach_the_game(mode: str) -> None:
    """The picture is that of the game itself under the actions that the keys mean."""
    made, games = tables.table(mode), tables.game("Catch-v0")
    games.reset([made.now.seed])
    for held, action in zip(WAYS[:5], (2, 0, 2, 1, 1), strict=True):
        made.step(held)
        brought = games.step(np.array([action]))
        assert made.now.action == action and made.now.real is not None
        assert np.array_equal(made.now.real.picture, brought.frame[0].transpose(1, 2, 0))
    made.close()


def test_continuous_actions() -> None:
    made = tables.table("both", "CatchContinuous-v0")
    for held, speed in ((["a"], -1.0), (["d"], 1.0), ([], 0.0)):
        made.step(held)
        assert made.now.action == (speed,)
    for player in ("agent", "random"):
        made.set_player(player)
        made.step()
        assert isinstance(made.now.action, tuple) and -1 <= made.now.action[0] <= 1
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["probabilities"] is None
    made.close()


@pytest.mark.parametrize("mode", ["dream", "real", "both"])
def test_seed_and_keys_determine_everything(mode: str) -> None:
    parts = tables.parts()
    a, b = GameSession(parts, seed=5), GameSession(parts, seed=5)
    for made in (a, b):
        made.set_mode(mode)
    torch.manual_seed(1)
    rng_state = torch.get_rng_state()
    first = follow(a)
    assert torch.equal(torch.get_rng_state(), rng_state)  # nobody else's random numbers are drawn
    assert same(first, follow(b))
    assert not same(first[:1], first[1:2])
    other = GameSession(parts, seed=6)
    other.set_mode(mode)
    assert not same(first, follow(other))


@pytest.mark.parametrize("recipe", ["reverie", "iris", "iris_ac"])
@pytest.mark.parametrize("mode", ["dream", "real", "both"])
def test_rewind_and_keep(mode: str, recipe: str) -> None:
    """Going back and doing the same brings the same; doing something else does not touch what was kept."""
    made = tables.table(mode, recipe=recipe)
    follow(made)
    made.save()
    ahead = follow(made)
    assert made.rewind(len(WAYS)) and made.now.step == len(WAYS)
    assert same(follow(made), ahead)
    made.rewind(3)
    follow(made, (["d"], ["d"]))  # another future
    made.load()
    assert made.now.step == len(WAYS)
    assert same(follow(made), ahead)
    made.close()


def test_what_the_policy_sees_is_what_is_shown() -> None:
    """A policy that looks at decoded frames sees the one that was decoded for the screen."""
    made = tables.table(recipe="iris")
    follow(made, WAYS[:3])
    dream = made.now.dream
    assert dream is not None
    with made.dreamer.rng_scope():
        assert torch.equal(made.now.view, made.dreamer.model.features(dream.state))
    assert np.array_equal(to_pixels(made.now.view.view(3, 64, 64)), dream.picture)


def test_rewind_ends_at_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "KEPT", 4)
    made = tables.table()
    made.set_fps(1)
    monkeypatch.setattr(past, "SECONDS", 0)
    follow(made)
    assert made.rewind(100) and made.now.step == len(WAYS) - 4
    assert not made.rewind(1)
    assert not made.turn(back=True)


def test_at_least_ten_seconds_can_be_rewound() -> None:
    for fps in (1, 15, 60, 240):
        assert max(past.KEPT, past.SECONDS * fps) >= 10 * fps


@pytest.mark.parametrize("recipe", ["reverie", "spatial"])
def test_what_is_remembered_takes_no_more_than_so_much(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tables.table("both", recipe=recipe)
    follow(made)
    sizes = [moment.size_bytes for moment, _ in made._past._moments]
    monkeypatch.setattr(past, "MOST_BYTES", 3.5 * max(sizes))
    follow(made)
    assert len(made._past) == 3
    held = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in tensors(made)}
    assert sum(held.values()) <= past.MOST_BYTES, "no part of a larger tensor keeps the whole"
    monkeypatch.setattr(past, "MOST_BYTES", 0)
    made.save()
    for _ in range(5):
        made.load()
    assert len(made._past) == 1
    made.close()


def tensors(made: GameSession) -> list[torch.Tensor]:
    """All that the moments to rewind to keep of states."""
    sides = [side for moment, _ in made._past._moments for side in (moment.real, moment.dream) if side is not None]
    return [leaf for side in sides for leaf in trees.leaves(side.state)]


def test_pause_and_single_step() -> None:
    made = tables.table()
    made.paused = True
    assert not made.turn(["d"]) and made.now.step == 0
    made.step(["d"])
    assert made.now.step == 1 and made.paused
    assert made.turn(back=True) and made.now.step == 0  # time can be turned back while it stands


def test_both_dreams_on_from_the_real_game() -> None:
    made = tables.table("both")
    model = made.parts.world.model
    follow(made)
    real, dream = made.now.real, made.now.dream
    assert real is not None and dream is not None and real.frame is not None
    assert made.now.horizon == len(WAYS)
    apart = np.abs(real.picture.astype(int) - dream.picture.astype(int))
    shown = np.sqrt(255 * apart.astype(np.float32))
    assert np.array_equal(made.now.pictures()["difference"], shown.astype(np.uint8))
    made.sync()
    assert made.now.horizon == 0 and made.now.dream is not None
    with torch.inference_mode():
        kept = to_pixels(model.picture(model.start(to_unit(torch.from_numpy(real.frame[None, None])))))[0]
    assert np.array_equal(made.now.dream.picture, kept)
    made.close()


def test_the_real_game_is_shown_as_large_as_it_is_also_in_the_past() -> None:
    made = tables.table("both", env="MountainCar-v0", size=16)
    first = made.now.pictures(film=True)
    assert first["real"].shape == (400, 600, 3) and first["dream"].shape == first["difference"].shape == (16, 16, 3)
    assert made.now.pictures()["real"].shape == (16, 16, 3), "as the agent sees it"
    assert made.aspect("real") == 1.5
    for _ in range(3):
        made.step()
    assert not np.array_equal(made.now.pictures(film=True)["real"], first["real"])
    made.rewind(3)
    assert np.array_equal(made.now.pictures(film=True)["real"], first["real"])
    made.close()


def test_modes_go_on_where_the_real_game_stands() -> None:
    made = tables.table("real")
    follow(made)
    before = made.now.real
    made.set_mode("both")
    assert made.now.real is before and made.now.dream is not None and made.now.horizon == 0
    made.set_mode("dream")
    assert made.now.real is None and list(made.now.pictures()) == ["dream"]
    made.step(["d"])
    made.set_mode("real")  # no game can be made of a dream: a new one begins
    assert made.now.step == 0 and list(made.now.pictures()) == ["real"]
    made.close()


def test_the_agent_and_chance_play() -> None:
    made = tables.table()
    policy = made.parts.learner.policy
    made.set_player("agent")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        list(policy.parameters())[-1][1] = 50.0
    made.reset()
    for _ in range(5):
        made.step(["d"])
        assert (
            made.now.action == 1
            and made.now.estimate.probabilities is not None
            and made.now.estimate.probabilities[1] > 0.9
        )
    made.set_player("random")
    drawn = set()
    for _ in range(40):
        made.step(["d"])
        drawn.add(made.now.action)
    assert drawn == {0, 1, 2}
    made.set_player("human")
    made.step(["d"])
    assert made.now.action == 2


def test_a_game_that_is_over_begins_anew() -> None:
    made = tables.table("real")
    steps = 0
    while not made.now.done:
        made.step()
        steps += 1
    assert steps == 79 and made.now.real is not None  # ten blocks: seven steps to fall, one to begin again
    assert abs(made.now.real.total) <= 10
    made.step()
    assert made.now.step == 0 and made.now.seed == 1 and not made.now.done
    made.close()


def test_a_dream_ends_by_its_own_continuation() -> None:
    made = tables.table()
    tables.sooner(made.parts.world.model, 1_000)
    made.step()
    assert made.now.done
    made.step()
    assert made.now.step == 0 and made.now.seed == 1


def test_starts() -> None:
    made = tables.table()
    shown = []
    for start in range(3):
        made.reset(start)
        assert made.now.start == start
        shown.append(seen(made)[0])
    assert not np.array_equal(shown[0], shown[1])
    made.reset(0)
    assert np.array_equal(seen(made)[0], shown[0])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda made: made.set_mode("dreams"), lambda made: made.set_player(None),
        lambda made: made.set_temperature(float("nan")), lambda made: made.set_temperature("1"),
        lambda made: made.set_temperature(-1), lambda made: made.set_fps(0), lambda made: made.set_fps(True),
        lambda made: made.reset(3), lambda made: made.load(), lambda made: made.sync(),
        lambda made: made.set_component(1),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_changes_nothing(wrong: Callable[[GameSession], None]) -> None:
    made = tables.table()
    made.step(["d"])
    before = made.now
    with pytest.raises(UserError):
        wrong(made)
    assert made.now is before and (made.temperature, made.fps, made.player) == (1.0, 15, "human")


def test_a_component_of_the_mixture_is_switched_off_and_on() -> None:
    made = tables.table(recipe="world_models_ac")
    count = made.parts.world.model.components
    for number in range(1, count):
        made.set_component(number)
    assert made.to_dict()["off"] == [str(number) for number in range(1, count)]
    for wrong in (count, 0, count + 1, True, "1"):
        with pytest.raises(UserError):
            made.set_component(wrong)  # type: ignore[arg-type]
    made.step()
    assert made.now.dream is not None and made.now.dream.state.memory["off"][0].tolist() == [True] * (count - 1) + [
        False
    ]
    for number in range(1, count):
        made.set_component(number)
    made.step()
    assert made.to_dict()["off"] == [] and "off" not in made.now.dream.state.memory


def test_without_the_real_game_the_dream_goes_on() -> None:
    def missing() -> None:
        raise UserError("Catch-v0 is not installed.")

    made = GameSession(replace(tables.parts(), game=missing))  # type: ignore[arg-type]
    for mode in ("real", "both"):
        with pytest.raises(UserError, match="not installed"):
            made.set_mode(mode)
    made.step()
    assert made.now.mode == "dream" and made.now.step == 1


def test_a_model_gone_astray_can_still_be_told() -> None:
    made = tables.table()
    learner: Any = made.parts.learner
    with torch.no_grad():
        for parameter in learner.critic.parameters():
            parameter.fill_(float("nan"))
    made.step()
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["value"] is None


def test_temperature_zero_is_the_most_likely_dream() -> None:
    parts = tables.parts()
    cold = [GameSession(parts, seed=seed, temperature=0) for seed in (1, 2)]
    for made in cold:
        made.reset(0, made.now.seed)
    assert same(follow(cold[0]), follow(cold[1]))


def test_keys_of_the_game_are_the_games() -> None:
    controls = Controls(("WAIT", "JUMP"), (((), 0), (("p",), 1)))
    assert "pause" not in {key.command for key in keys.free(controls)}
    assert {key.command for key in keys.KEYS} - {key.command for key in keys.free(controls)} == {"pause"}
    assert keys.spoken(controls) == [{"keys": "p", "words": "jump"}]
    assert keys.pad(tables.parts().world.controls) == ["left", "right", "up", "down"]
    assert keys.known(["a", 3, None, "x" * 99, {}]) == {"a"}


def test_a_key_that_means_nothing_alone_is_a_key_of_the_game() -> None:
    """Kung-Fu Master has no lone FIRE: space punches beside a direction."""
    chords = (((), 0), (("d",), 1), (("a",), 2), (("d", "space"), 3), (("a", "space"), 4))
    controls = Controls(("NOOP", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"), chords)
    assert keys.pad(controls) == ["left", "right", "up", "down", "space"]
    lines = {line["keys"]: line["words"] for line in keys.spoken(controls)}
    assert lines == {"d": "right", "a": "left", "space": "with d: rightfire, with a: leftfire"}


@pytest.mark.parametrize("name", ["pong", "kungfumaster"])
def test_every_action_of_what_ships_can_be_played(name: str) -> None:
    """By keys that the page sends, of which the exported one keeps a list."""
    place = "" if name == "pong" else f"{name}/"
    told = json.loads((Path(__file__).parents[2] / "docs/play" / place / "dream.json").read_text())
    chords = tuple((tuple(chord), action) for chord, action in told["keys"])
    controls = Controls(tuple(told["hello"]["actions"]), chords)
    assert (told["hello"]["pad"], told["hello"]["game_keys"]) == (keys.pad(controls), keys.spoken(controls))
    sent = {*keys.pad(controls), *(line["keys"] for line in keys.spoken(controls))}
    assert {controls.action(sent.intersection(chord)) for chord, _ in chords} == set(range(len(controls.names)))


def test_a_model_that_went_astray_acts_without_a_number() -> None:
    made = tables.table(env="CatchContinuous-v0")
    made.now = made.now._replace(action=(float("nan"),))
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["action"] == [None]


def test_going_on_after_a_rewind_keeps_no_frame_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tables.table("real")
    follow(made)
    assert made._real is not None
    restore, traces = made._real.games.restore, []
    monkeypatch.setattr(made._real.games, "restore", lambda *given: traces.append(restore(*given)))
    made.rewind(3)
    made.step(["d"])
    ((trace,),) = traces
    assert len(trace.frame) == 1
    made.close()
