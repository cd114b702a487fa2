"""The page and its websocket: each visitor has a session of its own, and nothing that one sends ends the server."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket
from uvicorn.protocols.http.h11_impl import H11Protocol

from envs.errors import UserError
from play.connection import Connection, ServerState

PAGE = Path(__file__).parent / "page"
VISITORS = 16  # each holds a game and the moments to rewind to (play/past.py)
LARGEST = 16_384  # bytes of a message
HALF = 10.0  # seconds for a request to be sent whole


def app(server_state: ServerState, host: str = "127.0.0.1") -> Starlette:
    """The page at /, its websocket at /play, recordings at /recordings/, for those who call it by a name of `host`.

    A server that listens to this machine alone is reached by its loopback names and no others: a foreign page whose
    name is made to lead here (DNS rebinding) is refused like one that says where it comes from.
    """

    async def play(socket: WebSocket) -> None:
        origin = socket.headers.get("origin")
        if origin is not None and _place(origin) != socket.headers.get("host"):
            await socket.close(1008)  # a page from elsewhere must not play here
            return
        await socket.accept()
        if len(server_state.connections) >= VISITORS:
            await socket.send_json({"error": f"All {VISITORS} games are taken: close another tab and try again."})
            await socket.close(1013)
            return
        connection = Connection(socket, server_state)
        server_state.connections.add(connection)
        try:
            await connection.stay()
        finally:
            server_state.connections.discard(connection)

    recordings = _Files(directory=server_state.videos, check_dir=False)
    routes = [
        WebSocketRoute("/play", play), Mount("/recordings", recordings), Mount("/", _Files(directory=PAGE, html=True)),
    ]  # fmt: skip
    return Starlette(routes=routes, middleware=[Middleware(_KnownNames, host=host)])


class _KnownNames:
    """Refuses whoever calls the server by another name than its own."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.host = app, host.strip("[]").lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        called = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if scope["type"] == "lifespan" or self._is_known(called):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocket(scope, receive, send).close(1008)
        else:
            text = f"This server is not called {called}: open it as http://localhost, or start it with host=...\n"
            await PlainTextResponse(text, 403)(scope, receive, send)

    def _is_known(self, called: str) -> bool:
        if not _is_loopback(self.host):
            return True  # whoever serves to others has asked for it
        name = (_name(called) or "").lower()
        return name == self.host or _is_loopback(name)


class _Files(StaticFiles):
    """Files, and "not found" for whatever cannot be the name of one."""

    async def check_config(self) -> None:
        """Nothing: before the first recording there is no folder of them."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        try:
            return super().lookup_path(path)
        except (ValueError, OSError):  # a null byte, too long a name
            return "", None


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _place(origin: str) -> str | None:
    """Host and port of an origin, None for what is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name(called: str) -> str | None:
    """The name in a Host header."""
    try:
        return urlsplit(f"//{called}").hostname
    except ValueError:
        return None


def listen(host: str, port: int) -> socket.socket:
    """The socket to serve on; port 0 takes any free one. Raises UserError when it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError) as problem:
        if isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE:
            raise UserError(f"Port {port} is in use: choose another, as in port={port + 1}.") from problem
        words = problem.strerror if isinstance(problem, OSError) else "a port is a number from 0 to 65535"
        raise UserError(f"Nothing can be served at host={host} port={port}: {words}.") from problem
    return made


class Server(uvicorn.Server):
    """Says when it is up: from then on Ctrl-C is its own to handle, where before it would break its making."""

    started_up: Callable[[], None] = staticmethod(lambda: None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.started_up()


class _Prompt(H11Protocol):
    """HTTP that waits `HALF` seconds for the rest of a request, and not for ever."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()  # the request is whole; it is the answer's turn
        elif self._late is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._late = self.loop.call_later(HALF, self._give_up)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        if self.transport.get_protocol() is self:  # and not a websocket by now
            self.transport.close()


def made(server_state: ServerState, host: str = "127.0.0.1") -> Server:
    """The server, to be run on a socket of `listen`."""
    return Server(
        uvicorn.Config(
            app(server_state, host), log_level="warning", ws_max_size=LARGEST, timeout_graceful_shutdown=1,
            lifespan="off", http=_Prompt,
        )
    )  # fmt: skip


def serve(server_state: ServerState, at: socket.socket, started: Callable[[str], None] = lambda url: None) -> None:
    """Serves until Ctrl-C; calls `started` with the page's address when it can be opened."""
    host, port = at.getsockname()[:2]
    at.listen()  # from here on the page can be asked for, and waits until the server answers
    server = made(server_state, host)
    server.started_up = lambda: started(f"http://{'[' + host + ']' if ':' in host else host}:{port}/")
    try:
        server.run(sockets=[at])
    finally:
        server_state.work.shutdown()  # once every visitor's recording is complete
