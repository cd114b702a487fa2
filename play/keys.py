"""The keys that play itself knows, the same in the page and in the window; a key that the game uses is the game's."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from envs.controls import Action, Controls


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
    """The buttons that do something in this game, alone or together with other keys."""
    chords = [frozenset(chord) for chord, _ in controls.keys]  # () among them

    def matters(key: str) -> bool:
        return any(controls.action(held | {key}) != controls.action(held - {key}) for held in chords)

    return [key for key in PAD if matters(key)]


def spoken(controls: Controls) -> list[dict[str, str]]:
    """What each of the game's keys does, for a person: [{"keys": "a", "words": "left"}].

    A key that means nothing alone has what it means beside one other: {"keys": "space", "words": "with d: rightfire"}.
    """
    lines = {chord[0]: _words(controls, action) for chord, action in controls.keys if len(chord) == 1}
    together: dict[str, list[str]] = {}
    for chord, action in controls.keys:
        for key in set(chord) - set(lines):
            others = " ".join(other for other in chord if other != key)
            together.setdefault(key, []).append(f"with {others}: {_words(controls, action)}")
    for key, found in together.items():
        lines[key] = ", ".join(sorted(found, key=lambda words: words.split(":")[0].count(" "))[:3])
    return [{"keys": key, "words": words} for key, words in lines.items()]


def _words(controls: Controls, action: Action) -> str:
    if isinstance(action, int):
        return controls.names[action].lower()
    rest = controls.action(())
    assert not isinstance(rest, int)
    moved = [(name, value) for name, value, at in zip(controls.names, action, rest, strict=True) if value != at]
    return ", ".join(f"{name} {'+' if value > 0 else '-'}" for name, value in moved).lower() or "rest"


def known(held: Collection[object]) -> frozenset[str]:
    """The names of keys among what somebody sent."""
    return frozenset(key for key in held if isinstance(key, str) and len(key) <= 20)
