"""What the server of `play` endures: `python -m runs.measure.page_stress [run=NAME] [seconds=20]`.

1,000 malformed messages, 50 visitors that come and go, and one that does not read. The server is a process of its own;
its memory is read from /proc (Linux) before and after each. Writes results/torture.json in the run's folder.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from envs.errors import UserError
from runs.cli import compose
from runs.cli.exit_codes import guarded
from runs.folder.run import Run, keep

MALFORMED, VISITS = 1_000, 50
ROOT = Path(__file__).resolve().parent.parent
KINDS = (
    "", "{", "[]", "null", '{"do":', '{"do": "fly"}', '{"do": {"a": 1}}', '{"keys": 7}',
    '{"do": "fps", "value": 1e999}', '{"do": "mode", "value": [1]}', '{"do": "rewind", "value": "x"}', "[" * 9_000,
    '{"id": ' + "9" * 5_000 + "}",
)  # fmt: skip


@dataclass(frozen=True)
class TortureConfig:
    """What the command takes."""

    run: str | None = None
    seconds: float = 20.0  # that nothing is read
    patience: float = 120.0  # seconds to wait for the server

    def check(self) -> None:
        """Raises UserError for values out of range."""
        if self.seconds <= 0 or self.patience <= 0:
            raise UserError("seconds and patience must be positive.")


class Guest:
    """A websocket of the server, and how many frames have come over it."""

    def __init__(self, socket: ClientConnection, patience: float) -> None:
        self.socket, self.patience, self.seen = socket, patience, 0

    def frames(self, count: int) -> list[dict[str, Any]]:
        """Reads and answers until so many more frames have come; returns the messages in words."""
        said, until = [], self.seen + count
        while self.seen < until:
            message = self.socket.recv(self.patience)
            if isinstance(message, str):
                said.append(json.loads(message))
            else:
                self.seen += 1
                self.socket.send(json.dumps({"ack": self.seen}))
        return said


class Victim:
    """The server process."""

    def __init__(self, process: subprocess.Popen[str], url: str, patience: float) -> None:
        self.process, self.url, self.patience = process, url, patience

    @contextmanager
    def visit(self) -> Iterator[Guest]:
        """A visitor, who leaves at the end."""
        address = self.url.replace("http", "ws", 1) + "play"
        wait = self.patience
        with connect(address, open_timeout=wait, max_size=None, close_timeout=wait) as socket:
            yield Guest(socket, wait)

    def megabytes(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return round(int(status.split("VmRSS:")[1].split()[0]) / 1024, 1)


@contextmanager
def victim(asked: TortureConfig) -> Iterator[Victim]:
    """A server on a free port."""
    words = [sys.executable, "main.py", "play", "open=false", "port=0", "fps=120", "player=agent"]
    words += [f"run={Path(asked.run).resolve() if Path(asked.run).exists() else asked.run}"] if asked.run else []
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next((line.split()[0] for line in lines if line.startswith("http")), None)
        if url is None:
            raise UserError("The server did not start; its own sentence stands above.")
        yield Victim(process, url, asked.patience)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def measure(server: Victim, seconds: float) -> dict[str, Any]:
    """All three, one after the other; memory in megabytes."""
    with server.visit() as guest:
        guest.frames(700)  # as much as a visitor can rewind through: memory that belongs to it
    found: dict[str, Any] = {"mb_before": server.megabytes()}
    found |= _malformed(server) | {"mb_after_malformed": server.megabytes()}
    for _ in range(VISITS):
        with server.visit() as guest:
            guest.frames(2)
    found |= {"visits": VISITS, "mb_after_visits": server.megabytes()}
    found |= _slow(server, seconds) | {"mb_after_slow_reader": server.megabytes()}
    with server.visit() as guest:
        guest.frames(30)
    return found | {"alive": server.process.poll() is None}


def _malformed(server: Victim) -> dict[str, Any]:
    rng, sent, complaints, ended = random.Random(0), 0, 0, 0
    while sent < MALFORMED:
        try:
            with server.visit() as guest:
                while sent < MALFORMED:
                    sent += 1
                    guest.socket.send(_bad(rng, sent))
                    if sent % 10 == 0:
                        complaints += sum("error" in message for message in guest.frames(1))
        except (WebSocketException, OSError):
            ended += 1
    return {"malformed": sent, "complaints_read": complaints, "connections_ended": ended}


def _bad(rng: random.Random, number: int) -> str | bytes:
    if number % 250 == 0:
        return "x" * 100_000  # too large: ends this one connection
    return rng.randbytes(rng.randrange(1, 2_000)) if number % 4 == 0 else rng.choice(KINDS)


def _slow(server: Victim, seconds: float) -> dict[str, Any]:
    """A visitor that reads a little and then nothing, and another one beside it."""
    with server.visit() as slow, server.visit() as other:
        slow.frames(2)
        began, frames = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            other.frames(10)
            frames += 10
        found = {"slow_seconds": seconds, "mb_with_slow_reader": server.megabytes()}
        return found | {"frames_per_second_beside_it": round(frames / (time.monotonic() - began), 1)}


def main(words: Sequence[str]) -> None:
    """Measures, prints and writes."""
    asked = compose.changed(TortureConfig(), words)
    if not sys.platform.startswith("linux"):
        raise UserError("Memory is read from /proc, which only Linux has.")
    run = None if asked.run is None else Run.open(asked.run)
    with victim(asked) as server:
        found = measure(server, asked.seconds)
    path = keep(run, "torture", found)
    console = Console(highlight=False)
    for name, value in found.items():
        console.print(f"{name:30} {value}")
    console.print(f"written to {path}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
