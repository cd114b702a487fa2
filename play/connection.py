"""A visitor of the page: what its websocket brings in, the clock of its session, and what goes out.

To the server: JSON objects. {"keys": [...], "back": bool, "id": n}: what is held now; {"ack": n}: frame n is drawn;
{"do": command, "value": ...}: a command of `Connection.COMMANDS`.
To the page: JSON text ({"hello": ...}, {"error": sentence}, {"said": sentence, "link": address}), and frames: 4 bytes
of length (little endian), so much JSON, then the pictures that its "pictures" names, H x W x 3 bytes each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import struct
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from starlette.websockets import WebSocket, WebSocketDisconnect

from envs.errors import UserError
from play import keys
from play.film import Recorder
from play.session import HOTTEST, MOST_FPS, GameSession
from play.snapshot import MODES, Parts

# Frames sent that the page has not drawn yet; further ones are dropped, so that a slow page is not a late one.
AHEAD = 3
WAITING = 32  # commands and messages; further ones are dropped
PAUSE = 1.0  # seconds that a game which is over stays on the screen

log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass
class ServerState:
    """What the visitors share: the parts, the places for recordings, and the one thread that computes.

    That thread uses `threads` of torch. They pay only where no other thread of the process has ever used several:
    OpenMP lets the helpers of a second thread sleep after each call, which then takes three times as long.
    """

    parts: Parts
    about: dict[str, Any]  # of the run, for the page
    videos: Path
    episodes: Path | None
    session: Callable[[], GameSession]  # makes a visitor's session
    threads: int = 1
    connections: set[Connection] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.work = ThreadPoolExecutor(1, "session", torch.set_num_threads, (self.threads,))

    async def run(self, function: Callable[..., Result], *given: Any) -> Result:
        """Calls a function in the computing thread, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self.work, function, *given)


class Connection:
    """One websocket: what comes in, the clock of its session, what goes out."""

    COMMANDS = (
        "pause", "step", "save", "load", "reset", "sync", "record", "mode", "player", "temperature", "fps", "rewind",
        "component",
    )  # fmt: skip

    def __init__(self, socket: WebSocket, server_state: ServerState) -> None:
        self.socket, self.server_state = socket, server_state
        self.held: frozenset[str] = frozenset()
        self.back = False
        self.input = self.seen = 0  # the numbers of the newest input, and of the newest that a step has seen
        self.sent = self.drawn = self.dropped = 0
        self.commands: deque[tuple[str, Any]] = deque(maxlen=WAITING)
        self.words: deque[str] = deque(maxlen=WAITING)
        self.frame: bytes | None = None  # the newest one that is not sent
        self.wake, self.ready = asyncio.Event(), asyncio.Event()

    async def stay(self) -> None:
        """Serves the visitor until it leaves, then frees its session."""
        self.loop = asyncio.get_running_loop()
        try:
            self.session = await self.server_state.run(self.server_state.session)
        except UserError as problem:
            await self.socket.send_json({"error": str(problem)})
            return
        self.recorder = Recorder(self.session, self.server_state.videos, self.server_state.episodes)
        self.say(hello=self._hello())
        tasks = [asyncio.create_task(self._play()), asyncio.create_task(self._write())]
        try:
            await self._read()
        finally:
            for task in tasks:
                task.cancel()
            # Not awaited: a server that is shutting down cancels whatever waits, and the recording would be lost.
            self.server_state.work.submit(self._leave)

    def say(self, **message: Any) -> None:
        """Sends a message; of too many the oldest are dropped."""
        self.words.append(json.dumps(message))
        with contextlib.suppress(RuntimeError):  # the server has ended: nobody reads any more
            self.loop.call_soon_threadsafe(self.ready.set)  # the computing thread says things too

    # ---- in ----
    async def _read(self) -> None:
        while True:
            try:
                message = await self.socket.receive()
            except (WebSocketDisconnect, RuntimeError):
                return
            if message["type"] == "websocket.disconnect":
                return
            try:
                self._take(message.get("text"))
            except UserError as problem:
                self.say(error=str(problem))

    def _take(self, text: str | None) -> None:
        try:
            told = json.loads(text or "")
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise UserError("A message to the game is a JSON object.")
        if isinstance(told.get("ack"), int):
            self.drawn = max(self.drawn, min(told["ack"], self.sent))
            self.ready.set()
        elif isinstance(told.get("keys"), list):
            self.held, self.back = keys.known(told["keys"]), told.get("back") is True
            if isinstance(told.get("id"), int) and abs(told["id"]) < 2**53:
                self.input = told["id"]
            self.wake.set()
        elif told.get("do") in self.COMMANDS:
            self.commands.append((told["do"], told.get("value")))
            self.wake.set()
        else:
            raise UserError(f'"do" is one of {", ".join(self.COMMANDS)}.')

    # ---- the clock ----
    async def _play(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        self._post(await self.server_state.run(self._packed))
        while True:
            frame = await self._ticked()
            if frame is not None:
                self._post(frame)
            if self.session.now.done and not self.session.paused and not self.back:
                await self._rest(PAUSE)
            if self.session.paused and not self.back and not self.commands:
                await self._rest(None)
                due = loop.time()
            due = max(due + 1 / self.session.fps, loop.time())
            await asyncio.sleep(due - loop.time())

    async def _ticked(self) -> bytes | None:
        """A tick of the clock, in the computing thread; what goes wrong is said to the visitor."""
        try:
            return await self.server_state.run(self._tick)
        except UserError as problem:
            self.say(error=str(problem))
        except OSError as problem:
            self.say(error=await self.server_state.run(self.recorder.fail, problem))
        except Exception:  # a fault in the program; the other visitors play on
            log.exception("a session failed")
            self.session.paused = True
            self.say(error="The game met a fault and is paused; its record is in the server's terminal.")
        return await self.server_state.run(self._packed)

    async def _rest(self, seconds: float | None) -> None:
        """Waits for an input or command, or until the time is over."""
        self.wake.clear()
        try:
            await asyncio.wait_for(self.wake.wait(), seconds)
        except TimeoutError:
            return

    def _tick(self) -> bytes | None:
        """The commands that have come in, then a step; a frame when there is something new to show."""
        moved = bool(self.commands)
        while self.commands:
            self._obey(*self.commands.popleft())
        self.seen = self.input
        if self.session.turn(self.held, back=self.back):
            self._saved(self.recorder.add())
            moved = True
        return self._packed() if moved else None

    def _obey(self, command: str, value: Any) -> None:
        session = self.session
        if command == "pause":
            session.paused = bool(value) if value is not None else not session.paused
        elif command == "step":
            session.paused = True
            session.step(self.held)
            self._saved(self.recorder.add())
        elif command == "rewind":
            session.rewind(_whole("rewind", value, 1))
        elif command == "reset":
            session.reset(None if value is None else _whole("reset", value, 0))
        elif command == "record":
            if session.recording:
                self._saved(self.recorder.stop())
            else:
                self.recorder.start()
        elif command in ("save", "load", "sync"):
            getattr(session, command)()
        else:
            getattr(session, f"set_{command}")(value)

    def _saved(self, files: list[Path]) -> None:
        for path in files:
            video = path.suffix == ".mp4"
            words = "Video saved" if video else "Episode saved, to be learned from when the run is resumed"
            self.say(said=f"{words}: {path}", link=f"recordings/{path.name}" if video else None)

    # ---- out ----
    def _post(self, frame: bytes) -> None:
        """Puts a frame in the place of the one that still waits, if there is one."""
        self.dropped += self.frame is not None
        self.frame = frame
        self.ready.set()

    def _packed(self) -> bytes:
        pictures = self.session.now.pictures(film=True)
        shown = [
            {"name": name, "height": one.shape[0], "width": one.shape[1], "aspect": self.session.aspect(name)}
            for name, one in pictures.items()
        ]
        about = self.session.to_dict() | {"pictures": shown, "input": self.seen, "dropped": self.dropped}
        head = json.dumps(about, allow_nan=False).encode()
        return b"".join([struct.pack("<I", len(head)), head, *(part.tobytes() for part in pictures.values())])

    async def _write(self) -> None:
        while True:
            await self.ready.wait()
            self.ready.clear()
            try:
                while self.words:
                    await self.socket.send_text(self.words.popleft())
                if self.frame is not None and self.sent - self.drawn < AHEAD:
                    frame, self.frame = self.frame, None
                    self.sent += 1
                    await self.socket.send_bytes(frame)
            except (WebSocketDisconnect, RuntimeError):  # gone; `_read` notices as well
                return

    def _leave(self) -> None:
        try:
            self.recorder.stop()
        except OSError as problem:
            log.warning("a recording was lost: %s", problem)
        self.session.close()

    def _hello(self) -> dict[str, Any]:
        parts, controls = self.server_state.parts, self.server_state.parts.world.controls
        return {
            "about": self.server_state.about, "name": parts.name, "modes": MODES, "players": parts.players,
            "components": parts.world.model.components, "actions": controls.names, "discrete": controls.discrete,
            "starts": len(parts.world.starts.frame),
            "game_keys": keys.spoken(controls), "pad": keys.pad(controls),
            "keys": [key._asdict() for key in keys.free(controls)], "most_fps": MOST_FPS, "hottest": HOTTEST,
        }  # fmt: skip


def _whole(command: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise UserError(f"{command} takes a whole number from {least} on.")
    return value
