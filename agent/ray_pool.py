"""Candidates judged in the real game on the machines of a Ray cluster: `agent.workers` with Ray in place of processes.

Ray (the extra [cluster]) is imported only here and only when asked for. A chunk is one Ray task, the same function of
the same arguments as in a process; Ray starts it anew when its worker or machine dies.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from agent.population import Played, Task
from agent.workers import POLL, EvaluationPool, Make, Part, Weights, Worker, chunks, joined
from envs.errors import UserError

RETRIES = 3  # of a chunk whose worker died
ROOT = Path(__file__).parent.parent
NOT_SENT = ["/.git", "/.venv", "/runs/out", "/runs/results", "/runs/pretrained", "/docs", "/tests", "**/__pycache__"]


class Cluster(EvaluationPool):
    """Plays tasks by Ray, one CPU each chunk. A context manager.

    Without an address `count` local processes are Ray's whole cluster (all CPUs when None). With one ("auto":
    the cluster of this machine, or "host:6379") it is already there: it is sent this code, and must have the same
    Python packages. Raises UserError when Ray is not installed or does not answer.
    """

    def __init__(self, make: Make, count: int | None = None, *, address: str | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UserError('A cluster needs Ray, which is not installed: pip install ".[cluster]"')
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
        import ray

        self.ray: Any = ray
        # "local", because without any address Ray would look for a cluster of somebody else's.
        options: dict[str, Any] = {"address": "local", "num_cpus": count, "include_dashboard": False}
        if address:
            sent = {"working_dir": str(ROOT), "excludes": NOT_SENT}
            options = {"address": address, "runtime_env": sent}
        try:
            with _own_sigterm():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, TimeoutError) as problem:
            raise UserError(
                f"No Ray cluster lets us in at {address or 'this machine'}: {problem} Is it running, and if it asks "
                "for a token, is RAY_AUTH_MODE=token set here?"
            ) from problem
        self._play: Any = ray.remote(num_cpus=1, max_retries=RETRIES)(play_there)
        self._name = uuid.uuid4().hex  # Ray gives its processes to whoever asks; they must not mix up two of these
        self._make = ray.put(make)
        self._sent: tuple[int, Any] | None = None  # version and Ray's reference

    def play(
        self, weights: Weights | None, version: int, candidates: np.ndarray, tasks: Sequence[Task],
        *, stop: Callable[[], bool] = lambda: False,
    ) -> Played:  # fmt: skip
        """As `agent.workers.Workers.play`."""
        if self._sent is None or self._sent[0] != version:
            if weights is not None:
                self._sent = version, self.ray.put(weights)
            elif self._sent is not None:
                raise ValueError(f"no weights for version {version}; the last ones sent are version {self._sent[0]}")
        source = self._sent[1] if self._sent else None
        going = [self._play.remote(self._name, self._make, source, version, part) for part in chunks(candidates, tasks)]
        return joined(self._wait(going, stop))

    def close(self) -> None:
        """Leaves the cluster, or ends it when it is this process's own."""
        self.ray.shutdown()

    def _wait(self, going: list[Any], stop: Callable[[], bool]) -> list[Played]:
        errors, left = self.ray.exceptions, going
        try:
            while left:
                done, left = self.ray.wait(left, timeout=POLL)
                self.ray.get(done)  # so that an error is heard before the others are waited for
                if stop():
                    raise KeyboardInterrupt
            return [Played(*played) for played in self.ray.get(going)]
        except BaseException as problem:
            for chunk in going:
                self.ray.cancel(chunk, force=True)
            if isinstance(problem, errors.RayTaskError):
                raise problem.cause from problem
            if isinstance(problem, errors.RayError):
                raise UserError(
                    f"Ray's workers died {RETRIES + 1} times over the same games: {problem.args[0]}"
                ) from problem
            raise


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's `init` replaces the program's handler of SIGTERM, with which a run saves itself; here it comes back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


_worker: tuple[str, Worker] | None = None  # of a process that Ray started, and for whom


def play_there(name: str, make: Make, weights: Weights | None, version: int, part: Part) -> Played:
    """A chunk, in a process of Ray's."""
    global _worker
    if _worker is None or _worker[0] != name:
        _worker = name, Worker(make)
    return _worker[1].play(weights, version, part)
