"""The command `play`: a run's model on film, in a window, in the browser, and every mistake in one sentence."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest

from envs.errors import UserError
from envs.make import make_games
from main import main
from play.film import Recorder
from runs import build
from runs.cli import commands, compose, play
from runs.dreams import load_parts
from runs.folder.run import Run
from runs.measure import long_rollout
from runs.recipes import preset
from tests import tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run of Catch that has played a little and was saved."""
    config = preset("reverie", "toy")
    config = replace(config, env="Catch-v0", game=replace(config.game, num_envs=2))
    made = Run.create(config, tmp_path_factory.mktemp("played") / "run")
    games = make_games(config.env, config.game)
    loop = build.loop(config, games, made.episodes_folder)
    made.note(**commands.about(games))
    loop.collector.collect(400, at_random=True)
    loop.save(made)
    made.close()
    games.close()
    return str(made.folder)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mood=dream"], 'Unknown key "mood"'), (["mode=dreams"], "mode"), (["player=dog"], "player"),
        (["fps=0"], "fps must be between"), (["record=film.gif"], "ends in .mp4"), (["port=70000"], "port"),
        (["temperature=warm"], "temperature needs a number"), (["start=99"], "There is no start 99"),
        (["record=a.mp4", "window=true"], "choose one"), (["host=no.such.host.invalid", "open=false"], "host"),
    ],
)  # fmt: skip
def test_mistakes_end_with_a_sentence(
    run: str, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["play", f"run={run}", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said and "\n" not in said


def test_no_such_run_and_no_checkpoint(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["play", f"run={tmp_path / 'nowhere'}"]) == 2
    assert "There is no run" in capsys.readouterr().err
    for name in ("config.json", "meta.json"):
        (tmp_path / name).write_text((Path(run) / name).read_text())
    assert main(["play", f"run={tmp_path}"]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_the_real_game_that_is_not_there(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(loaded: Any) -> Any:
        raise UserError("Catch-v0 needs a package that is not installed.")

    monkeypatch.setattr(play, "_game", missing)
    assert main(["play", f"run={run}", "mode=both", "open=false", "port=0"]) == 2
    assert "not installed" in capsys.readouterr().err


def test_film(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "films" / "dream.mp4"
    assert main(["play", f"run={run}", f"record={path}", "steps=9", "seed=3"]) == 0
    assert path.stat().st_size > 500 and [one.name for one in path.parent.iterdir()] == ["dream.mp4"]
    assert "steps 9" in capsys.readouterr().out


def test_what_the_command_line_says_is_at_the_table(run: str) -> None:
    words = ["mode=both", "player=random", "seed=4", "temperature=0.3", "fps=30", "planner.horizon=3"]
    asked = compose.changed(play.PlayConfig(), words)
    made = play.session(asked, load_parts(run))
    told = made.to_dict()
    assert (told["mode"], told["player"], told["seed"]) == ("both", "random", 4)
    assert (told["temperature"], told["fps"]) == (0.3, 30)
    assert made.parts.planner.horizon == 3
    made.set_player("planner")
    made.step()
    made.close()
    asked = replace(asked, mode="dream", start=2, temperature=None)
    told = play.session(asked, load_parts(run)).to_dict()
    assert told["start"] == 2 and told["temperature"] == preset("reverie", "toy").policy.temperature


@pytest.fixture
def server(run: str) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "main.py", "play", f"run={run}", "open=false", "port=0"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_the_server_ends_with_ctrl_c(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    lines = [server.stdout.readline(), server.stdout.readline()]
    assert "Catch-v0" in lines[0] and lines[1].startswith("http://127.0.0.1:")
    os.kill(server.pid, signal.SIGINT)
    _, said = server.communicate(timeout=120)
    assert server.returncode == 130 and "Traceback" not in said


def test_a_port_in_use_and_a_host_that_is_not_here() -> None:
    from play import server

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} is in use.*port={port + 1}"):
            server.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="no.such.host"):
        server.listen("no.such.host.invalid", 0)
    with server.listen("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0


def test_drift(run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the heads say, it dreams on to the end, and every minute is described."""
    monkeypatch.setattr(long_rollout, "MINUTE", 5)
    assert main(["long_rollout", f"run={run}", "steps=12"]) == 0
    told = json.loads((Path(run) / "results" / "long-rollout-steps12.json").read_text())
    assert len(told["minutes"]) == 3 and all(minute["finite"] for minute in told["minutes"])
    assert told["minutes"][0].keys() >= told["game"].keys() >= {"won", "lost", "moves"}
    strip = cv2.imread(str(Path(run) / "results" / "long-rollout-steps12.png"))
    assert strip is not None and strip.shape == (2 * 68 * long_rollout.SCALE, 3 * 68 * long_rollout.SCALE, 3)
    assert "written to" in capsys.readouterr().out


# ---- the window ----
def test_window_keys(tmp_path: Path) -> None:
    """Driven by SDL's dummy display, which shows nothing but takes events."""
    pygame = importlib.import_module("pygame")
    from play.window import Window

    made = tables.table()
    window = Window(made, Recorder(made, tmp_path, None))

    def press(key: int, kind: int = pygame.KEYDOWN) -> bool:
        pygame.event.post(pygame.event.Event(kind, key=key))
        return window.listen()

    assert press(pygame.K_d) and window.held == {"d"}
    made.turn(window.held)
    assert made.now.action == 2
    press(pygame.K_d, pygame.KEYUP)
    assert window.held == set()
    press(pygame.K_p)
    assert made.paused
    press(pygame.K_n)
    assert made.now.step == 2
    for key, mode in ((pygame.K_m, "real"), (pygame.K_m, "both"), (pygame.K_m, "dream")):
        press(key)
        assert made.now.mode == mode
        window.draw()
    press(pygame.K_RIGHTBRACKET)
    press(pygame.K_h)
    window.draw()
    assert made.temperature == 1.1 and window.show_help
    for key, times, fps in ((pygame.K_MINUS, 20, 1), (pygame.K_EQUALS, 40, 240)):
        for _ in range(times):
            press(key)
        assert made.fps == fps
    press(pygame.K_l)
    assert "kept" in window.message
    shown = pygame.surfarray.array3d(window.surface)
    assert len({tuple(pixel) for pixel in shown.reshape(-1, 3)[::7]}) > 10
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    assert not window.listen()
    pygame.quit()


def test_no_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pygame = importlib.import_module("pygame")
    from play.window import show

    for driver in ("nonsense", None):  # None: SDL chooses, and without a display it would draw into nothing
        monkeypatch.delenv("SDL_VIDEODRIVER")
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        if driver:
            monkeypatch.setenv("SDL_VIDEODRIVER", driver)
        pygame.quit()
        with pytest.raises(UserError, match="no display"):
            show(tables.table(), tmp_path, None)
        monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
