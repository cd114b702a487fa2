"""The command `play`: a run, or the model that ships, in the browser, in a window or on film."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from agent.precision import for_inference
from envs.errors import UserError
from envs.games import Games
from envs.make import make_games
from envs.settings import setting
from play.session import HOTTEST, MOST_FPS, GameSession
from play.snapshot import MODES, PLAYERS, WITHOUT_AGENT, Parts
from policies.planner import PlannerConfig, planning
from runs.dreams import Loaded, by_codes, load_parts
from runs.folder.run import OUT
from runs.folder.system import cores, keep_freed_memory
from world_model.code_world import CodeWorld

EXTRA = 'install it with pip install -e ".[play]"'


@dataclass(frozen=True)
class PlayConfig:
    """What `python main.py play` takes."""

    run: str | None = setting(None, help="a run's folder or name; the Pong that ships when not given")
    actions: str = setting(
        "game", choices=("game", "codes"), help="what keys mean: the game's actions, or the codes of latent_action"
    )
    mode: str = setting("dream", choices=MODES, help="what is played")
    player: str | None = setting(
        None, choices=PLAYERS, help="who plays; human when not given, on film the agent (random without a policy)"
    )
    seed: int = setting(0, 0, 2**31 - 1, help="seed of the dream and the real game")
    start: int | None = setting(
        None, 0, 2**31 - 1, help="which of the starts the first dream begins from; drawn when not given"
    )
    temperature: float | None = setting(
        None, 0, HOTTEST, help="temperature of the dream; that of the policy's training when not given"
    )
    fps: float = setting(15.0, 1, MOST_FPS, help="frames a second")
    host: str = setting("127.0.0.1", help="address that the page is served at")
    port: int = setting(8000, 0, 65_535, help="port of the page; 0: any that is free")
    open: bool = setting(True, help="open the page in a browser")
    window: bool = setting(False, help="a window instead of the page")
    record: str | None = setting(None, help="a video file, made without any display")
    steps: int = setting(600, 1, 10**7, help="frames of the video")
    planner: PlannerConfig = PlannerConfig()
    device: str = setting("auto", help="auto, cpu or cuda")
    threads: int = setting(0, 0, 1024, help="torch threads; 0: one, as the browser needs a core too")

    def check(self) -> None:
        """Raises UserError for what does not go together."""
        if self.record is not None and not self.record.endswith(".mp4"):
            raise UserError(f"record={self.record} must name a video that ends in .mp4.")
        if self.actions == "codes" and self.mode != "dream":
            raise UserError("Only the dream knows codes: actions=codes needs mode=dream.")
        if self.record is not None and self.window:
            raise UserError("record=... needs no window: choose one of the two.")


def play(asked: PlayConfig) -> None:
    """Shows the dream as it was asked for.

    Raises:
        UserError: an unknown key or value, no such run, no model in it, no real game, no display, a port in use.
    """
    _need("imageio_ffmpeg")
    keep_freed_memory()
    torch.set_num_threads(1)  # see ServerState
    loaded = load_parts(asked.run, asked.device)
    if asked.actions == "codes":
        loaded = by_codes(loaded)
    threads = threads_for(loaded, asked.threads)
    if asked.record is not None or asked.window:
        torch.set_num_threads(threads)
    if asked.record is not None:
        _film(asked, loaded, Path(asked.record))
    elif asked.window:
        _need("pygame")
        from play.window import show

        show(session(asked, loaded), videos_folder(loaded), episodes_folder(loaded))
    else:
        _serve(asked, loaded, threads)


def threads_for(loaded: Loaded, asked: int) -> int:
    """As many of torch's as asked for, or as pay; 0: as pay. The browser wants a core too."""
    return asked or (min(2, cores()) if loaded.format() == "int8" else 1)


def parts(loaded: Loaded, planner: PlannerConfig | None = None) -> Parts:
    """What every visitor's session needs of a loaded model."""
    config, world = loaded.config, loaded.world()
    for_inference(loaded.agent.world_model, loaded.agent.learner, format=loaded.format())
    game, weight = partial(_game, loaded), config.replay.human_weight
    return Parts(
        config.env, world, loaded.agent.learner, game, weight, players(loaded), loaded.aspect,
        planning(planner or PlannerConfig(), config.policy),
    )  # fmt: skip


def players(loaded: Loaded) -> tuple[str, ...]:
    """Who can play: the agent only where a policy was trained."""
    return PLAYERS if loaded.config.train.policy else WITHOUT_AGENT


def session(asked: PlayConfig, loaded: Loaded, shared: Parts | None = None) -> GameSession:
    """A session as the command line wants it, with parts that others have too or its own.

    Raises UserError for a start that is not there, an agent that was never trained, or no real game.
    """
    able = players(loaded)
    if asked.player is not None and asked.player not in able:
        raise UserError(f"{asked.run} has no policy that could play: player is {' or '.join(able)}.")
    warmth = loaded.temperature(asked.temperature)
    made = GameSession(shared or parts(loaded, asked.planner), seed=asked.seed, temperature=warmth, fps=asked.fps)
    made.set_player(asked.player or (able[1] if asked.record else "human"))
    if asked.start is not None:
        made.reset(asked.start, asked.seed)
    made.set_mode(asked.mode)
    return made


def videos_folder(loaded: Loaded) -> Path:
    """Where recorded videos go."""
    return (OUT if loaded.run is None else loaded.run.folder) / "recordings"


def episodes_folder(loaded: Loaded) -> Path | None:
    """Where what a person plays goes, to be learned from on resuming; a packed model learns nothing more."""
    return None if loaded.run is None else loaded.run.human_folder


def about(loaded: Loaded) -> dict[str, str]:
    """What the page says of the model."""
    name = "the one that ships" if loaded.run is None else loaded.run.folder.name
    size = f"{loaded.config.recipe} {loaded.config.size}"
    return {"model": size, "run": name, "steps": f"{loaded.step:,}", "on": str(loaded.agent.device)}


def _game(loaded: Loaded) -> Games:
    if isinstance(loaded.agent.world_model, CodeWorld):
        raise UserError("The real game knows no codes: it is played with actions=game.")
    return make_games(loaded.config.env, loaded.config.game, 1)


def _serve(asked: PlayConfig, loaded: Loaded, threads: int) -> None:
    _need("starlette", "uvicorn", "websockets")
    from play import server
    from play.connection import ServerState

    shared = parts(loaded, asked.planner)
    make_session = partial(session, asked, loaded, shared)
    make_session().close()  # what is wrong with the request is said here and not on the page
    at = server.listen(asked.host, asked.port)
    state = ServerState(shared, about(loaded), videos_folder(loaded), episodes_folder(loaded), make_session, threads)
    server.serve(state, at, partial(_started, asked, loaded))


def _started(asked: PlayConfig, loaded: Loaded, url: str) -> None:
    said = f"{loaded.config.env}, {', '.join(f'{key} {value}' for key, value in about(loaded).items())}"
    print(f"{said}\n{url}  (Ctrl-C ends it)", flush=True)
    graphic = sys.platform != "linux" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if asked.open and graphic:  # elsewhere a text browser would take the terminal
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def _film(asked: PlayConfig, loaded: Loaded, path: Path) -> None:
    from play.film import film

    made = session(asked, loaded)
    console = Console(highlight=False)
    try:
        with console.status("playing") as status:
            done = film(made, path, asked.steps, lambda n: status.update(f"step {n:,} of {asked.steps:,}"))
    finally:
        made.close()
    console.print(f"{path}: {', '.join(f'{key} {value}' for key, value in done.items())}", soft_wrap=True)


def _need(*modules: str) -> None:
    """Raises UserError for a package that is not installed."""
    import importlib.util

    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"play needs {module}, which is not installed: {EXTRA}.")
