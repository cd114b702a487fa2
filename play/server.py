"""The page and its websocket: each visitor has a session of its own, and nothing that one sends ends the server."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from envs.errors import UserError
from play.connection import Connection, ServerState

PAGE = Path(__file__).parent / "page"
VISITORS = 16  # each holds a game and some tens of megabytes to rewind through
LARGEST = 16_384  # bytes of a message


def app(server_state: ServerState) -> Starlette:
    """The page at /, its websocket at /play, recordings at /recordings/."""

    async def play(socket: WebSocket) -> None:
        origin = socket.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != socket.headers.get("host"):
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

    recordings = StaticFiles(directory=server_state.videos, check_dir=False)
    return Starlette(routes=[
        WebSocketRoute("/play", play),
        Mount("/recordings", recordings),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ])  # fmt: skip


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


def made(server_state: ServerState) -> Server:
    """The server, to be run on a socket of `listen`."""
    return Server(
        uvicorn.Config(
            app(server_state), log_level="warning", ws_max_size=LARGEST, timeout_graceful_shutdown=1, lifespan="off"
        )
    )


def serve(server_state: ServerState, at: socket.socket, started: Callable[[str], None] = lambda url: None) -> None:
    """Serves until Ctrl-C; calls `started` with the page's address when it can be opened."""
    host, port = at.getsockname()[:2]
    at.listen()  # from here on the page can be asked for, and waits until the server answers
    server = made(server_state)
    server.started_up = lambda: started(f"http://{'[' + host + ']' if ':' in host else host}:{port}/")
    try:
        server.run(sockets=[at])
    finally:
        server_state.work.shutdown()  # once every visitor's recording is complete
