"""The keys that play itself knows, the same in the page and in the window; a key that the game uses is the game's."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from envs.controls import Controls


class Key(NamedTuple):
    """A key, the command it gives, and what a person reads about it."""

    key: str
    command: str
    words: str


KEYS = (
    Key("p", "pause", "pause, go on"),
    Key("n", "step", "one step"),
    Key("backspace", "rewind", "hold to go back"),
    Key("k", "save", "keep this moment"),
    Key("l", "load", "back to the kept moment"),
    Key("r", "reset", "another start"),
    Key("m", "mode", "dream, real game, both"),
    Key("c", "player", "you, the agent, a planner, at random"),
    Key("b", "sync", "dream on from the real game"),
    Key("v", "record", "start, stop recording"),
    Key("[", "cooler", "dream less freely"),
    Key("]", "warmer", "dream more freely"),
    Key("-", "slower", "fewer frames a second"),
    Key("=", "faster", "more frames a second"),
    Key("z", "zoom", "larger, smaller"),
    Key("f", "fullscreen", "the whole screen"),
    Key("h", "help", "this list"),
)
PAD = ("left", "right", "up", "down", "space", *"123456789")  # what fingers and gamepads can press


def free(controls: Controls) -> tuple[Key, ...]:
    """The keys that the game leaves to play."""
    used = {key for chord, _ in controls.keys for key in chord}
    return tuple(key for key in KEYS if key.key not in used)


def pad(controls: Controls) -> list[str]:
    """The buttons that do something in this game."""
    idle = controls.action(())
    return [key for key in PAD if controls.action((key,)) != idle]


def spoken(controls: Controls) -> list[dict[str, str]]:
    """What the game's keys do, for a person: [{"keys": "a", "words": "left"}]."""
    lines = []
    for chord, action in controls.keys:
        if len(chord) == 1:
            words = controls.names[action] if isinstance(action, int) else _dimensions(controls, action)
            lines.append({"keys": chord[0], "words": words.lower()})
    return lines


def _dimensions(controls: Controls, action: tuple[float, ...]) -> str:
    rest = controls.action(())
    assert not isinstance(rest, int)
    moved = [(name, value) for name, value, at in zip(controls.names, action, rest, strict=True) if value != at]
    return ", ".join(f"{name} {'+' if value > 0 else '-'}" for name, value in moved) or "rest"


def known(held: Collection[object]) -> frozenset[str]:
    """The names of keys among what somebody sent."""
    return frozenset(key for key in held if isinstance(key, str) and len(key) <= 20)
