"""The command `page`: the developer's tool for the page of `play`, end to end, in a real browser and with rude guests.

`what=speed`: a headless Chromium opens the page while the agent and then a key-presser play. Counted are frames that
were drawn; the latency is from a key going down to the first picture that knows of it, the browser's next repaint
included. Writes results/page.json and a picture of the page, results/page.png.

`what=stress`: 1,000 malformed messages, 100 visitors that come and go, 60 at once, one that does not read, pages from
elsewhere under another name, requests of which only half comes. The server is a process of its own; its memory is read
from /proc (Linux) before and after each. Writes results/page-stress.json.

`what=access`: what axe-core (`npm pack axe-core`) finds on the page and in its dialog, on four screens. Writes
results/page-access.json.

`what=static folder=docs/play`: a page that `export` has written, without a server of ours: how soon, how fast, whether
it slows or grows, and whether its figures are those of PyTorch. Writes results/page-static.json.

All write into the run's folder, or into runs/out/ for the model that ships.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Lines
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

from agent.evaluate import evaluate_policy
from agent.player import Player
from envs.errors import UserError
from envs.make import make_games
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
MALFORMED, VISITS, AT_ONCE, FOREIGN, HALVES = 1_000, 100, 60, 40, 20
# What a server that endures says of itself.
ENDURED = {"alive": True, "tracebacks": 0, "foreign_answered": 0, "half_requests_still_open": 0, "at_once": AT_ONCE}
SCREENS: dict[str, dict[str, Any]] = {  # as a browser is told of them
    "large, dark": {"viewport": {"width": 1920, "height": 1080}, "color_scheme": "dark"},
    "laptop, light": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
    "phone on its side": {"viewport": {"width": 844, "height": 390}, "has_touch": True, "is_mobile": True},
}
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
    what: str = setting(
        "speed", choices=("speed", "stress", "access", "static"),
        help="speed of the page, stress test of its server, accessibility, or speed of an exported page",
    )  # fmt: skip
    folder: str = setting(
        "docs/play", help="folder of an exported page, for what=static; run names what it was made of"
    )
    weights: str = setting("int8", choices=("float32", "float16", "int8"), help="number format of its model")
    episodes: int = setting(0, 0, 10_000, help="episodes of the real game, played by the agent with those weights")
    axe: str = setting("", help="axe.min.js of npm's axe-core, for what=access")
    seconds: float = setting(20.0, 1, 3600, help="seconds of each case; of the client that does not read")
    fps: float = setting(120.0, 1, 240, help="limit of the frame rate, more than a screen shows")
    patience: float = setting(120.0, above=0, high=3600, help="seconds to wait for the server under stress")
    threads: int = setting(0, 0, 1024, help="torch threads, as in play")
    device: str = setting("auto", help="auto, cpu or cuda")


def command(asked: PageConfig) -> None:
    """Measures, prints and writes; raises UserError for a run without a model or a machine without a browser."""
    {"speed": _speed, "stress": _stress, "access": _access, "static": _static}[asked.what](asked)


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
def served(state: ServerState) -> Iterator[str]:
    """The page on a free port, served by a thread of this process; gives its address."""
    at = server.listen("127.0.0.1", 0)
    running = server.made(state)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [at]}, daemon=True)
    thread.start()
    while not running.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{at.getsockname()[1]}/"
    finally:
        running.should_exit = True
        thread.join(10)
        state.work.shutdown()


# ---- speed ----
def measure_speed(loaded: Loaded, asked: PageConfig, folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """One row for each case, and the page as a PNG; `folder` is for nothing that lasts."""
    rows = []
    settings = PlayConfig(run=asked.run, fps=asked.fps, player="agent")
    shared = parts(loaded)
    make_session = partial(session, settings, loaded, shared)
    state = ServerState(shared, about(loaded), folder, None, make_session, asked.threads or 1)
    with served(state) as url, chromium() as opened:
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
    before = system.load()
    loaded = load_parts(asked.run, asked.device)
    rows, picture = measure_speed(loaded, asked, Path("/nonexistent"))
    peak = int(1024 * system.memory_gb())
    found = {
        "threads": asked.threads or 1,
        "load_before": before,
        "peak_mb": peak,
        "rows": rows,
    }
    path = keep(loaded.run, "page", {"env": loaded.config.env} | found)
    files.write_atomic(path.with_suffix(".png"), picture)
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

    def __init__(self, process: subprocess.Popen[str], url: str, patience: float, log: IO[str]) -> None:
        self.process, self.url, self.patience, self.log = process, url, patience, log

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 80)

    def tracebacks(self) -> int:
        """How many it has written so far."""
        self.log.seek(0)
        return self.log.read().count("Traceback (most recent call last)")

    @contextmanager
    def visit(self) -> Iterator[Guest]:
        """A visitor, who leaves at the end."""
        address = self.url.replace("http", "ws", 1) + "play"
        wait = self.patience
        with connect(address, open_timeout=wait, max_size=None, close_timeout=wait) as line:
            yield Guest(line, wait)

    def megabytes(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return round(int(status.split("VmRSS:")[1].split()[0]) / 1024, 1)


@contextmanager
def victim(asked: PageConfig) -> Iterator[Victim]:
    """A server on a free port."""
    words = [sys.executable, "main.py", "play", "open=false", "port=0", "fps=120", "player=agent"]
    words += [f"run={Path(asked.run).resolve() if Path(asked.run).exists() else asked.run}"] if asked.run else []
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the server
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next((line.split()[0] for line in lines if line.startswith("http")), None)
        if url is None:
            log.seek(0)
            raise UserError(f"The server did not start: {log.read().strip()}")
        yield Victim(process, url, asked.patience, log)
    finally:
        log.close()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def measure_stress(server: Victim, seconds: float) -> dict[str, Any]:
    """All of it, one after the other; memory in megabytes."""
    with server.visit() as guest:
        guest.frames(700)  # as much as a visitor can rewind through: memory that belongs to it
    found: dict[str, Any] = {"mb_before": server.megabytes()}
    found |= _malformed(server) | {"mb_after_malformed": server.megabytes()}
    for _ in range(VISITS):
        with server.visit() as guest:
            guest.frames(2)
    found |= {"visits": VISITS, "mb_after_visits": server.megabytes()}
    found |= _together(server) | {"mb_after_many_at_once": server.megabytes()}
    found |= _slow(server, seconds) | {"mb_after_slow_reader": server.megabytes()}
    found |= _foreign(server) | _halves(server)
    with server.visit() as guest:
        guest.frames(30)
    return found | {"alive": server.process.poll() is None, "tracebacks": server.tracebacks()}


def _together(server: Victim) -> dict[str, Any]:
    """How many of so many visitors at once each got a picture, or the sentence that it is full."""
    served = full = 0
    with ExitStack() as open_ones:
        guests = [open_ones.enter_context(server.visit()) for _ in range(AT_ONCE)]
        for guest in guests:
            try:
                guest.frames(1)
                served += 1
            except ConnectionClosed as problem:
                full += problem.rcvd is not None and problem.rcvd.code == 1013
    return {"at_once": served + full, "of_these_played": served}


def _foreign(server: Victim) -> dict[str, Any]:
    """Pages of other names, as after a rebinding of theirs, and nonsense for an origin: none may look or play."""
    host, port = server.address
    hosts = [
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "",
        "[",
        "\xff",
        "localhost.evil.example",
    ]
    origins = ["http://evil.example", "http://[", "null", "https://127.0.0.1.evil.example"]
    answered = 0
    for number in range(FOREIGN):
        name, origin = hosts[number % len(hosts)], origins[number % len(origins)]
        upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
        upgrade += "AAAAAAAAAAAAAAAAAAAAAA==\r\n" if number % 2 else "x\r\n"
        path, lines = ("/play", upgrade) if number % 3 else ("/", "")
        request = f"GET {path} HTTP/1.1\r\nHost: {name}\r\nOrigin: {origin}\r\n{lines}\r\n"
        with socket.create_connection((host, port), timeout=server.patience) as line:
            line.sendall(request.encode("latin-1"))
            answered += line.recv(200).split(b" ")[1:2] in ([b"200"], [b"101"])
    return {"foreign": FOREIGN, "foreign_answered": answered}


def _halves(server: Victim) -> dict[str, Any]:
    """Requests of which only the beginning comes: they are given up, and others are answered meanwhile."""
    lines = [socket.create_connection(server.address, timeout=server.patience) for _ in range(HALVES)]
    for number, line in enumerate(lines):
        line.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n"[: number + 5])
    with server.visit() as guest:
        guest.frames(2)
    still = 0
    for line in lines:
        with line:
            try:
                while line.recv(1_000):
                    pass
            except TimeoutError:
                still += 1
            except OSError:
                pass
    return {"half_requests": HALVES, "half_requests_still_open": still}


# ---- access ----
def measure_access(asked: PageConfig) -> dict[str, list[dict[str, Any]]]:
    """What axe-core finds on each screen, on the page and in the dialog of its keys: rule, impact, how many nodes."""
    try:
        axe = Path(asked.axe).read_text()
    except OSError as problem:
        raise UserError(
            "axe=PATH must name axe.min.js of npm's axe-core: npm pack axe-core, and tar xzf what that has fetched."
        ) from problem
    loaded = load_parts(asked.run, asked.device)
    settings = PlayConfig(run=asked.run, mode="both", player="agent")
    shared, found = parts(loaded), dict[str, list[dict[str, Any]]]()
    state = ServerState(
        shared,
        about(loaded),
        Path("/nonexistent"),
        None,
        partial(session, settings, loaded, shared),
        asked.threads or 1,
    )
    with served(state) as url, chromium() as opened:
        for name, screen in SCREENS.items():
            context = opened.new_context(**screen)
            page = context.new_page()
            page.set_default_timeout(600_000)
            page.goto(url + ("?touch" if screen.get("has_touch") else ""))
            page.wait_for_function("play.frames > 10")
            page.evaluate(axe)
            for what in ("page", "dialog"):
                if what == "dialog":
                    page.evaluate("command('help')")
                    page.wait_for_timeout(300)
                told = page.evaluate("axe.run()")
                found[f"{name}: {what}"] = [
                    {"rule": one["id"], "impact": one["impact"], "nodes": len(one["nodes"])}
                    for one in told["violations"]
                ]
            context.close()
    return found


# ---- an exported page ----
PARITY, TOGETHER = 1_000, 50  # steps that are compared, and how many of them at a time
SENT = 200e6  # bytes of states that are sent for it: systems with large memories are compared over fewer steps
STEPS_OF = """async ({ feeds, names }) => {
  const { graph, ort } = dream, told = [];
  const text = (array) => {
    const bytes = new Uint8Array(Float32Array.from(array).buffer), parts = [];
    for (let i = 0; i < bytes.length; i += 8192) parts.push(String.fromCharCode(...bytes.subarray(i, i + 8192)));
    return btoa(parts.join(""));
  };
  for (const feed of feeds) {
    const given = {};
    for (const [name, { type, dims, data }] of Object.entries(feed)) {
      const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)).buffer;
      const kinds = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array, bool: Uint8Array };
      if (graph.inputNames.includes(name)) given[name] = new ort.Tensor(type, new kinds[type](bytes), dims);
    }
    const out = await graph.run(given);
    told.push(Object.fromEntries(names.map((name) => [name, text(Array.from(out[name].data, Number))])));
  }
  return told;
}"""


@contextmanager
def hosted(folder: Path) -> Iterator[str]:
    """The address of a folder on a server of plain files."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *told: Any) -> None:
            """Nothing."""

    host = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=host.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{host.server_address[1]}/"
    finally:
        host.shutdown()
        host.server_close()


def measure_static(asked: PageConfig, loaded: Loaded) -> dict[str, Any]:
    """How soon the first frame is there, frames a second and memory part by part, latency, and how near to PyTorch.

    `loaded` is what the page was made of; it gets the page's weights.
    """
    from runs.cli.export import round_weights

    folder, found = Path(asked.folder), dict[str, Any]()
    if not (folder / "dream.json").exists():
        raise UserError(f"{folder} holds no exported page: python main.py export out={folder} writes one.")
    dream = json.loads((folder / "dream.json").read_text())
    told, here = dream["hello"]["about"], about(loaded)
    if {key: told[key] for key in ("model", "steps")} != {key: here[key] for key in ("model", "steps")}:
        made, other = (f"{one['model']} after {one['steps']} steps" for one in (told, here))
        raise UserError(f"{folder} was made of {made}, and run names {other}: folder= is where that was exported to.")
    round_weights(loaded.agent, asked.weights)
    found["megabytes"] = round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 2)
    with hosted(folder) as url, chromium() as opened:
        page = opened.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(600_000)
        began = time.perf_counter()
        page.goto(url)
        page.wait_for_function("play.frames > 0")
        found["first_frame_s"] = round(time.perf_counter() - began, 2)
        page.evaluate("fps => { give('player', 'agent'); give('fps', fps); }", asked.fps)
        parts = max(1, round(asked.seconds / 60))
        rows, line = [], page.context.new_cdp_session(page)
        for _ in range(parts):
            began, before = time.perf_counter(), page.evaluate("play.frames")
            page.wait_for_timeout(1000 * asked.seconds / parts)
            fps = (page.evaluate("play.frames") - before) / (time.perf_counter() - began)
            line.send("HeapProfiler.collectGarbage")
            heap = line.send("Runtime.getHeapUsage")
            rows.append({"frames_per_second": round(fps, 1), "heap_mb": round(heap["usedSize"] / 2**20, 1),
                         "buffers_mb": round(heap.get("backingStorageSize", 0) / 2**20, 1)})  # fmt: skip
        model = page.evaluate("play.state.model_ms")
        found |= {
            "parts_of_s": asked.seconds / parts,
            "rows": rows,
            "model_median_ms": model[0],
            "model_p95_ms": model[1],
        }
        found |= _latency(page) | _parity(page, loaded, dream["numbers"])
    return found | ({"score": _score(loaded, asked.episodes)} if asked.episodes else {})


def _score(loaded: Loaded, episodes: int) -> dict[str, Any]:
    """What the agent wins in the real game with the page's weights, beside what was published of it."""
    games = make_games(loaded.config.env, loaded.config.game, min(episodes, 16))
    torch.manual_seed(0)
    try:
        return evaluate_policy(Player(loaded.agent), games, episodes, seed=loaded.config.seed).summary()
    finally:
        games.close()


def _parity(page: Any, loaded: Loaded, numbers: dict[str, int]) -> dict[str, Any]:
    """The graph in the browser beside the model in PyTorch, with the same weights, states and random numbers."""
    from play import graph
    from runs.cli.export import export_parts

    shared, worst = export_parts(loaded), dict[str, float]()
    page.evaluate("give('pause', true)")
    size = sum(leaf.numel() * leaf.element_size() for leaf in graph.begun(shared, 0)[0])
    count, together = (int(min(most, max(1, SENT / part / size))) for most, part in ((PARITY, 1), (TOGETHER, 20)))
    steps, drawn = graph.reference(shared, numbers, count), 0
    for begin in range(0, count, together):
        some = [next(steps) for _ in range(min(together, count - begin))]
        names = list(some[0][1])
        answer = page.evaluate(STEPS_OF, {"feeds": [_sent(feed) for feed, _ in some], "names": names})
        for (_, expected), got in zip(some, answer, strict=True):
            made = {name: np.frombuffer(base64.b64decode(got[name]), np.float32) for name in names}
            apart = {name: float(np.abs(made[name] - expected[name].reshape(-1)).max()) for name in names}
            if apart["state0_next"] > 0.5:  # a random number fell between the two: another latent was drawn
                drawn += 1
                continue
            apart["picture"] = float(np.abs(made["picture"] - expected["picture"].reshape(-1)).mean()) / 255
            worst = {name: max(worst.get(name, 0.0), value) for name, value in apart.items()}
    return {"compared_steps": count, "steps_with_another_draw": drawn,
            "largest_difference": {name: float(f"{value:.2g}") for name, value in worst.items()}}  # fmt: skip


def _sent(feed: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        name: {"type": str(array.dtype), "dims": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}
        for name, array in feed.items()
    }


def _static(asked: PageConfig) -> None:
    before, loaded = system.load(), load_parts(asked.run, "cpu")
    found = measure_static(asked, loaded) | {"load_before": before, "folder": asked.folder}
    console = Console(highlight=False)
    for name, value in found.items():
        console.print(f"{name:28} {value}")
    console.print(f"written to {keep(loaded.run, 'page-static', found)}", soft_wrap=True)


def _finding(row: dict[str, Any]) -> str:
    return f"{row['rule']} ({row['impact']}, {row['nodes']} nodes)"


def _access(asked: PageConfig) -> None:
    run = None if asked.run is None else Run.open(asked.run)
    found = measure_access(asked)
    console = Console(highlight=False)
    for screen, rows in found.items():
        console.print(f"{screen:28} {'; '.join(_finding(row) for row in rows) or 'nothing'}")
    console.print(f"written to {keep(run, 'page-access', {'screens': found})}", soft_wrap=True)


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
