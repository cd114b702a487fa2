"""A desktop window with the page's keys, for playing without a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pygame

from envs.errors import UserError
from play import keys
from play.film import Recorder, panel
from play.session import HOTTEST, MOST_FPS, GameSession
from play.snapshot import MODES
from world_model.dream.envs import open_window

LINE, MARGIN, SCALES = 20, 12, (2, 3, 1)
BACK, TEXT, DIM = (13, 15, 19), (217, 221, 230), (139, 147, 163)
NAMES = {"return": "enter"}  # pygame's names that differ from ours


class Window:
    """The session's pictures, what is said about them, and the keyboard."""

    def __init__(self, session: GameSession, recorder: Recorder) -> None:
        """Raises UserError where there is no display."""
        self.session, self.recorder = session, recorder
        controls = session.parts.world.controls
        self.commands = {key.key: key.command for key in keys.free(controls)}
        self.help = [f"{key.key:>9}  {key.words}" for key in keys.free(controls)]
        self.help = [f"{line['keys']:>9}  {line['words']}" for line in keys.spoken(controls)] + ["", *self.help]
        self.held: set[str] = set()
        self.zoom, self.show_help, self.message = 0, False, "h lists the keys"
        pygame.font.init()
        self.font = pygame.font.Font(None, LINE)
        self.surface = open_window(640, 480, f"{session.parts.name}, dreamloop", resizable=True)
        self.clock = pygame.time.Clock()

    def run(self) -> None:
        """Plays until the window is closed."""
        self.draw()
        while self.listen():
            try:
                moved = self.session.turn(self.held, back="backspace" in self.held and "backspace" in self.commands)
                self.tell(self.recorder.add() if moved else [])
            except UserError as problem:
                self.message = str(problem)
            except OSError as problem:
                self.message = self.recorder.fail(problem)
            self.draw()
            self.clock.tick(self.session.fps)

    def listen(self) -> bool:
        """Takes in what was pressed; False when the window is to close."""
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                return False
            if event.type == pygame.WINDOWFOCUSLOST:
                self.held.clear()
            elif event.type in (pygame.KEYDOWN, pygame.KEYUP):
                name = pygame.key.name(event.key)
                name = NAMES.get(name, name)
                if event.type == pygame.KEYUP:
                    self.held.discard(name)
                else:
                    self.held.add(name)
                    self.obey(self.commands.get(name, ""))
        return True

    def obey(self, command: str) -> None:
        """One command of `play.keys`; a mistake becomes a line on the display."""
        session, was = self.session, self.session.temperature
        try:
            match command:
                case "pause":
                    session.paused = not session.paused
                case "step":
                    session.paused = True
                    session.step(self.held)
                    self.tell(self.recorder.add())
                case "save" | "load" | "reset" | "sync":
                    getattr(session, command)()
                case "mode":
                    session.set_mode(_next(MODES, session.now.mode))
                case "player":
                    session.set_player(_next(session.parts.players, session.player))
                case "warmer" | "cooler":
                    session.set_temperature(
                        min(HOTTEST, max(0.0, round(was + (0.1 if command == "warmer" else -0.1), 2)))
                    )
                case "faster":
                    session.set_fps(min(MOST_FPS, max(session.fps + 1, round(session.fps * 1.25))))
                case "slower":
                    session.set_fps(max(1, min(session.fps - 1, round(session.fps * 0.8))))
                case "record" if session.recording:
                    self.tell(self.recorder.stop())
                case "record":
                    self.recorder.start()
                case "zoom":
                    self.zoom = (self.zoom + 1) % len(SCALES)
                case "help":
                    self.show_help = not self.show_help
        except UserError as problem:
            self.message = str(problem)
        except OSError as problem:
            self.message = self.recorder.fail(problem)

    def tell(self, files: list[Path]) -> None:
        """Says which files have been completed."""
        for path in files:
            self.message = f"saved {path}"

    def draw(self) -> None:
        """The pictures, and lines of text below."""
        picture = panel(self.session.now.pictures())
        picture = picture.repeat(SCALES[self.zoom], 0).repeat(SCALES[self.zoom], 1)
        lines = self.help if self.show_help else self.lines()
        width = max(picture.shape[1], 560) + 2 * MARGIN
        height = picture.shape[0] + LINE * len(lines) + 3 * MARGIN
        if self.surface.get_size() != (width, height):
            self.surface = pygame.display.set_mode((width, height), pygame.RESIZABLE)
        self.surface.fill(BACK)
        shown = pygame.image.frombuffer(np.ascontiguousarray(picture).tobytes(), picture.shape[1::-1], "RGB")
        self.surface.blit(shown, ((width - picture.shape[1]) // 2, MARGIN))
        for i, line in enumerate(lines):
            colour = DIM if i == len(lines) - 1 and not self.show_help else TEXT
            at = (MARGIN, picture.shape[0] + 2 * MARGIN + i * LINE)
            self.surface.blit(self.font.render(line, True, colour), at)
        pygame.display.flip()

    def lines(self) -> list[str]:
        """What the display says."""
        told = self.session.to_dict()
        sides = [
            f"{name}: return {side['return']}, reward {side['reward']}, goes on {side['cont']}"
            for name, side in told["views"].items()
        ]
        median, worst = told["model_ms"]
        state = ", ".join(word for word in ("paused", "recording") if told[word])
        return [
            *sides,
            f"{self.clock.get_fps():.1f} frames/s, model {median} ms, 95 of 100 within {worst} ms",
            f"{told['player']} plays, temperature {told['temperature']:g}, at most {told['fps']:g} frames/s",
            f"value {told['value']}, dreamed {told['horizon']} steps, step {told['step']}, seed {told['seed']}",
            f"{state}  {self.message}".strip(),
        ]


def show(session: GameSession, videos: Path, episodes: Path | None) -> None:
    """Opens the window and plays until it is closed. Raises UserError where there is no display."""
    recorder = Recorder(session, videos, episodes)
    try:
        Window(session, recorder).run()
    finally:
        try:
            recorder.stop()
        finally:
            session.close()
            pygame.quit()


def _next(words: tuple[str, ...], now: str) -> str:
    return words[(words.index(now) + 1) % len(words)]
