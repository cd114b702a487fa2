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
        assert max(box["height"], box["width"]) > 200 and box["height"] <= 0.7 * 800 and box["width"] <= 960
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


def test_a_keyboard_leaves_every_button_and_arrows_steer_beside_them(page: Any) -> None:
    """WCAG 2.1.2: Tab goes on from wherever it is; only sliders keep their arrows."""
    seen = []
    page.locator("#help").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.innerText || document.activeElement.tagName"
            )
        )
    for name in ("Back", "Size", "temperature", "fps", "help"):
        assert any(name in one for one in seen), (name, seen)
    page.locator("[data-client=zoom]").focus()
    page.keyboard.press("Tab")
    page.keyboard.down("ArrowRight")
    page.wait_for_function("play.state.action === 2")
    page.keyboard.up("ArrowRight")
    page.locator("#temperature").focus()
    before = told(page, "temperature")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"play.state.temperature > {before}")
    assert told(page, "action") == 1


def test_the_game_waits_while_its_keys_are_read(page: Any) -> None:
    page.keyboard.press("h")
    page.wait_for_function("play.state.paused")
    page.mouse.click(3, 3)
    page.wait_for_function("!play.state.paused")
    assert not page.evaluate("document.getElementById('keys').open")
    page.keyboard.press("p")
    page.wait_for_function("play.state.paused")
    page.keyboard.press("h")
    page.keyboard.press("Escape")
    page.wait_for_timeout(200)
    assert told(page, "paused"), "who had paused before has not gone on by reading"


@pytest.mark.parametrize(
    ("width", "height", "dots"), [(1920, 1080, 1.0), (1280, 800, 2.0), (1000, 700, 1.25), (390, 844, 3.0)]
)
def test_pictures_are_whole_multiples_of_their_size(
    chromium: Any, url: str, width: int, height: int, dots: float
) -> None:
    context = chromium.new_context(viewport={"width": width, "height": height}, device_scale_factor=dots)
    page = opened(context, url)
    for _ in range(3):  # of the sizes
        box = page.locator("#canvas_dream").bounding_box()
        times = box["width"] * dots / page.evaluate("canvas_dream.width")
        assert times == pytest.approx(round(times), abs=0.02) and times >= 2
        page.keyboard.press("z")
    biggest = max(
        page.evaluate("canvas_dream.clientHeight / innerHeight") for _ in range(3) if not page.keyboard.press("z")
    )
    assert biggest > 0.5 or width < 500, "the screen is used"
    context.close()


def test_a_phone_on_its_side_shows_picture_and_buttons_at_once(chromium: Any, url: str) -> None:
    context = chromium.new_context(viewport={"width": 844, "height": 390}, has_touch=True, is_mobile=True)
    phone = opened(context, f"{url}?touch")
    shown = phone.locator("#canvas_dream").bounding_box()
    assert shown["height"] > 230
    for name in ("←", "→"):
        box = phone.locator("#pad button", has_text=name).bounding_box()
        assert box["y"] + box["height"] <= 390
        assert box["x"] + box["width"] < shown["x"] or box["x"] > shown["x"] + shown["width"]
    context.close()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_is_light_where_the_system_is(chromium: Any, url: str, scheme: str) -> None:
    """And its words can be read: contrast of at least 4.5 of all text to what lies behind (WCAG 1.4.3)."""
    context = chromium.new_context(color_scheme=scheme)
    page = opened(context, url)
    lights = page.evaluate(CONTRASTS)
    assert lights and min(ratio for ratio, _ in lights) >= 4.5, sorted(lights)[:5]
    back = page.evaluate("getComputedStyle(document.documentElement).backgroundColor").strip("rgb()").split(", ")
    assert (int(back[0]) > 128) == (scheme == "light")
    context.close()


CONTRASTS = """() => {
  const numbers = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const [r, g, b, a = 1] = numbers(getComputedStyle(node).backgroundColor);
      if (a > 0.9) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.offsetParent) continue;
    if (node.closest("script, :disabled, #toast, dialog:not([open])")) continue;
    const [a, b] = [light(numbers(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.textContent.trim().slice(0, 30)]);
  }
  return found;
}"""
