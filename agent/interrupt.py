"""Ctrl-C and `kill` as a request that is honoured where the state is whole, not in the middle of an update."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether a stop was asked for. Being asked a second time interrupts at once.

    Only the main thread can catch signals; elsewhere nothing is changed.
    """
    asked = False

    def handle(sign: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = [signal.signal(sign, handle) for sign in SIGNALS]
    try:
        yield lambda: asked
    finally:
        for sign, handler in zip(SIGNALS, before, strict=True):
            signal.signal(sign, handler)
