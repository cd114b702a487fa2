"""The whole loop at toy size: it can be stopped and goes on bit by bit, and it learns to catch inside its dream."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import agent.trainer as trainer_module
from agent import evaluate
from agent.evaluate import evaluate_policy
from agent.loop import Loop
from agent.player import Player
from agent.seeds import episode_seed
from agent.trainer import Trainer
from envs.make import make_games
from runs import build
from runs.config import Config
from runs.folder.null_logger import Nowhere
from runs.folder.progress import Progress
from runs.folder.run import Run
from runs.recipes.reverie import reverie
from world_model.interface import Losses, Objective


def quick(env: str, **train: Any) -> Config:
    config = reverie("toy")
    schedule = replace(config.train, prefill=200, pretrain=3, log_every=5, **train)
    model = replace(config.model, batch_size=4, length=12)
    return replace(config, env=env, train=schedule, model=model, game=replace(config.game, size=32, num_envs=5))


def begin(config: Config, run: Run) -> Loop:
    games = make_games(config.env, config.game)
    return build.loop(config, games, run.episodes_folder)


def same(a: Any, b: Any, where: str = "state") -> None:
    """Every tensor, number and string of two nested states is identical."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("env", ["Catch-v0", "ALE/Pong-v5"])  # many short episodes; one that is under way, sticky
def test_a_resumed_run_is_bit_identical_to_one_never_stopped(env: str, tmp_path: Path) -> None:
    config = quick(env)
    run = Run.create(config, tmp_path / "whole")
    loop = begin(config, run)
    loop.train(400, run, Progress())
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")  # as kill -9 after this checkpoint would leave it
    loop.train(620, run, Progress())

    again = Run.open(tmp_path / "stopped")
    (again.episodes_folder / "000123.npz").write_bytes(b"written after the checkpoint")
    resumed = begin(again.config, again)
    resumed.load_state_dict(again.load_checkpoint())
    again.rewind()
    resumed.train(620, again, Progress())

    same(loop.state_dict(), resumed.state_dict())
    machine = ("hours", "core_hours", "memory_gb")
    timeless = [[{k: v for k, v in line.items() if k not in machine} for line in one.metrics()] for one in (run, again)]
    assert timeless[0] == timeless[1]
    assert any("policy/return" in line for line in timeless[0])
    # Five games play at once, and an update is due after twelve steps: what is played ahead is not played again. Of the
    # last round only so much is played as the run was asked for, and none is due for what was played ahead.
    assert config.train.steps_per_round == 12 and loop.rounds == 1 + 17 + 18
    assert 620 <= loop.replay.steps < 620 + 5 and 0 <= loop.ahead < 5


def test_learning_rates_fall_to_nothing_over_the_last_share_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick("Catch-v0", cooldown=0.25)
    run = Run.create(config, tmp_path / "run")
    loop, seen = begin(config, run), []
    update = Trainer.update

    def spy(trainer: Trainer, objective: Objective, data: Any) -> Losses:
        losses = update(trainer, objective, data)
        if objective.name == "world_model":
            seen.append((loop.step, trainer.optimizers["world_model"].param_groups[0]["lr"]))
        return losses

    monkeypatch.setattr(Trainer, "update", spy)
    monkeypatch.setattr(trainer_module, "rate", lambda optim, update: 0.1)
    loop.train(400, run, Progress())
    assert [rate for step, rate in seen if step <= 300] == pytest.approx([0.1] * 12)
    falling = [(step, rate) for step, rate in seen if step > 312]
    # A round's rate is of the step that it begins at, up to 12 + 5 steps before its update.
    assert all((400 - step) / 1000 <= rate <= (400 + 17 - step) / 1000 for step, rate in falling)
    assert len(falling) >= 6 and falling[-1][1] < 0.02


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_update_saves_a_checkpoint_and_goes_on_up(sign: signal.Signals, tmp_path: Path) -> None:
    config = quick("Catch-v0")
    run = Run.create(config, tmp_path / "run")
    loop = begin(config, run)

    class Impatient(Progress):
        killed = False

        def update(self, step: int, **values: float | str | None) -> None:
            if step >= 300 and not self.killed:
                self.killed = True
                os.kill(os.getpid(), sign)

    with pytest.raises(KeyboardInterrupt):
        loop.train(10_000, run, Impatient())
    saved = run.load_checkpoint()
    assert 300 <= saved["replay"]["steps"] == loop.replay.steps < 350
    assert saved["rounds"] == loop.trainer.updates["actor"] // config.policy.minibatches > 0


def test_what_was_lost_with_the_games_in_progress_is_played_anew(tmp_path: Path) -> None:
    """Else thousands of updates are made on the little that is left."""
    config = quick("ALE/Pong-v5")
    loop = begin(config, Run.create(config, tmp_path / "run"))
    loop.prefill(Nowhere(), Progress())
    known = loop.replay.steps
    loop.prefill(Nowhere(), Progress())
    assert loop.replay.steps == known >= 200, "nothing was lost"
    loop.collector.abandon()
    assert loop.replay.short_of(200) == 200
    loop.prefill(Nowhere(), Progress())
    assert loop.replay.steps == known + 200 and not loop.replay.short_of(200)


def test_the_first_look_is_at_frames_of_the_game_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes shorter than a segment are padded with black."""
    config = quick("Catch-v0")
    config = replace(config, game=replace(config.game, max_steps=3))
    loop, seen = begin(config, Run.create(config, tmp_path / "run")), []
    monkeypatch.setattr(type(loop.agent.world_model), "prepare", lambda model, frames: seen.append(frames))
    loop.prefill(Nowhere(), Progress())
    assert len(seen) == 1 and len(seen[0]) <= 64 * 4 and seen[0].flatten(1).any(1).all()


def test_episode_seeds_differ_between_runs_and_episodes() -> None:
    seeds = {episode_seed(run, number) for run in range(50) for number in range(50)}
    assert len(seeds) == 2500
    assert episode_seed(3, 4) == episode_seed(3, 4)


def test_evaluation_counts_every_episode_once_whatever_its_length() -> None:
    config = quick("Catch-v0")
    agent_games = make_games("Catch-v0", config.game, 3)
    agent = build.agent(config, agent_games.spec)
    three = evaluate_policy(Player(agent, greedy=True), agent_games, 7, seed=0)
    one = evaluate_policy(Player(agent, greedy=True), make_games("Catch-v0", config.game, 1), 7, seed=0)
    assert three.returns == one.returns and three.lengths == one.lengths  # the same episodes, however many side by side
    assert len(three.returns) == 7


def test_a_film_takes_no_more_than_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    config = quick("Catch-v0")
    games = make_games("Catch-v0", config.game, 2)
    player = Player(build.agent(config, games.spec), greedy=True)
    whole = evaluate_policy(player, games, 2, seed=0, film=True)
    assert len(whole.film) == whole.lengths[0] > 3
    monkeypatch.setattr(evaluate, "FILM_BYTES", 3.5 * whole.film[0].nbytes)
    assert len(evaluate_policy(player, games, 2, seed=0, film=True).film) == 3


@pytest.mark.slow
def test_catch_is_solved_by_imagination_alone(tmp_path: Path) -> None:
    """No update ever sees the real game: the policy learns from dreams only.

    A random player catches one in three; after 7,500 of these steps seeds 0 and 1 caught 84 and 87 %.
    """
    config = replace(reverie("toy"), env="Catch-v0", steps=7_500)
    config = replace(config, game=replace(config.game, size=32))
    games = make_games(config.env, config.game)
    loop = build.loop(config, games, tmp_path)
    with Progress() as progress:
        loop.train(config.steps, Run.create(config, tmp_path / "run"), progress)
    scores = evaluate_policy(Player(loop.agent), games, 20, seed=1).returns
    caught = (sum(scores) / len(scores) + 10) / 20  # ten blocks a game, +1 or -1 each
    assert caught >= 0.6, f"{caught:.0%} caught"
