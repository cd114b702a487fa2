"""What a person sees while a run works: a live table on a terminal, a line every few seconds without one; tables."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

FIRST_LINE = 3.0  # seconds until the first line: silence from the start looks like a hang
BEFORE = ("random_play", "pretraining")  # parts of a run's beginning, whose speed says nothing of the rest
WINDOW = 60.0  # seconds over which rates are measured


class Progress:
    """Live display on a terminal, heartbeat lines by wall time elsewhere.

    A thread of its own shows it: a long phase without a call still has a heartbeat, and `update` only stores numbers.

    Args:
        console: where to show it; standard output when None.
        every: seconds between two heartbeat lines without a terminal.
    """

    def __init__(self, console: Console | None = None, *, every: float = 12.0) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.every = every
        self.step = self.total = 0
        self.name = "starting"
        self.values: dict[str, float | str] = {}
        self.episodes = 0
        self.returns: deque[float] = deque(maxlen=20)
        self.seconds: dict[str, float] = {}  # wall time spent in each phase
        self._marks: deque[tuple[float, int]] = deque()
        self._parts: dict[str, tuple[float, int]] = {}  # of values "2 of 30": when each was first told, and how much
        self._entered = self._began = time.monotonic()
        self._live: Live | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *problem: object) -> None:
        self.stop()

    def start(self, total_steps: int, start_step: int = 0) -> None:
        """Begins to show; steps are agent steps of the real game, 0 in all when something else ends the run."""
        self.stop()
        self.total, self.step = total_steps, start_step
        self._began = self._entered = time.monotonic()
        self._marks.clear()
        self._over.clear()
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """What the run does from now on, as a person would call it."""
        now = time.monotonic()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self._entered
        self.name, self._entered = name, now

    def update(self, step: int, **values: float | str | None) -> None:
        """The newest numbers: agent steps so far, and any named values (updates, losses); None removes one.

        A value like "2 of 30" also tells how long that will take.
        """
        self.step = step
        for name, value in values.items():
            if value is None:
                self.values.pop(name, None)
                self._parts.pop(name, None)
                if name in BEFORE:  # what comes now has another speed
                    self._marks = deque([(time.monotonic(), step)])
            else:
                self.values[name] = value
                if name not in self._parts and (told := _of(value)):
                    self._parts[name] = time.monotonic(), told[0]

    def episode(self, ret: float, length: int) -> None:
        """A finished episode: its return in the game's units and its length in agent steps."""
        self.episodes += 1
        self.returns.append(ret)
        self.values["length"] = length

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Ends the display; calling it twice is harmless."""
        self.phase(self.name)
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2)
        self._thread = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def shares(self) -> dict[str, float]:
        """The share of the wall time that each phase took so far, summing to 1."""
        seconds = dict(self.seconds)
        whole = sum(seconds.values())
        return {name: spent / whole for name, spent in seconds.items() if spent > 0.005 * whole} if whole else {}

    def line(self) -> str:
        """The heartbeat: one line with everything a person needs to know."""
        parts = [time.strftime("%H:%M:%S"), f"{self.name:<12}", self._steps(), *self._rate_text()]
        parts += [f"{name} {number(value)}" for name, value in dict(self.values).items()]
        if self.returns:
            parts.append(f"return {self._mean_return():.1f} (last {len(self.returns)} of {self.episodes:,})")
        return "  ".join([*parts, self._left()])

    def _beat(self) -> None:
        wait = 0.25 if self._live is not None else min(FIRST_LINE, self.every)
        while not self._over.wait(wait):
            self._mark()
            if self._live is not None:
                self._live.update(self._table(), refresh=True)
            else:
                self.say(self.line())
                wait = self.every

    def _mark(self) -> None:
        now, marks = time.monotonic(), self._marks  # another thread may begin others
        if not marks:
            marks.append((now, self.step))
        elif now - marks[-1][0] >= 1:
            marks.append((now, self.step))
            while now - marks[0][0] > WINDOW:
                marks.popleft()

    def _rate(self) -> float:
        """Agent steps a second over the last minute."""
        if not self._marks:
            return 0.0
        then, step = self._marks[0]
        passed = time.monotonic() - then
        return (self.step - step) / passed if passed > 0.5 else 0.0

    def _rate_text(self) -> list[str]:
        """Nothing while none are taken: a round may learn for minutes."""
        rate = self._rate()
        return [f"{rate:,.0f} steps/s" if rate >= 10 else f"{rate:.1f} steps/s"] * (rate > 0)

    def _steps(self) -> str:
        if not self.total:
            return f"{self.step:,} steps"
        return f"{self.step:,} / {self.total:,} steps ({100 * self.step / self.total:.1f} %)"

    def _left(self) -> str:
        gone = f"{duration(time.monotonic() - self._began)} gone"
        if not self.total:
            return gone
        for name, (began, first) in dict(self._parts).items():  # while one lasts, no step is played
            done, whole = _of(self.values.get(name, "")) or (first, first)
            if done > first:
                left = (time.monotonic() - began) / (done - first) * (whole - done)
                return f"{gone}, {duration(left)} left of {name.replace('_', ' ')}"
        rate = self._rate()
        # all games play whole steps, and a round of updates follows the last one: then nobody knows
        left_of_all = duration((self.total - self.step) / rate) if rate > 0 and self.step < self.total else "?"
        return f"{gone}, {left_of_all} left"

    def _mean_return(self) -> float:
        returns = list(self.returns)
        return sum(returns) / len(returns)

    def _table(self) -> Group:
        rows: Mapping[str, str] = {
            "phase": self.name,
            "steps": ", ".join([self._steps(), *self._rate_text()]),
            "time": self._left(),
            "episodes": f"{self.episodes:,}",
            "last returns": " ".join(f"{value:.4g}" for value in list(self.returns)[-8:]) or "none yet",
            "mean return": f"{self._mean_return():.2f} (last {len(self.returns)})" if self.returns else "none yet",
            **{name: number(value) for name, value in dict(self.values).items()},
            "share of time": ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.shares().items()),
        }
        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(Text(name, style="dim"), Text(value))
        whole = Table.grid()
        if self.total:  # in a line of its own, which a bar by itself does not end
            whole.add_row(ProgressBar(total=self.total, completed=min(self.step, self.total), width=60))
        whole.add_row(table)
        return Group(whole)


def _of(value: float | str) -> tuple[int, int] | None:
    """(2, 30) of "2 of 30"."""
    parts = value.replace(",", "").split(" of ") if isinstance(value, str) else []
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdecimal() for part in parts) else None


def number(value: float | str) -> str:
    """A number as short as it can be read: 12,345, 0.0123, 1.2e-05; text stays."""
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as "2 h 05 min", "3 min" or "12 s"."""
    whole = int(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def as_table(title: str, rows: Sequence[Mapping[str, object]]) -> Table:
    """Rows of the same keys, for a terminal."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table
