"""How fast the page is, end to end, in a real browser: `python -m runs.measure.page run=NAME [seconds=20] [fps=120]`.

A headless Chromium opens the page while the agent and then a key-presser play. Counted are frames that were drawn;
the latency is from a key going down to the first picture that knows of it, the browser's next repaint included.
Writes results/play.json and a picture of the page, results/play.png, in the run's folder (runs/out/ for the model in
the box).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Lines

from envs.errors import UserError
from play.connection import ServerState
from runs.cli import compose
from runs.cli.play import PlayConfig, about, parts, session, threads_for
from runs.dreams import Loaded, load_parts
from runs.folder import files, system
from runs.folder.run import keep
from runs.measure import browser

PRESSES = 120
CASES = (("dream", None), ("real", None), ("both", None), ("dream", 15.0))  # what is shown, and the frame-rate limit


@dataclass(frozen=True)
class BenchConfig:
    """What the command takes."""

    run: str | None = None
    seconds: float = 20.0  # of each case
    fps: float = 120.0  # limit: more than a screen shows
    threads: int = 0  # as `play` takes it
    device: str = "auto"

    def check(self) -> None:
        """Raises UserError for values out of range."""
        if not (1 <= self.seconds <= 3600 and 1 <= self.fps <= 240 and self.threads >= 0):
            raise UserError("seconds must be between 1 and 3600, fps between 1 and 240, threads at least 0.")


def measure(loaded: Loaded, asked: BenchConfig, folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """One row for each case, and the page as a PNG; `folder` is for nothing that lasts."""
    rows = []
    settings = PlayConfig(run=asked.run, fps=asked.fps, player="agent")
    shared = parts(loaded)
    seat = partial(session, settings, loaded, shared)
    house = ServerState(shared, about(loaded), folder, None, seat, threads_for(loaded, asked.threads))
    with browser.served(house) as url, browser.chromium() as chromium:
        page = chromium.new_page(viewport={"width": 1280, "height": 860})
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
            model = page.evaluate("play.told.model_ms")
            row |= {"dropped": page.evaluate("play.told.dropped")}
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
    page.wait_for_function(f"play.told && play.told.mode === '{mode}' && play.told.fps === {fps}")
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


def main(words: Sequence[str]) -> None:
    """Measures and prints; raises UserError for a run without a model or a machine without a browser."""
    asked = compose.changed(BenchConfig(), words)
    torch.set_num_threads(1)  # see House
    before = os.getloadavg()
    loaded = load_parts(asked.run, asked.device)
    rows, picture = measure(loaded, asked, Path("/nonexistent"))
    peak = int(1024 * system.memory_gb())
    found = {
        "threads": threads_for(loaded, asked.threads),
        "load_before": [round(load, 2) for load in before],
        "peak_mb": peak,
        "rows": rows,
    }
    path = keep(loaded.run, "play", {"env": loaded.config.env} | found)
    files.write_atomic(path.with_suffix(".png"), lambda file: file.write(picture))
    lines = Lines(title=f"{loaded.config.env} in the browser")
    for name in ("", *(row["mode"] for row in rows)):
        lines.add_column(name, justify="right")
    for name in list(rows[0])[1:]:
        lines.add_row(name.replace("_", " "), *(str(row[name]) for row in rows))
    console = Console(highlight=False)
    console.print(lines)
    console.print(f"written to {path}", soft_wrap=True)


if __name__ == "__main__":
    from runs.cli.exit_codes import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
