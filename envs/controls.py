"""How a person plays a game: the names of its actions, and what keys held together mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from envs.games import Games, from_bounds, to_bounds

Action = int | tuple[float, ...]  # as Games.step takes it: a choice, or each dimension in [-1, 1]
Chord = tuple[str, ...]

# What a key stands for in a game that gives it no meaning, the first that the game knows: arrows for letters and
# letters for arrows; where nothing goes up, up is right, as on the wheel that moved Pong's paddle.
STANDS_FOR = {
    "up": ("w", "right", "d"), "down": ("s", "left", "a"), "left": ("a",), "right": ("d",),
    "w": ("up", "d", "right"), "s": ("down", "a", "left"), "a": ("left",), "d": ("right",),
}  # fmt: skip
PAIRS = (("left", "right"), ("down", "up"), ("a", "d"), ("s", "w"))  # for dimensions of games that name no keys
WAITING = ("noop", "stay", "nothing", "none", "idle", "wait")
NAMES = {" ": "space", "\r": "enter", "\t": "tab"}


@dataclass(frozen=True)
class Controls:
    """How a person plays a game.

    names: of the choices (discrete) or of the dimensions (continuous).
    keys: (keys held together, the action they mean), keys in lower case ("w", "space", "left"), () for nothing held.
    low, high: the game's own bounds of continuous actions, None for discrete ones.
    """

    names: tuple[str, ...]
    keys: tuple[tuple[Chord, Action], ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    @staticmethod
    def of(games: Games) -> Controls:
        """What the game itself says, or digits for choices and arrows for dimensions when it says nothing."""
        low, high = (None if b is None else tuple(b.tolist()) for b in (games.action_low, games.action_high))
        own = games.keys_to_action()
        if own is not None:
            keys = {_chord(held): _plain(action) for held, action in own.items()}
        elif low is None or high is None:
            keys = {(str(i + 1),): i for i in range(min(9, len(games.action_names)))}
        else:
            keys = _dimensions(low, high)
        idle = _waiting(games.action_names) if low is None or high is None else _rest(low, high)
        return Controls(games.action_names, tuple(({(): idle} | keys).items()), low, high)

    @property
    def discrete(self) -> bool:
        """Whether actions are choices and not numbers."""
        return self.low is None

    def action(self, held: Collection[str]) -> Action:
        """The action of the largest chord among the keys held (of equal ones the first); of () when there is none."""
        known = {key for chord, _ in self.keys for key in chord}
        meant = {next((name for name in (key, *STANDS_FOR.get(key, ())) if name in known), key) for key in held}
        return max((entry for entry in self.keys if meant.issuperset(entry[0])), key=lambda entry: len(entry[0]))[1]

    def native(self, action: Action) -> Any:
        """An action as the game's own action space has it: the choice, or (A,) float32 within the bounds."""
        if self.low is None or self.high is None:
            return action
        return to_bounds(np.array(action), np.array(self.low, np.float32), np.array(self.high, np.float32))

    def normalised(self, actions: np.ndarray) -> np.ndarray:
        """The reverse for many: (..., A) numbers within the bounds to [-1, 1] float32; choices stay as they are."""
        if self.low is None or self.high is None:
            return actions
        return from_bounds(actions, np.array(self.low), np.array(self.high))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        keys = [[list(chord), action if isinstance(action, int) else list(action)] for chord, action in self.keys]
        bounds = {"low": self.low and list(self.low), "high": self.high and list(self.high)}
        return {"names": list(self.names), "keys": keys} | bounds

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Controls:
        """From what `to_dict` gave. Raises ValueError for anything else."""
        try:
            keys = {tuple(map(str, chord)): _plain(action) for chord, action in values["keys"]}
            low, high = (None if values[name] is None else tuple(map(float, values[name])) for name in ("low", "high"))
            made = Controls(tuple(map(str, values["names"])), tuple(keys.items()), low, high)
        except (LookupError, TypeError) as problem:
            raise ValueError(f"these are no controls of a game: {values}") from problem
        if () not in keys or not made.names:
            raise ValueError("controls need names, and an action for no key held")
        return made


def _chord(keys: Chord) -> Chord:
    return tuple(NAMES.get(key, key.lower()) for key in keys)


def _plain(action: Any) -> Action:
    values = np.asarray(action)
    return int(values) if values.ndim == 0 else tuple(float(value) for value in values)


def _waiting(names: tuple[str, ...]) -> int:
    """The choice that does nothing; the first when none says so."""
    return next((i for i, name in enumerate(names) if name.lower() in WAITING), 0)


def _rest(low: tuple[float, ...], high: tuple[float, ...]) -> tuple[float, ...]:
    """The game's own 0, or what comes nearest to it, in [-1, 1]."""
    least, most = np.array(low), np.array(high)
    return tuple(from_bounds(np.clip(0, least, most), least, most).tolist())


def _dimensions(low: tuple[float, ...], high: tuple[float, ...]) -> dict[Chord, Action]:
    """A pair of keys for each dimension that goes both ways from rest, one key for each that only goes up from it.

    CarRacing's steering is left and right, its gas up, its brake down. Dimensions past the keys stay at rest.
    """
    rest = _rest(low, high)
    pairs = list(PAIRS)
    choices: list[list[tuple[Chord, float]]] = [[((), at)] for at in rest]
    for both in (True, False):
        singles = [key for less, more in pairs for key in (more, less)]
        for options, at in zip(choices, rest, strict=True):
            if both and pairs and abs(at) < 1:
                less, more = pairs.pop(0)
                options += [((less,), -1.0), ((more,), 1.0)]
            elif not both and singles and abs(at) >= 1:
                options.append(((singles.pop(0),), -at))
    together = ((sum((keys for keys, _ in parts), ()), tuple(at for _, at in parts)) for parts in product(*choices))
    return {chord: action for chord, action in together if chord}
