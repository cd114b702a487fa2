"""A loop of few and long rounds, as World Models has them: stopped in any part of one, it goes on bit by bit."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from agent.collector import Collector
from agent.loop import PLACES, Loop
from envs.errors import UserError
from envs.spec import Spec
from policies.cma_es import EvolutionConfig
from runs import build
from runs.config import Config
from runs.folder.progress import Progress
from runs.folder.run import Run
from runs.recipes import RECIPES
from runs.recipes.world_models import world_models
from tests.agent import test_loop
from tests.agent.test_loop import begin, same
from world_model.interface import Stage


def quick(where: str = "both") -> Config:
    """A run without pictures, which take most of the time of so short a one."""
    config = world_models("toy")
    return replace(
        config, env="CatchContinuous-v0", workers=0, steps=300, seed=3,
        model=replace(config.model, vision_updates=6, memory_updates=6),
        policy=replace(
            config.policy, where=where, population=4, rollouts=2, real_rollouts=3, generations=3, real_generations=2
        ),
        train=replace(
            config.train, prefill=200, steps_per_round=100, cooldown=0.5, log_every=2, show_every=10**6, save_every=1e6
        ),
        game=replace(config.game, num_envs=2),
    )  # fmt: skip


class Stopping(Progress):
    """Presses Ctrl-C when a part of a round has been done so many times."""

    def __init__(self, part: str, done: str) -> None:
        super().__init__()
        self.part, self.done = part, done

    def update(self, step: int, **values: float | str | None) -> None:
        if str(values.get(self.part, "")).startswith(self.done + " of"):
            self.done = "never"
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """The real game is played in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runs.build.cores", lambda: 1)
        yield


class Whole(NamedTuple):
    """A run that was never stopped, at its end."""

    session: Loop
    state: dict[str, Any]
    metrics: list[dict[str, Any]]
    saved: list[int]  # the steps at which it was saved
    folder: Path


def trained(config: Config, folder: Path) -> Whole:
    session = begin(config, run := Run.create(config, folder))
    saved: list[int] = []
    save = run.save_checkpoint
    run.save_checkpoint = lambda state, step: saved.append(step) or save(state, step)  # type: ignore[method-assign,func-returns-value]
    session.train(config.steps, run, Progress())
    run.close()
    return Whole(session, copy.deepcopy(session.state_dict()), run.metrics(), saved, folder)


@pytest.fixture(scope="module")
def whole(one_core: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """With pictures after every round, of which those that are compared with it have none: they change nothing."""
    config = quick()
    config = replace(config, train=replace(config.train, show_every=1))
    return trained(config, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def dreamed(one_core: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return trained(quick("dream"), tmp_path_factory.mktemp("dreamed") / "run")


@pytest.fixture
def copied(dreamed: Whole, tmp_path: Path) -> Path:
    """The folder of a run that learned in dreams alone, to be changed."""
    return shutil.copytree(dreamed.folder, tmp_path / "run")


def loaded(run: Run) -> Loop:
    session = begin(run.config, run)
    session.load_state_dict(run.load_checkpoint())
    return session


@pytest.mark.parametrize("part", ["vision", "memory", "dream", "real"])
def test_a_round_stopped_in_any_part_goes_on_bit_by_bit(part: str, whole: Whole, tmp_path: Path) -> None:
    config = quick()
    assert whole.session.rounds == 2  # the first learns from the prefill alone
    assert len(list((whole.folder / "videos").glob("dream-*.mp4"))) == 2

    stopped = Run.create(config, tmp_path / "stopped")
    session = begin(config, stopped)
    with pytest.raises(KeyboardInterrupt):
        session.train(config.steps, stopped, Stopping(part, "1"))
    assert session.done[part] == 1 and "collect" in session.done or part != "real"
    stopped.close()

    again = Run.open(tmp_path / "stopped")
    resumed = loaded(again)
    again.rewind()
    resumed.train(config.steps, again, Progress())
    same(whole.state, resumed.state_dict())
    assert [line.get("policy/fitness") for line in whole.metrics] == [
        line.get("policy/fitness") for line in again.metrics()
    ]


def test_a_stop_before_the_first_generation_draws_nothing_twice(whole: Whole, tmp_path: Path) -> None:
    class AtPhase(Progress):
        def phase(self, name: str) -> None:
            if name == "policy":
                os.kill(os.getpid(), signal.SIGINT)

    stopped = Run.create(quick(), tmp_path / "stopped")
    session = begin(stopped.config, stopped)
    with pytest.raises(KeyboardInterrupt):
        session.train(stopped.config.steps, stopped, AtPhase())
    assert session.done["dream"] == 0
    resumed = loaded(again := Run.open(tmp_path / "stopped"))
    again.rewind()
    resumed.train(again.config.steps, again, Progress())
    same(whole.state, resumed.state_dict())


def test_a_stop_within_the_policys_part_goes_on_from_the_same_states(tmp_path: Path) -> None:
    config = test_loop.quick("Catch-v0", save_every=1e6)
    config = replace(config, steps=260, policy=replace(config.policy, updates=4, starts=0, horizon=3))
    whole = trained(config, tmp_path / "whole")
    stopped = Run.create(config, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        begin(config, stopped).train(config.steps, stopped, Stopping("dream", "2"))
    resumed = loaded(again := Run.open(tmp_path / "stopped"))
    assert resumed.posterior is not None
    again.rewind()
    resumed.train(config.steps, again, Progress())
    same(whole.state, resumed.state_dict())
    assert whole.state["posterior"] is None  # a round that is over has none to keep
    updates = resumed.trainer.updates["actor"]
    resumed.train(config.steps, again, Progress(), "dream")  # draws as many states as an update has
    assert resumed.trainer.updates["actor"] == updates + 4 * config.policy.minibatches


@pytest.mark.parametrize("each", [6, 600])
def test_a_round_plays_what_the_run_asks_for(each: int, tmp_path: Path) -> None:
    config = test_loop.quick("Catch-v0", steps_per_round=each)
    config = replace(
        config, game=replace(config.game, num_envs=2), train=replace(config.train, prefill=100, pretrain=0)
    )
    session = begin(config, run := Run.create(config, tmp_path / "run"))
    session.train(100, run, Progress())
    before = session.replay.steps
    session.train(0, run, Progress(), "collect")
    assert session.replay.steps == before + each


def test_what_a_run_shows_on_the_terminal_is_no_name_of_a_part() -> None:
    """A part says "2 of 30" under its own name, and takes that away at its end."""
    for recipe in RECIPES:
        config = RECIPES[recipe]("toy")
        shown = {metric.shown for metric in build.metrics(config).values()}
        parts = [stage.name for stage in config.model.build(Spec(config.game.frame_shape, 2, True)).stages()]
        assert not shown & {*parts, *PLACES, "collect", "pretraining", "random_play", "return", "length"}, recipe


def test_a_process_that_plays_for_a_population_leaves_the_runs_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    build.agent_and_games(quick())[1].close()
    assert torch.equal(before, torch.get_rng_state())


def test_a_process_of_a_team_draws_other_numbers_once_it_has_come_further(tmp_path: Path) -> None:
    config = test_loop.quick("Catch-v0")
    session = begin(config, run := Run.create(config, tmp_path / "run"))
    session.train(260, run, Progress())
    drawn = []
    for steps in (0, 0, 8):  # the same checkpoint twice, and one that has come further within the same round
        state = session.state_dict()
        session.load_state_dict(state | {"replay": state["replay"] | {"steps": 264 + steps}}, run.episodes_folder)
        drawn.append((torch.rand(()).item(), session.replay.rng.random()))
    assert drawn[0] == drawn[1] and not set(drawn[1]) & set(drawn[2])


def test_what_a_killed_run_logged_after_its_checkpoint_is_forgotten(dreamed: Whole, copied: Path) -> None:
    run = Run.open(copied)
    run.log(dreamed.session.replay.steps, {"policy/fitness": 1e9})  # at the checkpoint's own step
    run.close()
    again = Run.open(copied)
    assert again.metrics() != dreamed.metrics
    again.load_checkpoint()
    again.rewind()
    assert again.metrics() == dreamed.metrics


def test_the_player_burns_in_after_every_long_round_and_after_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []
    session: Loop
    monkeypatch.setattr(Collector, "burn_in", lambda collector, length: rounds.append(session.rounds))
    config = quick("dream")
    config = replace(config, steps=400)
    session = begin(config, run := Run.create(config, tmp_path / "long"))
    session.train(config.steps, run, Progress())
    assert rounds == [1, 2]  # round 0 learns from the prefill
    rounds.clear()
    short = test_loop.quick("Catch-v0")
    session = begin(short, run := Run.create(short, tmp_path / "short"))
    session.train(300, run, Progress())
    assert rounds == [1] and session.rounds > 3, "small steps leave the memory what it is"


def test_every_generation_is_logged_and_saved(whole: Whole) -> None:
    generations = [line for line in whole.metrics if "policy/fitness" in line]
    assert len(generations) == 3 + 3 + 2  # a dream each round, the real game after the last
    assert len(whole.saved) == len(generations) + 2  # and before the first step, and at the end
    assert generations[-1]["real/episodes"] == 2 * 4 * 3
    assert generations[-1]["real/steps"] > 0


def test_a_dream_learner_never_plays_the_real_game_for_fitness(dreamed: Whole) -> None:
    assert dreamed.session.real is not None and dreamed.session.real.episodes == 0


def test_one_part_can_be_done_alone_and_stopped(copied: Path) -> None:
    config = quick("dream")
    session = loaded(run := Run.open(copied))
    before, rounds = session.replay.steps, session.rounds
    frames, generations = session.trainer.updates["vision"], 3
    with pytest.raises(KeyboardInterrupt):
        session.train(config.steps, run, Stopping("real", "1"), "real")
    assert session.only == "real" and session.done == {"real": 1}
    with pytest.raises(UserError, match="finish it first"):
        session.train(config.steps, run, Progress(), "dream")
    run.close()
    again = Run.open(copied)
    resumed = loaded(again)
    resumed.train(config.steps, again, Progress())  # finishes the part
    assert resumed.real is not None and resumed.real.generations == 2
    assert (resumed.replay.steps, resumed.rounds, resumed.only, resumed.done) == (before, rounds, "", {})
    resumed.train(config.steps, again, Progress(), "vision")
    assert resumed.trainer.updates["vision"] == frames + 6 and resumed.real.generations == 2
    resumed.train(config.steps, again, Progress(), "collect")
    assert resumed.replay.steps == before + 100
    resumed.train(config.steps, again, Progress(), "dream")
    assert resumed.agent.learner.generation == generations
    with pytest.raises(UserError, match="choose one of collect, vision, memory, dream, real"):
        resumed.train(config.steps, again, Progress(), "visoin")


def test_a_finished_run_goes_on_with_its_last_part_when_more_of_it_is_asked_for(whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    config = quick()
    run = Run.open(tmp_path / "run")
    run.config = replace(config, policy=replace(config.policy, real_generations=5))
    session = loaded(run)
    with pytest.raises(KeyboardInterrupt):
        session.train(config.steps, run, Stopping("real", "3"))
    session = loaded(run)
    session.train(config.steps, run, Progress())
    run.close()
    longer = trained(run.config, tmp_path / "longer")
    same(session.agent.state_dict(), longer.session.agent.state_dict())
    assert (session.rounds, session.only, session.last) == (whole.session.rounds, "", ("real", 5))
    assert not session.due(config.steps)


def test_a_stage_reads_what_was_encoded_once(tmp_path: Path) -> None:
    """Not frames encoded anew for every batch: the sampled numbers are those of the very frame and episode."""
    config = quick()
    session = begin(config, Run.create(config, tmp_path / "run"))
    session.prefill(Run.create(config, tmp_path / "other"), Progress())
    calls: list[int] = []

    def brightness(frame: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        assert len(action) == len(frame) - 1
        calls.append(len(frame))
        return frame.mean((1, 2, 3)).unsqueeze(1)

    stage = Stage("bright", (), 16, 5, encode=brightness)
    encoded = session.encoded(stage)
    assert sum(calls) == sum(len(episode.frame) for episode in session.replay.memory().values())
    calls.clear()
    session.collect(8, Progress())  # the encoder is as it was: only what is new is encoded
    grown = session.encoded(stage)
    alike = sum(len(after) for before, after in zip(encoded, grown, strict=False) if len(before) == len(after))
    assert alike and sum(calls) == sum(map(len, grown)) - alike, "what has not grown is not encoded again"
    session.trainer.updates["vision"] += 1
    calls.clear()
    encoded = session.encoded(stage)
    assert sum(calls) == sum(map(len, grown)), "by an encoder that has learned, everything"
    before = session.replay.rng.bit_generator.state
    frames = session.replay.sample(16, 5)
    session.replay.rng.bit_generator.state = before
    batch = session.replay.sample(16, 5, encoded=encoded)
    assert batch.code is not None and batch.code.dtype == torch.float32 and batch.code.shape == (16, 5, 1)
    assert torch.equal(batch.frame, frames.frame)
    expected = torch.where(frames.valid, (frames.frame.float() / 255).mean((2, 3, 4)), 0)
    torch.testing.assert_close(batch.code[..., 0], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(batch.action, frames.action)


@pytest.mark.parametrize(
    ("restart", "before", "where", "kept"),
    [
        (True, "dream", "dream", 0),
        (True, "dream", "real", 0),
        (True, "real", "dream", 0),
        (True, "real", "real", 1),
        (False, "dream", "real", 1),
    ],
)
def test_what_a_dream_has_evolved_is_begun_anew(restart: bool, before: str, where: str, kept: float) -> None:
    made = EvolutionConfig(restart=restart).build(3, Spec((3, 64, 64), 2, False))
    made.begin_phase(before)
    made.policy.load_flat(torch.ones(made.policy.size))
    made.begin_phase(where)
    assert torch.equal(made.policy.flat(), torch.full((made.policy.size,), float(kept)))
