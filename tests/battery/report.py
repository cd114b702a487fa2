"""What a battery has found, and how far it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
SHOWN = 1_500  # characters of a fault


class Report:
    """Faults by kind, each said as it is found."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console, self.quiet = Console(stderr=True, highlight=False, quiet=quiet), quiet
        self.faults: list[dict[str, str]] = []

    def fault(self, kind: str, what: Any, told: str) -> None:
        """One finding."""
        self.faults.append({"kind": kind, "what": str(what)[:400], "told": told[-SHOWN:]})
        self.console.print(f"FAULT {kind}: {str(what)[:400]}\n{told[-SHOWN:]}", markup=False)

    def track(self, items: Iterable[Item], name: str) -> Iterator[Item]:
        """The items, with a bar."""
        yield from track(items, name, console=self.console, disable=self.quiet)
