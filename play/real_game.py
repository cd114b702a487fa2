"""One copy of the real game that can go back in time, because an episode is a function of its seed and actions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from envs.controls import Action
from envs.games import Games, Transition


class ReplayPosition(NamedTuple):
    """A moment of an episode: the first `length` of the actions taken since the reset with `seed`."""

    seed: int
    taken: list[Action]  # only ever appended to, and only from the moment after the last of them
    length: int


class Real:
    """The game at the present moment, or the position of the moment that it has yet to be played up to."""

    def __init__(self, games: Games) -> None:
        """`games` has one copy; it is closed with this object."""
        self.games = games
        self.position = ReplayPosition(0, [], 0)
        self._behind = False
        self.aspect = games.film_aspect  # width by height at which its picture is shown

    def reset(self, seed: int) -> np.ndarray:
        """A new episode; its first frame (C, H, W) uint8."""
        self.position, self._behind = ReplayPosition(seed, [], 0), False
        return np.asarray(self.games.reset([seed])[0])

    def step(self, action: Action) -> Transition:
        """One action; what it brought, without the dimension of the rows."""
        if self._behind:
            self._wind()
        brought = self.games.step(np.asarray([action], np.int64 if isinstance(action, int) else np.float32))
        seed, taken, length = self.position
        if length < len(taken):  # another future begins here; moments that remember the old one keep it
            taken = taken[:length]
        taken.append(action)
        self.position = ReplayPosition(seed, taken, length + 1)
        return Transition(*(values[0] for values in brought))

    def picture(self) -> np.ndarray:
        """The game's own picture of this moment at its own size, (H, W, 3) uint8."""
        return self.games.render()

    def back(self, position: ReplayPosition) -> None:
        """Returns to a moment; the game itself is played up to it only when it goes on, so that rewinding is free."""
        self.position, self._behind = position, True

    def _wind(self) -> None:
        seed, taken, length = self.position
        if length:
            kind = np.int64 if self.games.spec.discrete else np.float32
            self.games.restore([seed], [np.asarray(taken[:length], kind)], [length])  # nothing on the way is kept
        else:
            self.games.reset([seed])
        self._behind = False

    def close(self) -> None:
        """Frees the emulator."""
        self.games.close()
