"""The page in a real browser: keys, pause, step, rewind, keep, side by side, recording, tabs. Needs a Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError
from play.connection import ServerState  # noqa: E402
from play.session import GameSession
from play.snapshot import Parts  # noqa: E402
from runs.measure import page as browser  # noqa: E402
from tests import tables

try:
    browser.executable()
except UserError as problem:
    pytest.skip(str(problem), allow_module_level=True)

PATIENCE = 240_000  # ms; a busy machine starts a browser slowly


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as made:
        yield made


@pytest.fixture
def server_state(tmp_path: Path) -> ServerState:
    return serving(tables.parts(), tmp_path)


def serving(parts: Parts, tmp_path: Path) -> ServerState:
    return ServerState(
        parts, {"run": "toy"}, tmp_path / "videos", tmp_path / "human", partial(GameSession, parts, fps=30)
    )


@pytest.fixture
def url(server_state: ServerState) -> Iterator[str]:
    with browser.served(server_state) as made:
        yield made


@pytest.fixture
def page(chromium: Any, url: str) -> Iterator[Any]:
    faults: list[str] = []
    made = opened(chromium, url)
    made.on("pageerror", lambda fault: faults.append(str(fault)))
    yield made
    made.close()
    assert faults == []


def opened(chromium: Any, url: str, **options: Any) -> Any:
    made = chromium.new_page(**options)
    made.set_default_timeout(PATIENCE)
    made.goto(url)
    made.wait_for_function("play.frames > 3")
    return made


def told(page: Any, name: str) -> Any:
    return page.evaluate(f"play.state.{name}")


def picture(page: Any, name: str = "dream") -> str:
    return str(page.evaluate(f"document.getElementById('canvas_{name}').toDataURL()"))


@pytest.mark.parametrize(("key", "action"), [("d", 2), ("a", 0), ("ArrowRight", 2), ("ArrowLeft", 0)])
def test_keys_reach_the_game(page: Any, key: str, action: int) -> None:
    page.keyboard.down(key)
    page.wait_for_function(f"play.state.action === {action} && play.state.input === 1")
    page.keyboard.up(key)
    page.wait_for_function("play.state.action === 1")


def test_a_gamepad_reaches_the_game(page: Any) -> None:
    """The browser's own interface to gamepads, with a pad that is not there."""
    page.evaluate("""() => {
        window.pad = {index: 0, axes: [0, 0], buttons: Array.from({length: 17}, () => ({pressed: false}))};
        navigator.getGamepads = () => [null, window.pad];
    }""")
    for press, action in (("pad.axes[0] = 1", 2), ("pad.axes[0] = -1", 0), ("pad.buttons[15].pressed = true", 2)):
        page.evaluate(press)
        page.wait_for_function(f"play.state.action === {action}")
        page.evaluate("pad.axes[0] = 0; pad.buttons[15].pressed = false")
        page.wait_for_function("play.state.action === 1")
    page.evaluate("pad.buttons[9].pressed = true")
    page.wait_for_function("play.state.paused")


def test_the_picture_changes_and_stands_still(page: Any) -> None:
    page.keyboard.down("d")
    before = picture(page)
    page.wait_for_function(f"document.getElementById('canvas_dream').toDataURL() !== '{before}'")
    page.keyboard.press("p")
    page.wait_for_function("play.state.paused")
    assert page.locator("#note").inner_text() or page.wait_for_function("document.getElementById('note').textContent")
    still = picture(page)
    page.wait_for_timeout(200)
    assert picture(page) == still
    at = told(page, "step")
    page.keyboard.press("n")
    page.wait_for_function(f"play.state.step === {at + 1}")


def test_rewind_keep_and_return(page: Any) -> None:
    page.wait_for_function("play.state.step > 20")
    page.keyboard.press("p")
    page.wait_for_function("play.state.paused")
    page.keyboard.press("k")
    page.wait_for_function("play.state.kept")
    at, kept = told(page, "step"), picture(page)
    page.keyboard.down("Backspace")
    page.wait_for_function(f"play.state.step < {at - 5}")
    page.keyboard.up("Backspace")
    assert picture(page) != kept
    page.keyboard.press("l")
    page.wait_for_function(f"play.state.step === {at}")
    assert picture(page) == kept


def test_side_by_side(page: Any) -> None:
    page.get_by_role("button", name="Both").click()
    page.wait_for_function("play.state.mode === 'both' && play.state.step > 3")
    assert page.locator("figcaption b").all_inner_texts() == ["Real game", "Dream", "Difference"]
    page.wait_for_function("document.querySelector('#figure_real span').textContent.startsWith('return')")
    page.get_by_role("button", name="Agent").click()
    page.wait_for_function("play.state.player === 'agent'")
    page.keyboard.press("b")
    page.wait_for_function("play.state.horizon < 3")


def test_sliders(page: Any) -> None:
    page.locator("#temperature").evaluate(
        "(slider) => { slider.value = 0.5; slider.dispatchEvent(new Event('input')) }"
    )
    page.wait_for_function("play.state.temperature === 0.5")
    page.keyboard.press("]")
    page.wait_for_function("play.state.temperature === 0.6")


def test_recording(page: Any, server_state: ServerState) -> None:
    page.keyboard.press("m")
    page.wait_for_function("play.state.mode === 'real'")
    page.keyboard.press("v")
    page.wait_for_function("play.state.recording")
    at = told(page, "step")
    page.wait_for_function(f"play.state.step > {at + 10}")
    page.keyboard.press("v")
    page.wait_for_selector("#toast.shown a")
    address = page.locator("#toast a").get_attribute("href")
    assert page.request.get(page.url + address).body()[4:8] == b"ftyp"
    assert server_state.episodes is not None and len(list(server_state.episodes.glob("*.npz"))) == 1


def test_help_and_errors_in_words(page: Any) -> None:
    page.keyboard.press("h")
    assert page.locator("#keys").get_by_text("hold to go back").is_visible()
    page.keyboard.press("h")
    page.keyboard.press("l")  # nothing has been kept
    page.wait_for_selector("#toast.bad.shown")
    assert "kept" in page.locator("#toast").inner_text()


def test_two_tabs_and_a_closed_one(chromium: Any, page: Any, url: str, server_state: ServerState) -> None:
    other = opened(chromium, url)
    assert len(server_state.connections) == 2
    page.keyboard.press("p")
    page.wait_for_function("play.state.paused")
    at = told(other, "step")
    other.wait_for_function(f"play.state.step > {at + 5}")
    other.close()
    page.wait_for_timeout(50)
    for _ in range(200):
        if len(server_state.connections) == 1:
            break
        page.wait_for_timeout(50)
    assert len(server_state.connections) == 1


@pytest.mark.parametrize("size", ["112x48", "48x112"])
def test_a_picture_keeps_its_shape(chromium: Any, tmp_path: Path, size: str) -> None:
    """Height x width: the canvas has so many pixels, is shown in that shape, and fits the window."""
    height, width = map(int, size.split("x"))
    with browser.served(serving(tables.parts(size=size), tmp_path)) as url:
        page = opened(chromium, url, viewport={"width": 1280, "height": 800})
        assert page.evaluate("[canvas_dream.height, canvas_dream.width]") == [height, width]
        box = page.locator("#canvas_dream").bounding_box()
        assert box["height"] / box["width"] == pytest.approx(height / width, rel=0.02)
        assert 200 < max(box["height"], box["width"]) <= 520
        page.close()


def test_a_phone(chromium: Any, url: str) -> None:
    size = {"width": 390, "height": 844}
    context = chromium.new_context(viewport=size, has_touch=True, is_mobile=True)
    phone = opened(context, f"{url}?touch")
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = phone.locator("#pad button", has_text="→").bounding_box()
    finger = {"x": box["x"] + 20, "y": box["y"] + 20}
    touch = context.new_cdp_session(phone)
    phone.evaluate("scrollTo(0, 0)")
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [finger]})
    phone.wait_for_function("play.state.action === 2")
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    phone.wait_for_function("play.state.action === 1")
    context.close()
