"""The moments that a visitor can rewind to: a bounded number of a bounded size."""

from __future__ import annotations

from collections import deque

from play.snapshot import Snapshot

KEPT = 600  # moments at least: 40 s at 15 frames a second, 10 s at 60
SECONDS = 10  # at higher rates
MOST_BYTES = 200e6  # above which there are fewer: a transformer's memory takes up to a megabyte a moment


class Past:
    """Condensed moments, the newest last; where there are too many, or they take too much, the oldest go."""

    def __init__(self) -> None:
        self._moments: deque[tuple[Snapshot, int]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._moments)

    def add(self, moment: Snapshot, fps: float) -> None:
        """Remembers one more, of a game that is played at `fps` steps a second."""
        self._moments.append((moment, size := moment.size_bytes))
        self._bytes += size
        while len(self) > max(KEPT, SECONDS * fps) or (self._bytes > MOST_BYTES and len(self) > 1):
            self._bytes -= self._moments.popleft()[1]

    def pop(self, count: int = 1) -> Snapshot:
        """Goes back so many moments and forgets them."""
        for _ in range(count):
            moment, size = self._moments.pop()
            self._bytes -= size
        return moment
