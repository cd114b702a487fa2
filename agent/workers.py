"""Candidates judged in the real game by several processes, or in this one.

The tasks are cut into fixed chunks, and what a chunk brings depends on nothing but its weights, candidates and tasks:
neither the number of workers, nor which of them plays it, nor one that dies on the way changes a return.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from agent.player import Agent
from agent.population import Played, Task, play_tasks
from envs.errors import UserError
from envs.games import Games
from world_model.interface import WorldModel
from world_model.threads import torch_threads

CHUNK = 16  # tasks a worker is given at a time: one candidate of the paper's 16 rollouts
DEATHS = 3  # of workers, with no chunk finished between them, after which another one will not help
POLL = 0.1  # seconds between two looks at whether to stop

Weights = dict[str, np.ndarray]  # of the world model
Make = Callable[[], tuple[Agent, Games]]  # for another process it must be picklable, as a partial of a function is
Part = tuple[np.ndarray, list[Task]]  # the tasks of a chunk, and the candidates (K, n) that they name


def weights_of(world_model: WorldModel) -> Weights:
    """All that `Workers.play` must be sent to follow the game with this world model."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in world_model.state_dict().items()}


def chunks(candidates: np.ndarray, tasks: Sequence[Task]) -> list[Part]:
    """The tasks in their order, CHUNK at a time, each with the candidates it needs and no others."""
    parts: list[Part] = []
    for begin in range(0, len(tasks), CHUNK):
        some = tasks[begin : begin + CHUNK]
        used, places = np.unique([task.candidate for task in some], return_inverse=True)
        parts.append((candidates[used], [Task(int(at), task.seed) for at, task in zip(places, some, strict=True)]))
    return parts


def joined(played: Sequence[Played]) -> Played:
    """What the chunks brought, one after another."""
    if not played:
        return Played(np.zeros(0), np.zeros(0, np.int64))
    return Played(np.concatenate([one.returns for one in played]), np.concatenate([one.lengths for one in played]))


class Worker:
    """One agent and its games, in one process and on one torch thread: more would change sums in their last bits."""

    def __init__(self, make: Make) -> None:
        with torch_threads(1):
            self.agent, self.games = make()
        self.version: int | None = None

    def play(self, weights: Weights | Path | None, version: int, part: Part) -> Played:
        """Plays a chunk; reads `weights` (a dict, or an .npz file of one) when it has another version of them."""
        if weights is not None and version != self.version:
            read = _read(weights) if isinstance(weights, Path) else weights
            self.agent.world_model.load_state_dict({name: torch.tensor(array) for name, array in read.items()})
            self.version = version
        with torch_threads(1):
            return play_tasks(self.agent, self.games, *part)


class Pool:
    """Processes that play chunks, deaf to Ctrl-C. They end at once when they are closed or their parent is gone."""

    def __init__(self, make: Make, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        # Nothing is ever sent: its other end, which only this process holds, closes when this process ends, however.
        self._far, self._line = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(count, context, _begin, (make, self._far))

    def submit(self, weights: Path | None, version: int, part: Part) -> Future[Played]:
        """Starts a process when all are busy. Raises BrokenProcessPool when one has died."""
        with _without_ctrl_c():
            return self._executor.submit(_play_here, weights, version, part)

    def close(self) -> None:
        """Ends the processes in the middle of whatever they play."""
        self._line.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._far.close()


class EvaluationPool(ABC):
    """Whoever plays tasks for a population. A context manager that closes at its end."""

    @abstractmethod
    def play(
        self, weights: Weights | None, version: int, candidates: np.ndarray, tasks: Sequence[Task],
        *, stop: Callable[[], bool] = lambda: False,
    ) -> Played:  # fmt: skip
        """Plays every task once with the world model's weights of that version; candidates (K, n)."""

    @abstractmethod
    def close(self) -> None:
        """Ends whoever plays."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Workers(EvaluationPool):
    """Plays tasks in `count` processes of their own, or in this one when it is 0. A context manager.

    `make` is called once by every process. `say` hears what a person should know. Nothing starts before it is needed.
    The weights wait for the processes in a folder `.weights-*` within `folder`, the system's temporary one when None.
    """

    def __init__(
        self, make: Make, count: int, *, folder: Path | None = None, say: Callable[[str], None] | None = None
    ) -> None:
        if count < 0:
            raise UserError(f"The number of workers must be at least 0, not {count}.")
        self.make, self.count, self.folder, self.say = make, count, folder, say or _to_stderr
        self._local: Worker | None = None
        self._pool: Pool | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._sent: tuple[int, Weights | Path] | None = None

    def play(
        self, weights: Weights | None, version: int, candidates: np.ndarray, tasks: Sequence[Task],
        *, stop: Callable[[], bool] = lambda: False,
    ) -> Played:  # fmt: skip
        """Plays every task once with the world model's weights of that version; candidates (K, n).

        Weights are read only when `version` is another than the last one's; None means those sent last, and before
        any were sent those that `make` gave. Raises KeyboardInterrupt soon after `stop()` becomes true, UserError
        when workers keep dying, ValueError for a new version without weights, and whatever `make` raises.
        """
        self._keep(weights, version)
        source, parts = self._sent[1] if self._sent else None, chunks(candidates, tasks)
        if self.count:
            assert not isinstance(source, dict)
            return joined(self._play_in_processes(source, version, parts, stop))
        self._local = self._local or Worker(self.make)
        played = []
        for part in parts:
            if stop():
                raise KeyboardInterrupt
            played.append(self._local.play(source, version, part))
        return joined(played)

    def close(self) -> None:
        """Ends the processes at once, without waiting for what they play; closes the games and removes the weights."""
        self._close_pool()
        if self._local:
            self._local.games.close()
        if self._folder:
            self._folder.cleanup()
        self._local = self._folder = self._sent = None

    def _keep(self, weights: Weights | None, version: int) -> None:
        if self._sent and self._sent[0] == version:
            return
        if weights is None:
            if self._sent:
                raise ValueError(f"no weights for version {version}; the last ones sent are version {self._sent[0]}")
            return
        if not self.count:
            self._sent = version, weights
            return
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix=".weights-", dir=self.folder)
        path = Path(self._folder.name) / f"{version}.npz"  # a file, so that they are not sent with every chunk
        np.savez(path, **weights)  # type: ignore[arg-type]
        if self._sent and isinstance(self._sent[1], Path):
            self._sent[1].unlink()
        self._sent = version, path

    def _play_in_processes(
        self, weights: Path | None, version: int, parts: Sequence[Part], stop: Callable[[], bool]
    ) -> list[Played]:
        played: dict[int, Played] = {}
        deaths = 0
        try:
            while len(played) < len(parts):
                before = len(played)
                if self._try(played, weights, version, parts, stop):
                    continue
                deaths = deaths + 1 if len(played) == before else 1
                self._close_pool()
                if deaths >= DEATHS:
                    raise UserError(
                        f"Worker processes died {deaths} times and finished nothing in between; the machine may be out "
                        "of memory: use fewer workers, or 0 to play in the run's own process."
                    )
                self.say("A worker process has died; what it played is played again.")
        except BaseException:
            self._close_pool()  # or it would go on playing what nobody waits for
            raise
        return [played[number] for number in range(len(parts))]

    def _try(
        self, played: dict[int, Played], weights: Path | None, version: int, parts: Sequence[Part],
        stop: Callable[[], bool],
    ) -> bool:  # fmt: skip
        """Adds to `played` what is missing there; False when a worker died before all of it was done."""
        self._pool = self._pool or Pool(self.make, self.count)
        number_of: dict[Future[Played], int] = {}
        with suppress(BrokenProcessPool):  # those submitted before it broke say so themselves
            for number, part in enumerate(parts):
                if number not in played:
                    number_of[self._pool.submit(weights, version, part)] = number
        whole, going = len(number_of) + len(played) == len(parts), set(number_of)
        while going:
            done, going = wait(going, timeout=POLL, return_when=FIRST_COMPLETED)
            for future in done:
                if isinstance(future.exception(), BrokenProcessPool):
                    whole = False
                else:
                    played[number_of[future]] = future.result()
            if stop():
                raise KeyboardInterrupt
        return whole

    def _close_pool(self) -> None:
        if self._pool:
            self._pool.close()
        self._pool = None


_worker: Worker | None = None  # of a process of a pool
_make: Make | None = None


def _begin(make: Make, line: Connection) -> None:
    """Runs once in a new process of a pool."""
    global _make
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    _make = make


def _end_with(line: Connection) -> None:
    """Ends this process, whatever it plays, when the other end of the line closes."""
    line.poll(None)
    os._exit(1)


def _play_here(weights: Path | None, version: int, part: Part) -> Played:
    """A chunk, in a process of a pool. The first one makes the agent, so that what `make` raises is heard."""
    global _worker
    if _worker is None:
        assert _make is not None
        _worker = Worker(_make)
    return _worker.play(weights, version, part)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """A process started within never sees Ctrl-C, not even before its first line; here it waits until the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read(path: Path) -> Weights:
    with np.load(path) as file:
        return dict(file)


def _to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr)
