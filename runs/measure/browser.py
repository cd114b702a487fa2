"""A headless Chromium and a server for it: what the measurements and the tests of the page have in common."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from envs.errors import UserError
from play import server
from play.connection import ServerState

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def executable() -> str:
    """The browser that CHROMIUM names, or one that is installed. Raises UserError when there is none."""
    path = os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        raise UserError("There is no Chromium here: install one (apt-get install chromium) or name it in CHROMIUM.")
    return path


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser. Raises UserError where Playwright or Chromium is missing."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as problem:
        raise UserError('Playwright drives the browser: install it with pip install -e ".[test]".') from problem
    path = executable()
    with sync_playwright() as tool:
        try:
            # Containers run as root, where Chromium's sandbox refuses to start; it opens our own page only.
            browser = tool.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=120_000)
        except Error as problem:
            raise UserError(f"{path} cannot be started: {str(problem).splitlines()[0]}") from problem
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(house: ServerState) -> Iterator[str]:
    """The page on a free port, served by a thread of this process; gives its address."""
    at = server.listen("127.0.0.1", 0)
    running = server.made(house)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [at]}, daemon=True)
    thread.start()
    while not running.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{at.getsockname()[1]}/"
    finally:
        running.should_exit = True
        thread.join(10)
        house.work.shutdown()
