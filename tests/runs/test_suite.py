"""Frozen episodes: the same for every model, played again to the bit; and what the emulator knows of their things."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from envs.atari import rom
from envs.errors import UserError
from envs.games import GameConfig
from envs.make import make_games
from main import main
from runs.measure import atari, suite
from runs.measure.fidelity import parts
from runs.measure.suite import CONTEXT, SUITES, SuiteConfig
from tests.opened import opened
from tests.runs.test_fidelity import loaded
from tests.trained import make

CATCH = SUITES / "Catch-v0-repeat1-sticky0.npz"


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.npz")), ids=lambda path: path.stem)
def test_a_committed_suite_is_small_and_complete(path: Path) -> None:
    found = suite.read(path)
    assert path.stat().st_size < 100_000 and path.name == suite.place(found.env, found.rules).name
    steps = Counter[int]()
    for kind, taken in zip(found.kind.tolist(), found.action, strict=True):
        steps[kind] += len(taken)
    assert set(steps.values()) == {suite.STEPS} and len(set(found.seed.tolist())) == len(found.seed)
    every, fast = suite.contexts(found, "gold"), suite.contexts(found, "fast")
    assert len(fast) == min(6_000, len(every)) and set(suite.contexts(found, "canary")) < set(fast) <= set(every)
    assert all(CONTEXT <= one.now + 1 <= len(found.action[one.episode]) for one in every)


def test_the_file_alone_decides_on_contexts_balanced_over_play_and_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = suite.read(CATCH)
    chosen = suite.contexts(found, "canary")
    assert chosen == suite.contexts(suite.read(CATCH), "canary") == sorted(chosen) and len(set(chosen)) == 500
    groups = Counter((int(found.kind[i]), int(found.action[i][t])) for i, t in chosen)
    assert len(groups) == 9 and max(groups.values()) - min(groups.values()) <= 1
    monkeypatch.setitem(suite.TIERS, "canary", 20)
    models = [loaded("reverie"), loaded("world_models", size=32, gray=True)]
    played = [dict(suite.episodes(found, model.config.game)) for model in models]
    one, other = (
        next(parts(found, model, suite.contexts(found, "canary"), {}, games)).batch
        for model, games in zip(models, played, strict=True)
    )
    assert one.frame.shape[2:] == (3, 64, 64) and other.frame.shape[2:] == (1, 32, 32)
    for name in ("action", "reward", "terminated", "valid"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("name", ["Catch-v0-repeat1-sticky0", "ALE-Pong-v5-repeat4-sticky0.25"])
def test_an_episode_is_played_again_to_the_bit(name: str) -> None:
    found = suite.read(SUITES / f"{name}.npz")
    last = int(np.argmin([len(taken) for taken in found.action]))
    config = GameConfig(gray=False, num_envs=3)
    (_, one), (_, other) = (next(suite.episodes(found, config, [last])) for _ in range(2))
    assert np.array_equal(one.frame, other.frame) and np.array_equal(one.reward, other.reward)
    assert len(one) == len(found.action[last]) and one.frame.std() > 0


def test_the_emulator_plays_a_game_with_its_arguments() -> None:
    def actions(env: str, **kwargs: object) -> int:
        return len(atari.Emulator(env, GameConfig(gray=False, kwargs=kwargs), seed=0).actions)

    assert actions("ALE/Pong-v5") == 6 and actions("ALE/Pong-v5", full_action_space=True) == 18
    with pytest.raises(UserError, match="not what a plain emulator plays"):
        actions("ALE/Pong-v5", difficulty=1)
    assert [rom(env) for env in ("ALE/Pong-v5", "Pong-v4", "Catch-v0", "nowhere:Nothing-v0")] == [
        "pong",
        "pong",
        "",
        "",
    ]


def test_a_game_that_plays_otherwise_is_found_out() -> None:
    found = suite.read(CATCH)
    with pytest.raises(UserError, match="does not play here as it did"):
        next(suite.episodes(found._replace(score=found.score + 1), GameConfig()))
    longer = [np.concatenate([found.action[0], found.action[0]]), *found.action[1:]]
    with pytest.raises(UserError, match="does not play here as it did"):
        next(suite.episodes(found._replace(action=longer), GameConfig()))


def test_what_makes_another_game_of_it_is_refused_and_what_does_not_is_left_to_the_model() -> None:
    config = GameConfig(size=32, gray=True, life_loss=True, clip_rewards=True, noops=30, max_steps=50)
    found = suite.find_suite("ALE/Pong-v5", config)
    played = suite.game(found, config)
    assert (played.sticky, played.action_repeat, played.noops, played.max_steps) == (0.25, 4, None, None)
    assert (played.size, played.gray, played.life_loss, played.clip_rewards) == (32, True, True, True)
    there = r"no suite ALE-Pong-v5-repeat2-sticky0, .*: ALE-Pong-v5-repeat4-sticky0.25, ALE-Pong-v5-repeat4-sticky0\."
    with pytest.raises(UserError, match=there):
        suite.find_suite("ALE/Pong-v5", replace(config, action_repeat=2, sticky=0.0))
    with pytest.raises(UserError, match="at random: game.action_repeat=N"):
        suite.find_suite("Pong-v4", GameConfig())
    with pytest.raises(UserError, match="none of this id"):
        suite.find_suite("Count-v0", GameConfig())


def test_a_suite_is_made_of_random_half_random_and_trained_play(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    made = suite.make(SuiteConfig(run=str(run), steps=150, out=str(tmp_path)))
    kept = suite.read(made.path)
    assert Counter(kept.kind.tolist()) == {0: 2, 1: 2, 2: 2} and kept.about["trained"]["recipe"] == "reverie"
    assert kept.about["actions"] == ["LEFT", "STAY", "RIGHT"] and sum(map(len, kept.action)) == 450
    assert [len(episode) for _, episode in suite.episodes(kept, GameConfig(size=16))] == list(map(len, kept.action))


def test_a_suite_is_frozen_and_lies_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = CATCH.read_bytes()
    assert main(["suite", "env=Catch-v0", "steps=100"]) == 2
    assert f"{CATCH} is there already" in capsys.readouterr().err and CATCH.read_bytes() == before


def test_continuous_actions_are_kept_as_they_were_played(tmp_path: Path) -> None:
    made = suite.make(SuiteConfig(env="CatchContinuous-v0", steps=200, out=str(tmp_path)))
    kept = suite.read(made.path)
    assert all(np.array_equal(one, other) for one, other in zip(made.action, kept.action, strict=True))
    assert len(np.unique(np.concatenate(kept.action))) > 10 and kept.kind.max() == 0
    assert len(list(suite.episodes(kept, GameConfig(size=16)))) == len(kept.seed)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "run=NAME"), (["run=a", "env=Catch-v0"], "run=NAME"), (["run=nobody"], "nobody"),
        (["env=Catch-v0", "protocol=fair"], "default, atari100k"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suite", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said


# ---- what the emulator knows ----
@pytest.mark.parametrize("size", [64, "84x64"])
@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("ALE-Pong-v5-repeat4-sticky0.25", {"ball": 0.99, "paddle": 0.99}),
        ("ALE-Breakout-v5-repeat4-sticky0", {"ball": 0.99, "paddle": 0.99}),
        ("ALE-Boxing-v5-repeat4-sticky0", {"white": 0.99, "black": 0.98}),
    ],
)
def test_things_are_found_on_real_frames_where_the_memory_has_them(
    name: str, right: dict[str, float], size: int | str
) -> None:
    found, steps = suite.read(SUITES / f"{name}.npz"), 150
    config = suite.game(found, GameConfig(gray=False, size=size))
    games, named = opened(make_games(found.env, config, 1)), atari.things(found.env, 3)
    assert named.keys() == right.keys()
    away: dict[str, list[float]] = {thing: [] for thing in named}
    other: dict[str, list[bool]] = {thing: [] for thing in named}
    for kind in range(3):
        episode = found.kind.tolist().index(kind)
        seed, actions = int(found.seed[episode]), found.action[episode][:steps]
        (trace,) = games.restore([seed], [actions])
        at = atari.places(found.env, config, seed, actions, trace.frame)
        for thing in named:
            for frame, place in zip(trace.frame, at[thing], strict=True):
                if not np.isnan(place).any():
                    places = named[thing].find(frame)
                    gap = (places[0] - place) * 64 / np.array([160, 210]) if places else np.full(2, np.inf)
                    away[thing].append(float(np.hypot(*gap)))
                    other[thing].append(len(places) > 1)
    for thing, share in right.items():
        assert len(away[thing]) > 150 and np.mean(np.array(away[thing]) <= 2) >= share, thing
        assert np.mean(other[thing]) <= 0.01, thing


def test_an_empty_field_has_no_ball_and_games_without_memory_no_things() -> None:
    empty = np.zeros((3, 64, 64))
    assert atari.find_breakout_ball(empty) == [] == atari.find_breakout_paddle(empty)
    assert atari.things("ALE/Pong-v5", 1) == {} == atari.things("Catch-v0", 3) == atari.things("ALE/Freeway-v5", 3)


def test_two_balls_are_two_and_a_faint_one_is_none() -> None:
    field = np.zeros((30, 30))
    field[5, 5], field[20, 12] = 1.0, 0.8
    assert [place.round().tolist() for place in atari.spots(field, 0.3)] == [[5, 5], [12, 20]]
    field[20, 12] = 0.4
    assert len(atari.spots(field, 0.3)) == 1 and atari.spots(field, 2.0) == []
