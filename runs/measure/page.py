"""The command `page`: the developer's tool for the page of `play`, end to end, in a real browser and with rude guests.

`what=speed`: a headless Chromium opens the page while the agent and then a key-presser play. Counted are frames that
were drawn; the latency is from a key going down to the first picture that knows of it, the browser's next repaint
included. Writes results/page.json and a picture of the page, results/page.png.

`what=stress`: 1,000 malformed messages, 50 visitors that come and go, and one that does not read. The server is a
process of its own; its memory is read from /proc (Linux) before and after each. Writes results/page-stress.json.

Both write into the run's folder, or into runs/out/ for the model that ships.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Lines
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from envs.errors import UserError
from envs.settings import setting
from play import server
from play.connection import ServerState
from runs.cli.play import PlayConfig, about, parts, session
from runs.dreams import Loaded, load_parts
from runs.folder import files, system
from runs.folder.run import Run, keep

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PRESSES = 120
CASES = (("dream", None), ("real", None), ("both", None), ("dream", 15.0))  # what is shown, and the frame-rate limit
MALFORMED, VISITS = 1_000, 50
ROOT = Path(__file__).resolve().parents[2]
KINDS = (
    "", "{", "[]", "null", '{"do":', '{"do": "fly"}', '{"do": {"a": 1}}', '{"keys": 7}',
    '{"do": "fps", "value": 1e999}', '{"do": "mode", "value": [1]}', '{"do": "rewind", "value": "x"}', "[" * 9_000,
    '{"id": ' + "9" * 5_000 + "}",
)  # fmt: skip


@dataclass(frozen=True)
class PageConfig:
    """What `python main.py page` takes."""

    run: str | None = setting(None, help="a run's folder or name; the Pong that ships when not given")
    what: str = setting("speed", choices=("speed", "stress"), help="how fast the page is, or what its server endures")
    seconds: float = setting(20.0, 1, 3600, help="of each case; of the guest that does not read")
    fps: float = setting(120.0, 1, 240, help="limit, more than a screen shows")
    patience: float = setting(120.0, above=0, high=3600, help="seconds to wait for the server under stress")
    threads: int = setting(0, 0, 1024, help="of torch, as play takes it")
    device: str = setting("auto", help="auto, cpu or cuda")


def command(asked: PageConfig) -> None:
    """Measures, prints and writes; raises UserError for a run without a model or a machine without a browser."""
    if asked.what == "speed":
        _speed(asked)
    else:
        _stress(asked)


# ---- a browser and a server for it ----
def executable() -> str:
    """The browser that CHROMIUM names, or one that is installed. Raises UserError when there is none."""
    path = os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        raise UserError("There is no Chromium here: install one (apt-get install chromium) or name it in CHROMIUM.")
    return path


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser. Raises UserError where Playwright or Chromium is missing."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as problem:
        raise UserError('Playwright drives the browser: install it with pip install -e ".[test]".') from problem
    path = executable()
    with sync_playwright() as tool:
        try:
            # Containers run as root, where Chromium's sandbox refuses to start; it opens our own page only.
            browser = tool.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=120_000)
        except Error as problem:
            raise UserError(f"{path} cannot be started: {str(problem).splitlines()[0]}") from problem
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(house: ServerState) -> Iterator[str]:
    """The page on a free port, served by a thread of this process; gives its address."""
    at = server.listen("127.0.0.1", 0)
    running = server.made(house)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [at]}, daemon=True)
    thread.start()
    while not running.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{at.getsockname()[1]}/"
    finally:
        running.should_exit = True
        thread.join(10)
        house.work.shutdown()


# ---- speed ----
def measure_speed(loaded: Loaded, asked: PageConfig, folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """One row for each case, and the page as a PNG; `folder` is for nothing that lasts."""
    rows = []
    settings = PlayConfig(run=asked.run, fps=asked.fps, player="agent")
    shared = parts(loaded)
    seat = partial(session, settings, loaded, shared)
    house = ServerState(shared, about(loaded), folder, None, seat, asked.threads or 1)
    with served(house) as url, chromium() as opened:
        page = opened.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(600_000)
        page.goto(url)
        for mode, limit in CASES:
            fps = limit or asked.fps
            _show(page, mode, fps)
            began, used, before = time.perf_counter(), time.process_time(), page.evaluate("play.frames")
            page.wait_for_timeout(1000 * asked.seconds)
            shown, seconds = page.evaluate("play.frames") - before, time.perf_counter() - began
            spent = time.process_time() - used  # of all threads: Playwright's part is small
            row = {"mode": mode, "limit": fps, "frames_per_second": round(shown / seconds, 1)}
            # Processor time says what a frame costs on a machine that has other work as well.
            row |= {"server_cores": round(spent / seconds, 2), "server_cpu_ms": round(1e3 * spent / max(1, shown), 2)}
            model = page.evaluate("play.state.model_ms")
            row |= {"dropped": page.evaluate("play.state.dropped")}
            row |= {"model_median_ms": model[0], "model_p95_ms": model[1]} | _latency(page)
            rows.append(row)
        _show(page, "both", 15)
        page.evaluate("give('sync')")
        page.set_viewport_size({"width": 1280, "height": 680})
        page.wait_for_timeout(2000)
        return rows, page.screenshot()


def _show(page: Any, mode: str, fps: float) -> None:
    """The agent plays so fast, and the page has followed."""
    for command, value in (("mode", mode), ("fps", fps), ("player", "agent")):
        page.evaluate("([command, value]) => give(command, value)", [command, value])
    page.wait_for_function(f"play.state && play.state.mode === '{mode}' && play.state.fps === {fps}")
    page.evaluate("play.frames0 = play.frames")
    page.wait_for_function("play.frames > play.frames0 + 20")


def _latency(page: Any) -> dict[str, float]:
    """Presses keys at moments that have nothing to do with the clock of the game."""
    rng = np.random.default_rng(0)
    page.evaluate("give('player', 'human'); play.latencies.length = 0")
    keys = page.evaluate("[...gameKeys]")
    key = {"space": " ", "left": "ArrowLeft", "up": "ArrowUp"}.get(keys[0], keys[0])
    for _ in range(PRESSES):
        page.keyboard.down(key)
        page.wait_for_timeout(float(rng.uniform(30, 90)))
        page.keyboard.up(key)
        page.wait_for_timeout(float(rng.uniform(30, 90)))
    found = np.array(page.evaluate("play.latencies"))
    return {
        "inputs": len(found),
        "input_to_picture_median_ms": round(float(np.median(found)), 1),
        "input_to_picture_p95_ms": round(float(np.percentile(found, 95)), 1),
    }


def _speed(asked: PageConfig) -> None:
    torch.set_num_threads(1)  # see ServerState
    before = os.getloadavg()
    loaded = load_parts(asked.run, asked.device)
    rows, picture = measure_speed(loaded, asked, Path("/nonexistent"))
    peak = int(1024 * system.memory_gb())
    found = {
        "threads": asked.threads or 1,
        "load_before": [round(load, 2) for load in before],
        "peak_mb": peak,
        "rows": rows,
    }
    path = keep(loaded.run, "page", {"env": loaded.config.env} | found)
    files.write_atomic(path.with_suffix(".png"), lambda file: file.write(picture))
    lines = Lines(title=f"{loaded.config.env} in the browser")
    for name in ("", *(row["mode"] for row in rows)):
        lines.add_column(name, justify="right")
    for name in list(rows[0])[1:]:
        lines.add_row(name.replace("_", " "), *(str(row[name]) for row in rows))
    console = Console(highlight=False)
    console.print(lines)
    console.print(f"written to {path}", soft_wrap=True)


# ---- stress ----
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
def victim(asked: PageConfig) -> Iterator[Victim]:
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


def measure_stress(server: Victim, seconds: float) -> dict[str, Any]:
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


def _stress(asked: PageConfig) -> None:
    if not sys.platform.startswith("linux"):
        raise UserError("Memory is read from /proc, which only Linux has.")
    run = None if asked.run is None else Run.open(asked.run)
    with victim(asked) as server:
        found = measure_stress(server, asked.seconds)
    path = keep(run, "page-stress", found)
    console = Console(highlight=False)
    for name, value in found.items():
        console.print(f"{name:30} {value}")
    console.print(f"written to {path}", soft_wrap=True)
