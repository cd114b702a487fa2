"""A world model that is trained alone: by random play, or by recorded episodes without a step of the game."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from agent.loop import Loop
from agent.population import FixedLearner
from envs.errors import UserError
from runs import build
from runs.config import Config
from runs.folder.progress import Progress
from runs.folder.run import Run
from tests.agent import test_loop, test_rounds
from tests.agent.test_loop import begin, same
from tests.agent.test_rounds import Stopping


def short() -> Config:
    """Rounds of one update, which four games meet without playing ahead."""
    config = test_loop.quick("Catch-v0", policy=False)
    return replace(config, steps=300, game=replace(config.game, num_envs=4))


def long() -> Config:
    """Rounds of two stages of many updates, and a policy that the real game would judge."""
    config = test_rounds.quick()
    game = replace(config.game, size=short().game.size)  # of what is recorded
    return replace(config, env="Catch-v0", game=game, train=replace(config.train, policy=False))


KINDS = pytest.mark.parametrize("config", [short(), long()], ids=["short", "long"])


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A folder with 4 games of Catch at random: 316 steps."""
    config = short()
    loop = begin(config, Run.create(config, tmp_path / "other"))
    loop.collector.collect(4 * 79, at_random=True)
    assert loop.replay.episodes == 4
    return tmp_path / "other" / "episodes"


def play_no_step(loop: Loop) -> None:
    def refused(*given: object) -> None:
        raise AssertionError("the game was played")

    loop.collector.games.step = loop.collector.games.reset = refused  # type: ignore[method-assign,assignment]


def test_a_round_in_which_nothing_is_due_is_a_round(tmp_path: Path) -> None:
    config = long()
    config = replace(config, model=replace(config.model, vision_updates=0, memory_updates=0))
    loop = begin(config, run := Run.create(config, tmp_path / "run"))
    loop.train(200, run, Progress())
    assert loop.rounds == 1 and loop.trainer.updates["vision"] == config.train.pretrain


@KINDS
def test_rounds_without_a_policy(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(config, tmp_path / "run")
    loop = begin(config, run)
    assert isinstance(loop.agent.learner, FixedLearner) and loop.real is None
    monkeypatch.setattr(loop.collector.player, "act", None)  # nobody follows the game: play is random
    loop.train(config.steps, run, Progress())
    stages = [stage.name for stage in loop.stages]
    assert loop.parts == ("collect", *stages) and loop.rounds == -(-100 // config.train.steps_per_round) + 1
    assert set(loop.trainer.updates) == set(stages)
    assert all(loop.trainer.updates[name] >= loop.rounds for name in stages)
    assert not [key for line in run.metrics() for key in line if key.startswith("policy/")]
    assert not [key for key in build.metrics(config) if key.startswith("policy/")]
    with pytest.raises(UserError, match=f"choose one of collect, {', '.join(stages)}"):
        loop.train(config.steps, run, Progress(), "dream")


@KINDS
def test_recorded_steps_are_rounds_without_a_step_of_the_game(config: Config, recorded: Path, tmp_path: Path) -> None:
    run = Run.create(config, tmp_path / "run")
    loop = begin(config, run)
    play_no_step(loop)
    assert loop.take(recorded) == 4 and loop.step == config.train.prefill
    loop.train(config.steps, run, Progress())
    assert loop.rounds == -(-100 // config.train.steps_per_round) + 1, "as many as playing would have brought"
    assert config.steps <= loop.step == run.step < loop.replay.steps == 316
    steps = [line["step"] for line in run.metrics() if "rounds" in line]
    assert steps == sorted(steps) and steps[-1] > config.train.prefill, "metrics have places in the run"


def test_what_is_not_recorded_is_played(recorded: Path, tmp_path: Path) -> None:
    config = short()
    run = Run.create(config, tmp_path / "run")
    loop = begin(config, run)
    loop.take(recorded)
    loop.train(400, run, Progress())
    assert loop.waiting == 0 and 400 <= loop.step == loop.replay.steps < 412
    few = replace(config, train=replace(config.train, prefill=400))
    loop = begin(few, run := Run.create(few, tmp_path / "few"))
    loop.take(recorded)
    loop.prefill(run, Progress())
    assert loop.step == loop.replay.steps == 400, "random play fills up"


def test_a_policy_plays_for_itself_whatever_is_recorded(recorded: Path, tmp_path: Path) -> None:
    config = test_loop.quick("Catch-v0")
    loop = begin(config, Run.create(config, tmp_path / "run"))
    loop.take(recorded)
    assert loop.step == loop.replay.steps == 316 and loop.waiting == 0


@pytest.mark.parametrize("killed", [False, True])
@KINDS
def test_it_goes_on_bit_by_bit(config: Config, killed: bool, recorded: Path, tmp_path: Path) -> None:
    """From records into play; stopped within a round, or killed after the checkpoint that an earlier end wrote."""
    whole = begin(config, run := Run.create(config, tmp_path / "whole"))
    whole.take(recorded)
    if killed:
        whole.train(config.steps, run, Progress())
        shutil.copytree(run.folder, tmp_path / "stopped")
    whole.train(400, run, Progress())
    if not killed:
        loop = begin(config, stopped := Run.create(config, tmp_path / "stopped"))
        loop.take(recorded)
        part = loop.stages[-1].name if config.recipe == "world_models" else "pretraining"
        with pytest.raises(KeyboardInterrupt):
            loop.train(400, stopped, Stopping(part, "1"))
        stopped.close()
    again = Run.open(tmp_path / "stopped")
    resumed = begin(again.config, again)
    resumed.load_state_dict(again.load_checkpoint())
    again.rewind()
    assert resumed.waiting > 0
    resumed.train(400, again, Progress())
    same(whole.state_dict(), resumed.state_dict())
    logged, relogged = ([line["step"] for line in one.metrics()] for one in (run, again))
    assert resumed.waiting == 0 and logged == relogged


def test_what_a_person_plays_later_waits_too(recorded: Path, tmp_path: Path) -> None:
    config = short()
    run = Run.create(config, tmp_path / "run")
    loop = begin(config, run)
    loop.train(config.steps, run, Progress())
    step, updates = loop.step, loop.rounds
    assert loop.take(recorded, human=True) == 4 and loop.step == step and loop.waiting == 316
    play_no_step(loop)
    loop.train(step + 24, run, Progress())
    assert loop.rounds == updates + 2 and loop.waiting == 316 - 24
