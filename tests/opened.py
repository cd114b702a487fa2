"""Games that a test opens and `conftest.py` closes, also when the test fails."""

from __future__ import annotations

from typing import TypeVar

from envs import Games

Kind = TypeVar("Kind", bound=Games)
OPENED: list[Games] = []


def opened(games: Kind) -> Kind:
    """The games, to be closed after the test."""
    OPENED.append(games)
    return games
