"""A population in the real game: every task counts once, and who plays it, or dies over it, changes nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent import workers
from agent.player import Player
from agent.population import Played, Task, play_tasks, rollout
from agent.ray_pool import Cluster
from agent.workers import CHUNK, DEATHS, Part, Worker, Workers, chunks, weights_of
from envs.errors import UserError
from policies.linear import Linear, Population
from tests import uneven

ROOT = Path(__file__).parents[2]
SEEDS = [11, 3, 25, 8, 4, 9, 12, 14]
TASKS = [Task(candidate, seed) for candidate in range(5) for seed in SEEDS]  # 40: two chunks and a half


def linear() -> Linear:
    policy = uneven.agent().learner.policy
    assert isinstance(policy, Linear)
    return policy


def drawn(count: int = 5) -> np.ndarray:
    """Candidates (count, n)."""
    return np.random.default_rng(0).normal(size=(count, linear().size)).astype(np.float32)


def alone(task: Task, candidates: np.ndarray) -> tuple[float, int]:
    """Return and length of one task, played by itself."""
    agent, games = uneven.agent(), uneven.Uneven(1)
    policy = agent.learner.policy
    assert isinstance(policy, Linear)
    policy.load_flat(torch.from_numpy(candidates[task.candidate]))
    player, total = Player(agent, greedy=True), 0.0
    frames, done = games.reset([task.seed]), np.array([True])
    for played in range(1, 100):
        brought = games.step(player.act(frames, done))
        frames, done, total = brought.frame, brought.done, total + float(brought.score[0])
        if done[0]:
            return total, played
    raise AssertionError("it never ended")


def same(a: Played, b: Played) -> None:
    assert np.array_equal(a.returns, b.returns) and np.array_equal(a.lengths, b.lengths)


@pytest.fixture(scope="module")
def undisturbed() -> Played:
    with Workers(uneven.make, 0) as here:
        return here.play(None, 0, drawn(), TASKS)


def test_every_task_is_played_once_as_if_it_were_played_alone(undisturbed: Played) -> None:
    expected = [alone(task, drawn()) for task in TASKS]
    assert undisturbed.lengths.tolist() == [steps for _, steps in expected]
    assert undisturbed.lengths.tolist() == [uneven.length(task.seed) for task in TASKS]
    assert undisturbed.returns.tolist() == [total for total, _ in expected]
    assert len(set(undisturbed.returns.tolist())) > 10  # candidates and seeds do differ


@pytest.mark.parametrize("rows", [1, 4, 50])
def test_more_or_fewer_rows_than_tasks(rows: int, undisturbed: Played) -> None:
    same(play_tasks(uneven.agent(), uneven.Uneven(rows), drawn(), TASKS), undisturbed)


def test_no_tasks_and_no_linear_policy() -> None:
    agent, games = uneven.make()
    assert play_tasks(agent, games, drawn(), []).returns.shape == (0,)
    with Workers(uneven.make, 0) as here:
        assert here.play(None, 0, drawn(), []).lengths.shape == (0,)
    agent.learner.policy = Population(linear(), torch.from_numpy(drawn()))
    with pytest.raises(ValueError, match="Population"):
        play_tasks(agent, games, drawn(), TASKS)


def test_chunks_keep_the_order_and_carry_only_the_candidates_they_name() -> None:
    candidates = drawn()
    parts = chunks(candidates, TASKS)
    assert [len(tasks) for _, tasks in parts] == [CHUNK, CHUNK, 8]
    assert [len(some) for some, _ in parts] == [2, 2, 1]
    whole = [(some[task.candidate], task.seed) for some, tasks in parts for task in tasks]
    for (vector, seed), task in zip(whole, TASKS, strict=True):
        assert seed == task.seed and np.array_equal(vector, candidates[task.candidate])


def test_a_rollout_judges_every_candidate_on_the_same_seeds(undisturbed: Played) -> None:
    with Workers(uneven.make, 0) as here:
        dream = rollout(partial(here.play, None, 0), SEEDS)(Population(linear(), torch.from_numpy(drawn())))
    assert dream.reward.shape == dream.cont.shape == (40, 1) and dream.cont.eq(1).all()
    assert len(dream.view) == len(dream.action) == 40 and dream.view.numel() == dream.action.numel() == 0
    assert dream.reward.flatten().tolist() == undisturbed.returns.tolist()
    with pytest.raises(ValueError, match="Linear"):
        rollout(partial(here.play, None, 0), SEEDS)(linear())


def test_weights_are_read_when_their_version_is_another(undisturbed: Played) -> None:
    first, second = (weights_of(uneven.agent(seed).world_model) for seed in (1, 2))
    with Workers(uneven.make, 0) as here:

        def play(weights: Any, version: int) -> list[float]:
            return here.play(weights, version, drawn(), TASKS).returns.tolist()  # type: ignore[no-any-return]

        assert play(None, 7) == undisturbed.returns.tolist()  # those that `make` gave
        one = play(first, 0)
        assert one != undisturbed.returns.tolist()
        assert play(None, 0) == play(second, 0) == one != play(second, 1)
        with pytest.raises(ValueError, match="version 2"):
            play(None, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with Workers(uneven.make, 0) as here:
            assert play(first, 0) == one and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_killed_worker_changes_no_return(tmp_path: Path) -> None:
    weights, said = weights_of(uneven.agent(1).world_model), list[str]()
    with Workers(uneven.make, 0) as here:
        expected = here.play(weights, 1, drawn(), TASKS)
    with Workers(partial(uneven.make, 3, "dies", tmp_path), 1, say=said.append) as pool:
        same(pool.play(weights, 1, drawn(), TASKS), expected)
        assert len(said) == len(list(tmp_path.iterdir())) == 1 and "died" in said[0]
        (process,) = multiprocessing.active_children()
        assert str(process.pid) not in os.listdir(tmp_path)  # it is another one
    assert not multiprocessing.active_children()


class Brittle:
    """A pool that dies after as many chunks as `plan` says of this one."""

    plan: list[int] = []

    def __init__(self, make: workers.Make, count: int) -> None:
        self.worker, self.left = Worker(make), self.plan.pop(0)

    def submit(self, weights: Path | None, version: int, part: Part) -> Future[Played]:
        future: Future[Played] = Future()
        if self.left:
            future.set_result(self.worker.play(weights, version, part))
        else:
            future.set_exception(BrokenProcessPool())
        self.left = max(0, self.left - 1)
        return future

    def close(self) -> None: ...


@pytest.mark.parametrize("plan", [[0, 0, 0], [1, 0, 0], [0, 0, 1, 0, 0]])
def test_it_gives_up_when_nothing_is_finished_between_deaths(plan: list[int], monkeypatch: Any) -> None:
    monkeypatch.setattr(workers, "Pool", Brittle)
    monkeypatch.setattr(Brittle, "plan", list(plan))
    said: list[str] = []
    with Workers(uneven.make, 2, say=said.append) as pool, pytest.raises(UserError, match=f"{DEATHS} times"):
        pool.play(None, 0, drawn(), TASKS)
    assert len(said) == len(plan) - 1 and not Brittle.plan


def test_deaths_with_something_finished_between_them_are_survived(undisturbed: Played, monkeypatch: Any) -> None:
    monkeypatch.setattr(workers, "Pool", Brittle)
    monkeypatch.setattr(Brittle, "plan", [0, 0, 1, 0, 1, 0, 1])
    said: list[str] = []
    with Workers(uneven.make, 2, say=said.append) as pool:
        same(pool.play(None, 0, drawn(), TASKS), undisturbed)
    assert len(said) == 6


PARENT = """
import sys
from functools import partial
from pathlib import Path
from agent.workers import Workers
from tests import uneven
from tests.agent import test_workers
with Workers(partial(uneven.make, 3, "hangs", Path(sys.argv[1])), 1) as pool:
    pool.play(None, 0, test_workers.drawn(), test_workers.TASKS)
"""


def began(folder: Path) -> int:
    """The process that has begun to play."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for name in os.listdir(folder):
            return int(name)
        time.sleep(0.02)
    raise AssertionError("no worker has begun to play")


def test_workers_are_deaf_to_ctrl_c_and_do_not_outlive_their_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as parent:
        worker = began(tmp_path)
        os.kill(worker, signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            parent.communicate(timeout=0.5)
        os.kill(worker, 0)  # still there, and the parent has had no reason to start another
        assert os.listdir(tmp_path) == [str(worker)]
        parent.kill()
        parent.communicate(timeout=5)  # ends when nobody holds its output any more


def test_a_stop_ends_them_in_the_middle_of_a_game(tmp_path: Path) -> None:
    asked: list[float] = []

    def stop() -> bool:
        if os.listdir(tmp_path):
            asked.append(time.monotonic())
        return bool(asked)

    with Workers(partial(uneven.make, 3, "hangs", tmp_path), 1) as pool, pytest.raises(KeyboardInterrupt):
        pool.play(None, 0, drawn(), TASKS, stop=stop)
    assert time.monotonic() - asked[0] < 1 and not multiprocessing.active_children()
    with Workers(uneven.make, 0) as here, pytest.raises(KeyboardInterrupt):
        here.play(None, 0, drawn(), TASKS, stop=lambda: True)


@pytest.mark.parametrize("count", [0, 1])
def test_what_make_raises_is_raised(count: int) -> None:
    with Workers(partial(uneven.make, 3, "refuses"), count) as pool, pytest.raises(UserError, match="cannot be"):
        pool.play(None, 0, drawn(), TASKS)
    with pytest.raises(UserError, match="at least 0"):
        Workers(uneven.make, -1 - count)


@pytest.mark.slow  # and wants Ray, which is not among the test's packages
def test_a_cluster_brings_what_this_process_brings(tmp_path: Path) -> None:
    weights = weights_of(uneven.agent(1).world_model)

    def both(play: Callable[..., Played]) -> Sequence[Played]:
        return play(None, 0, drawn(), TASKS), play(weights, 1, drawn(), TASKS)

    with Workers(uneven.make, 0) as here:
        expected = both(here.play)
    handler = signal.getsignal(signal.SIGTERM)
    with Cluster(partial(uneven.make, 3, "dies", tmp_path), 2) as cluster:
        assert signal.getsignal(signal.SIGTERM) is handler  # with which a run saves itself
        for ours, theirs in zip(both(cluster.play), expected, strict=True):
            same(ours, theirs)
        assert len(list(tmp_path.iterdir())) == 1  # one died on the way
        with pytest.raises(ValueError, match="version 2"):
            cluster.play(None, 2, drawn(), TASKS)
        with pytest.raises(KeyboardInterrupt):
            cluster.play(None, 1, drawn(), TASKS, stop=lambda: True)


def test_a_cluster_without_ray_is_one_sentence(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "\.\[cluster\]"'):
        Cluster(uneven.make)
