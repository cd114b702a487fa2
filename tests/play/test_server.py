"""The server: what comes over the websocket reaches the table, and nothing that comes over it ends the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient, WebSocketTestSession  # noqa: E402
from starlette.websockets import WebSocketDisconnect  # noqa: E402

from play import connection, server  # noqa: E402
from play.connection import ServerState  # noqa: E402
from play.film import Film
from play.session import GameSession
from tests import tables

PLAY = "ws://localhost:8000/play"


class Frame(NamedTuple):
    """What a frame of the protocol holds."""

    told: dict[str, Any]
    pictures: dict[str, np.ndarray]


class Guest:
    """A well-behaved page."""

    def __init__(self, session: WebSocketTestSession) -> None:
        self.session, self.frames, self.inputs = session, 0, 0
        self.said: list[dict[str, Any]] = []
        self.hello = json.loads(session.receive()["text"])["hello"]

    def send(self, **message: Any) -> None:
        self.session.send_text(json.dumps(message))

    def hold(self, *keys: str, back: bool = False) -> None:
        self.inputs += 1
        self.send(keys=list(keys), back=back, id=self.inputs)

    def frame(self) -> Frame:
        """The next frame, acknowledged."""
        while "bytes" not in (message := self.session.receive()):
            self.said.append(json.loads(message["text"]))
        self.frames += 1
        self.send(ack=self.frames)
        return unpacked(message["bytes"])

    def until(self, good: Callable[[dict[str, Any]], bool]) -> Frame:
        """The first of the next frames that is as wished."""
        for _ in range(400):
            frame = self.frame()
            if good(frame.told):
                return frame
        raise AssertionError("it never came")

    def error(self) -> str:
        """The next complaint."""
        for _ in range(400):
            found = [message["error"] for message in self.said if "error" in message]
            if found:
                self.said.clear()
                return str(found[0])
            self.frame()
        raise AssertionError("nobody complained")


def unpacked(data: bytes) -> Frame:
    (size,) = struct.unpack("<I", data[:4])
    told = json.loads(data[4 : 4 + size])
    pixels, pictures = np.frombuffer(data[4 + size :], np.uint8), {}
    for one in told["pictures"]:
        count = one["height"] * one["width"] * 3
        pictures[one["name"]] = pixels[:count].reshape(one["height"], one["width"], 3)
        pixels = pixels[count:]
    assert not len(pixels)
    return Frame(told, pictures)


@pytest.fixture
def server_state(tmp_path: Path) -> ServerState:
    parts = tables.parts()
    make = partial(GameSession, parts, fps=100)
    return ServerState(parts, {"run": "toy"}, tmp_path / "videos", tmp_path / "human", make)


@pytest.fixture
def client(server_state: ServerState) -> Iterator[TestClient]:
    with TestClient(server.app(server_state), base_url="http://localhost:8000") as made:
        yield made
    server_state.work.shutdown()


def test_the_computing_thread_has_its_own_number_of_torch_threads(server_state: ServerState) -> None:
    before, wide = torch.get_num_threads(), replace(server_state, threads=3)
    assert wide.work.submit(torch.get_num_threads).result() == 3 and torch.get_num_threads() == before
    wide.work.shutdown()


def test_hello_and_pictures(client: TestClient) -> None:
    with client.websocket_connect(PLAY) as session:
        guest = Guest(session)
        assert guest.hello["actions"] == ["LEFT", "STAY", "RIGHT"] and guest.hello["starts"] == 3
        steps = [guest.frame() for _ in range(4)]
        assert [frame.told["step"] for frame in steps] == sorted({frame.told["step"] for frame in steps})
        assert steps[0].pictures["dream"].shape == (64, 64, 3)
        assert set(steps[0].told["views"]) == {"dream"} and len(steps[0].told["probabilities"]) == 3


def test_keys_reach_the_game_and_come_back_with_the_picture(client: TestClient) -> None:
    with client.websocket_connect(PLAY) as session:
        guest = Guest(session)
        for keys, action in ((["d"], 2), (["left"], 0), ([], 1)):
            guest.hold(*keys)
            told = guest.until(lambda told: told["input"] == guest.inputs).told
            assert told["action"] == action


def test_time_can_be_stopped_stepped_turned_back_and_kept(client: TestClient) -> None:
    with client.websocket_connect(PLAY) as session:
        guest = Guest(session)
        guest.send(do="pause", value=True)
        at = guest.until(lambda told: told["paused"]).told["step"]
        guest.send(do="step")
        assert guest.frame().told["step"] == at + 1
        guest.send(do="save")
        kept = guest.frame()
        for _ in range(3):
            guest.send(do="step")
            guest.frame()
        guest.send(do="rewind", value=2)
        assert guest.frame().told["step"] == at + 2
        guest.hold(back=True)
        assert guest.until(lambda told: told["step"] <= at).told["paused"]
        guest.hold()
        guest.send(do="load")
        again = guest.until(lambda told: told["step"] == at + 1)
        assert np.array_equal(again.pictures["dream"], kept.pictures["dream"])


def test_settings(client: TestClient) -> None:
    with client.websocket_connect(PLAY) as session:
        guest = Guest(session)
        for name, value in (("mode", "both"), ("player", "agent"), ("temperature", 0.5), ("fps", 60), ("reset", 1)):
            guest.send(do=name, value=value)
        told = guest.until(lambda told: told["mode"] == "both" and told["seed"] == 1).told
        assert (told["player"], told["temperature"], told["fps"]) == ("agent", 0.5, 60)
        assert guest.frame().pictures.keys() == {"real", "dream", "difference"}


MALFORMED = (
    "", "{", "[]", "null", "7", '"keys"', "{}", '{"do": "fly"}', '{"do": ["pause"]}', '{"do": {}}', '{"keys": "d"}',
    '{"do": "mode"}', '{"do": "mode", "value": {}}', '{"do": "fps", "value": 1e999}', '{"do": "fps", "value": "9"}',
    '{"do": "temperature", "value": null}', '{"do": "rewind", "value": -1}', '{"do": "reset", "value": 99}',
    '{"do": "load"}', '{"do": "sync"}', '{"do": "reset", "value": true}', "[" * 5000, '{"do": "step' + "\\u0000" * 99,
    '{"do": "mode", "value": "' + "x" * 9000 + '"}', '{"do": "fps", "value": 1' + "0" * 400 + "}",
    '{"do": "temperature", "value": NaN}',
)  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_a_bad_message_is_answered_in_words(client: TestClient, text: str) -> None:
    with client.websocket_connect(PLAY) as session:
        guest = Guest(session)
        session.send_text(text)
        assert 5 < len(guest.error()) < 300
        assert guest.frame().told["step"] < guest.until(lambda told: True).told["step"]  # the game goes on


@pytest.mark.parametrize(
    "text", ['{"keys": [null, 7, {}]}', '{"keys": [], "id": 1e400}', '{"ack": -5}', '{"ack": 999}']
)
def test_odd_messages_do_no_harm(client: TestClient, text: str) -> None:
    with client.websocket_connect(PLAY) as session:
        guest = Guest(session)
        session.send_text(text)
        session.send_bytes(b"\xff\x00")
        for _ in range(8):
            guest.frame()


def test_a_slow_page_gets_fewer_frames(client: TestClient, server_state: ServerState) -> None:
    """Without an answer the server sends no more than a few frames, and drops the others."""
    with client.websocket_connect(PLAY) as session:
        session.receive()
        for _ in range(connection.AHEAD):
            last = unpacked(session.receive()["bytes"])
        (one,) = server_state.connections
        while one.session.now.step < last.told["step"] + 20:
            time.sleep(0.01)
        assert one.sent == connection.AHEAD and one.dropped > 10
        session.send_text(json.dumps({"ack": connection.AHEAD}))
        newer = unpacked(session.receive()["bytes"])
        # The newest one, not those that waited; the session may be a step ahead of what it has handed over.
        assert newer.told["step"] > last.told["step"] + 10


def test_visitors_have_dreams_of_their_own(client: TestClient, server_state: ServerState) -> None:
    with client.websocket_connect(PLAY) as first, client.websocket_connect(PLAY) as second:
        a, b = Guest(first), Guest(second)
        a.send(do="pause", value=True)
        stopped = a.until(lambda told: told["paused"]).told["step"]
        b.until(lambda told: told["step"] > stopped + 5)
        assert len(server_state.connections) == 2
    wait(lambda: not server_state.connections)


def wait(good: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def test_a_closed_tab_frees_its_game(
    client: TestClient, server_state: ServerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[GameSession] = []
    close = GameSession.close

    def watched(self: GameSession) -> None:
        close(self)
        closed.append(self)

    monkeypatch.setattr(GameSession, "close", watched)
    with client.websocket_connect(PLAY) as session:
        guest = Guest(session)
        guest.send(do="mode", value="real")
        guest.until(lambda told: told["mode"] == "real")
        guest.send(do="record")
        guest.until(lambda told: told["recording"] and told["step"] > 5)
    wait(lambda: not server_state.connections and len(closed) == 1)
    server_state.work.shutdown()
    assert closed[0]._real is None
    assert (
        server_state.episodes is not None and len(list(server_state.episodes.glob("*.npz"))) == 1
    )  # what was played is not lost
    assert len(list(server_state.videos.glob("*.mp4"))) == 1


def test_after_a_video_that_cannot_be_written_another_can(
    client: TestClient, server_state: ServerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Film._open

    def dying(film: Film, width: int, height: int) -> None:
        whole(film, width, height)
        ffmpeg = film._writer.gi_frame.f_locals["p"]
        ffmpeg.kill()
        ffmpeg.wait()

    with client.websocket_connect(PLAY) as session:
        guest = Guest(session)
        guest.frame()
        with monkeypatch.context() as broken:
            broken.setattr(Film, "_open", dying)
            guest.send(do="record")
            assert "cannot be written" in guest.error()
            assert not guest.until(lambda told: not told["recording"]).told["recording"]
        guest.send(do="record")
        guest.until(lambda told: told["recording"] and told["step"] > 10)
        guest.send(do="record")
        guest.until(lambda told: not told["recording"])
        assert [message for message in guest.said if message.get("link")] and not guest.said[-1].get("error")


def test_the_computing_thread_speaks_through_the_loop(server_state: ServerState) -> None:
    """asyncio's own check (debug) refuses what is called from another thread."""

    class Silent:
        async def receive(self) -> dict[str, Any]:
            await gone.wait()
            return {"type": "websocket.disconnect"}

        async def send_text(self, text: str) -> None:
            heard.append(text)

        async def send_bytes(self, data: bytes) -> None: ...

    heard: list[str] = []
    gone = asyncio.Event()

    async def visit() -> None:
        made = connection.Connection(Silent(), server_state)  # type: ignore[arg-type]
        stay = asyncio.create_task(made.stay())
        while made.sent < connection.AHEAD:
            await asyncio.sleep(0.01)
        await server_state.run(partial(made.say, said="saved"))
        while not any("saved" in text for text in heard):
            await asyncio.sleep(0.01)
        gone.set()
        await stay

    asyncio.run(asyncio.wait_for(visit(), 30), debug=True)
    server_state.work.shutdown()


def test_a_recording_can_be_opened(client: TestClient, server_state: ServerState) -> None:
    with client.websocket_connect(PLAY) as session:
        guest = Guest(session)
        guest.send(do="record")
        guest.until(lambda told: told["recording"] and told["step"] > 10)
        guest.send(do="record")
        guest.until(lambda told: not told["recording"])
        (link,) = [message["link"] for message in guest.said if message.get("link")]
    video = client.get(f"/{link}")
    assert video.status_code == 200 and video.headers["content-type"] == "video/mp4" and b"ftyp" in video.content[:16]
    assert client.get("/recordings/../human/x.npz").status_code == 404


def test_the_page(client: TestClient) -> None:
    for name, kind in (("", "text/html"), ("app.js", "javascript"), ("style.css", "text/css")):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200 and kind in answer.headers["content-type"]
        assert "http://" not in answer.text.replace("http://www.w3.org", "")  # nothing is fetched from elsewhere
        assert "https://" not in answer.text


def test_pages_from_elsewhere_are_refused(client: TestClient) -> None:
    for origin in ("https://elsewhere.example", "http://[", "null", "http://localhost:8001", ""):
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect(PLAY, headers={"origin": origin}) as session,
        ):
            session.receive_text()
    with client.websocket_connect(PLAY, headers={"origin": "http://localhost:8000"}) as session:
        assert Guest(session).hello["name"] == "Catch-v0"


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:8000", "192.168.0.7", "[", "localhost.evil.example", ""]
)
def test_a_name_that_was_made_to_lead_here_is_refused(client: TestClient, name: str) -> None:
    """DNS rebinding: the page then says that it comes from the same place, which it does not."""
    assert client.get("/", headers={"host": name}).status_code == 403
    same = {"host": name, "origin": f"http://{name}"}
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(PLAY, headers=same) as session:
        session.receive_text()


@pytest.mark.parametrize("name", ["127.0.0.1:8000", "localhost", "[::1]:8000", "LOCALHOST:1", "127.8.9.1"])
def test_this_machine_s_names_are_known(client: TestClient, name: str) -> None:
    assert client.get("/", headers={"host": name}).status_code == 200


def test_whoever_serves_to_others_is_called_what_they_like(server_state: ServerState) -> None:
    with TestClient(server.app(server_state, "0.0.0.0"), base_url="http://laptop.local") as made:
        assert made.get("/").status_code == 200
    server_state.work.shutdown()


@pytest.mark.parametrize(
    "path", ["/%00", "/recordings/%00", "/" + "a" * 5000, "/recordings/" + "b" * 300, "/%ff", "/../x"]
)
def test_what_cannot_be_a_file_is_not_found(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.fixture
def served(server_state: ServerState, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A real server's port."""
    monkeypatch.setattr(server, "HALF", 0.3)
    at = server.listen("127.0.0.1", 0)
    at.listen()
    made = server.made(server_state)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [at]})
    thread.start()
    yield at.getsockname()[1]
    made.should_exit = True
    thread.join()
    server_state.work.shutdown()


HELLO = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


def test_half_a_request_is_not_waited_for_and_a_whole_one_is_answered(served: int) -> None:
    began, waiting = time.monotonic(), []
    for sent, answered in ((b"", 0), (b"GET /", 0), (HELLO, 0), (HELLO + b"\r\n" + HELLO, 1)):
        caller = socket.create_connection(("127.0.0.1", served), timeout=8)
        caller.sendall(sent)
        waiting.append((caller, answered))
    for caller, answered in waiting:
        with caller:
            got = b""
            while piece := caller.recv(65_536):
                got += piece
            assert got.count(b"200 OK") == answered and time.monotonic() - began < 7


def test_nonsense_prints_no_traceback(served: int, capfd: pytest.CaptureFixture[str]) -> None:
    upgrade = HELLO.replace(b"/ ", b"/play ") + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    rng, waiting = np.random.default_rng(0), []
    for sent in (
        b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", HELLO + b"Content-Length: -1\r\n\r\n",
        HELLO * 2 + b"\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", upgrade + b"\r\n",
        upgrade + b"Sec-WebSocket-Key: short\r\nSec-WebSocket-Version: 13\r\n\r\n",
        upgrade + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n" + b"\xff" * 40,
        b"GET / HTTP/1.1\r\nHost: \xff\xfe[\r\n\r\n", HELLO + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        *(rng.bytes(200) for _ in range(20)),
    ):  # fmt: skip
        caller = socket.create_connection(("127.0.0.1", served), timeout=8)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            caller.sendall(sent)
        waiting.append(caller)
    for caller in waiting:
        with caller, contextlib.suppress(ConnectionResetError):
            caller.recv(65_536)
    with socket.create_connection(("127.0.0.1", served), timeout=8) as caller:
        caller.sendall(HELLO + b"\r\n")
        assert b"200 OK" in caller.recv(65_536)
    assert "Traceback" not in capfd.readouterr().err


def test_full_house(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "VISITORS", 1)
    with client.websocket_connect(PLAY) as first:
        Guest(first)
        with client.websocket_connect(PLAY) as second:
            assert "taken" in second.receive_json()["error"]


def test_a_fault_pauses_one_table_and_is_said(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: GameSession, held: object = ()) -> None:
        raise ZeroDivisionError

    with client.websocket_connect(PLAY) as session:
        guest = Guest(session)
        guest.frame()
        with monkeypatch.context() as broken:
            broken.setattr(GameSession, "step", fail)
            message = session.receive()
            while "text" not in message:
                message = session.receive()
        assert "fault" in json.loads(message["text"])["error"]
        guest.send(ack=100)
        guest.send(do="pause", value=False)
        guest.until(lambda told: not told["paused"])
