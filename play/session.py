"""The state machine of one visitor: a dream, the real game or both, played by a person or the program. No IO."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from envs.controls import Action
from envs.episode import Episode, Recording
from envs.errors import UserError
from envs.games import Transition
from play.dreamer import Dreamer
from play.past import Past
from play.real_game import Real
from play.snapshot import MODES, Estimate, Parts, Snapshot, View, number
from world_model.trees import Tree

MOST_FPS, HOTTEST = 240, 2.0
LONGEST = 4_000  # steps of one recorded piece: about 50 MB of pictures


class GameSession:
    """One visitor's game. Every public method either works or raises UserError and changes nothing.

    Attributes:
        now: the present moment.
        paused, player, temperature, fps, recording: the settings.
        episodes: pieces of the real game that a person has played while recording; whoever saves them empties it.
    """

    def __init__(self, parts: Parts, *, seed: int = 0, temperature: float = 1.0, fps: float = 15) -> None:
        self.parts, self.dreamer = parts, Dreamer(parts, seed)
        self.player, self.temperature, self.fps = "human", temperature, fps
        self.off: frozenset[int] = frozenset()  # components of the mixture that are switched off
        self.paused = self.recording = False
        self.episodes: list[Episode] = []
        self._piece: Recording | None = None
        self._real: Real | None = None
        self._past = Past()
        self._kept: Snapshot | None = None
        self._times: deque[float] = deque(maxlen=240)  # ms
        self.now = self._dream_from(seed, None)

    # ---- playing ----
    def turn(self, held: Collection[str] = (), *, back: bool = False) -> bool:
        """What a tick of the clock brings: a step back or forth, or nothing while paused. Says whether it did."""
        if back:
            return self.rewind(1)
        if not self.paused:
            self.step(held)
        return not self.paused

    def step(self, held: Collection[str] = ()) -> None:
        """One step with these keys held; a game that is over begins anew instead."""
        now = self.now
        if now.done:
            self.reset()
            return
        began = time.perf_counter()
        with self.dreamer.rng_scope():
            action, memory = self._choose(held)
        thought = time.perf_counter()
        brought = film = None
        if self._real is not None and now.real is not None:
            brought, film = self._real.step(action), self._real.picture()
        played = time.perf_counter()
        with self.dreamer.rng_scope():
            real = None
            if now.real is not None and brought is not None and film is not None:
                real = self.dreamer.follow(now.real, action, brought, film)
            dream = None
            if now.dream is not None:
                dream = self.dreamer.dream(now.dream, action, self.temperature, self.off)
            view, estimate = self._look(real, dream)
        self._times.append(1e3 * (time.perf_counter() - played + thought - began))
        if brought is not None and now.real is not None:
            self._record(now.real.frame, action, brought)
        horizon = now.horizon + 1 if dream is not None else 0
        self._arrive(now._replace(
            step=now.step + 1, horizon=horizon, dream=dream, real=real, memory=memory, view=view, estimate=estimate,
            action=action, rng_state=self.dreamer.rng_state,
            position=self._real.position if self._real is not None else None,
        ))  # fmt: skip

    def rewind(self, count: int = 1) -> bool:
        """Goes back so many moments, at most to the oldest one that is remembered. Says whether it went."""
        count = min(count, len(self._past))
        if count:
            with self.dreamer.rng_scope():
                moment = self.dreamer.recalled(self._past.pop(count))
            self._return_to(moment)
        return count > 0

    def reset(self, start: int | None = None, seed: int | None = None) -> None:
        """Begins anew, as the next seed has it; a dream from the chosen start."""
        count = len(self.parts.world.starts.frame)
        if start is not None and not 0 <= start < count:
            raise UserError(f"There is no start {start}: choose 0 to {count - 1}.")
        self._begin(self.now.mode, self.now.seed + 1 if seed is None else seed, start)

    def save(self) -> None:
        """Keeps this moment."""
        self._kept = self.now

    def load(self) -> None:
        """Goes back to the kept moment; the rewind can undo it."""
        if self._kept is None:
            raise UserError("No moment has been kept yet.")
        self._remember()
        self._return_to(self._kept)

    def sync(self) -> None:
        """In "both": dreams on from where the real game stands now."""
        real, dream = self.now.real, self.now.dream
        if real is None or dream is None:
            raise UserError("Only beside the real game can a dream begin from its present: choose both.")
        with self.dreamer.rng_scope():
            dream = self.dreamer.from_state(real.state, real.total)
        self._arrive(self.now._replace(dream=dream, horizon=0))

    # ---- settings ----
    def set_mode(self, mode: str) -> None:
        """Shows the dream, the real game, or both under the same actions.

        From the real game a dream goes on where it stands, in "both" and in "dream"; from a dream alone the real game
        can only begin anew. Raises UserError where the real game cannot be had.
        """
        chosen, now = _choice("mode", mode, MODES), self.now
        if chosen == now.mode:
            return
        if now.real is None or now.done:
            self._begin(chosen, now.seed, None)
            return
        self._cut()
        dream = now.dream
        if dream is None and chosen != "real":
            with self.dreamer.rng_scope():
                dream = self.dreamer.from_state(now.real.state, now.real.total)
        if chosen == "real":
            dream = None
        real = None if chosen == "dream" else now.real
        with self.dreamer.rng_scope():
            view, estimate = self._look(real, dream)
        horizon = now.horizon if dream is not None else 0
        self._arrive(now._replace(mode=chosen, dream=dream, real=real, view=view, estimate=estimate, horizon=horizon))

    def set_player(self, player: str) -> None:
        """Puts a person, the agent (where there is one), a planner or chance at the controls."""
        chosen = _choice("player", player, self.parts.players)
        if chosen != self.player:
            self._cut()
            self.player = chosen

    def set_temperature(self, value: float) -> None:
        """Of the latents that are dreamed: 0 takes the most likely ones, 1 is what the model believes."""
        self.temperature = _within("temperature", value, 0, HOTTEST)

    def set_component(self, number: int) -> None:
        """Switches a component of the mixture off or on again, the first one being 1; one stays on."""
        count = self.parts.world.model.components
        if not count:
            raise UserError("This model draws from no mixture: that of world_models does.")
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= count:
            raise UserError(f"component takes a whole number from 1 to {count}.")
        off = self.off ^ {number - 1}
        if len(off) == count:
            raise UserError("One component must stay on.")
        self.off = off

    def set_fps(self, value: float) -> None:
        """The frame-rate limit, in steps a second."""
        self.fps = _within("fps", value, 1, MOST_FPS)

    def record(self, on: bool) -> None:
        """Starts or stops the recording of what a person plays in the real game."""
        self._cut()
        self.recording = on

    def aspect(self, picture: str) -> float | None:
        """Width by height at which "real", "dream" or "difference" is shown; None: that of its pixels."""
        return self._real.aspect if picture == "real" and self._real is not None else self.parts.aspect

    def close(self) -> None:
        """Frees the emulator and cuts the recording."""
        self._cut()
        if self._real is not None:
            self._real.close()
            self._real = None

    def to_dict(self) -> dict[str, Any]:
        """All that the display shows beside the pictures, as plain JSON values."""
        now = self.now
        times = np.percentile(self._times, (50, 95)).tolist() if self._times else (None, None)
        action = [number(value) for value in now.action] if isinstance(now.action, tuple) else now.action
        probabilities = (
            None if now.estimate.probabilities is None else [number(chance) for chance in now.estimate.probabilities]
        )
        return {
            "mode": now.mode, "player": self.player, "paused": self.paused, "recording": self.recording,
            "temperature": self.temperature, "fps": self.fps, "seed": now.seed, "start": now.start, "step": now.step,
            "horizon": now.horizon, "action": action, "value": number(now.estimate.value),
            "probabilities": probabilities, "off": [str(one + 1) for one in sorted(self.off)],
            "views": {name: side.to_dict() for name, side in (("real", now.real), ("dream", now.dream)) if side},
            "model_ms": [number(value, 2) for value in times], "back": len(self._past), "kept": self._kept is not None,
        }  # fmt: skip

    # ---- beginnings ----
    def _begin(self, mode: str, seed: int, start: int | None) -> None:
        if mode != "dream" and self._real is None:
            self._real = Real(self.parts.game())
        self._cut()
        self.dreamer.seed(seed)
        self._arrive(self._dream_from(seed, start) if mode == "dream" else self._real_from(mode, seed))

    def _dream_from(self, seed: int, start: int | None) -> Snapshot:
        if start is None:
            start = int(np.random.default_rng(seed).integers(len(self.parts.world.starts.frame)))
        with self.dreamer.rng_scope():
            return self._first("dream", seed, start, dream=self.dreamer.from_start(start), real=None)

    def _real_from(self, mode: str, seed: int) -> Snapshot:
        assert self._real is not None
        frame, film = self._real.reset(seed % 2**31), self._real.picture()
        with self.dreamer.rng_scope():
            real = self.dreamer.from_frame(frame, film)
            dream = self.dreamer.from_state(real.state) if mode == "both" else None
            return self._first(mode, seed, None, dream=dream, real=real)

    def _first(self, mode: str, seed: int, start: int | None, *, dream: View | None, real: View | None) -> Snapshot:
        view, estimate = self._look(real, dream)
        position = self._real.position if self._real is not None and real is not None else None
        memory, rng_state = self.dreamer.policy.initial(1), self.dreamer.rng_state
        return Snapshot(mode, seed, start, 0, 0, dream, real, memory, view, estimate, None, rng_state, position)

    # ---- one step ----
    def _choose(self, held: Collection[str]) -> tuple[Action, Tree]:
        """The action of whoever plays; the agent's memory goes on in any case."""
        chosen, memory = self.dreamer.act(self.now.view, self.now.memory)
        if self.player == "human":
            chosen = self.parts.world.controls.action(held)
        elif self.player == "random":
            chosen = self.dreamer.at_random()
        elif self.player == "planner":
            side = self.now.real or self.now.dream
            assert side is not None
            chosen = self.dreamer.plan(side.state, self.temperature)
        return chosen, memory

    def _look(self, real: View | None, dream: View | None) -> tuple[Tensor, Estimate]:
        """The agent sees the real game, where there is one."""
        side = real or dream
        assert side is not None
        return self.dreamer.look(side)

    def _record(self, frame: np.ndarray | None, action: Action, brought: Transition) -> None:
        if not self.recording or self.player != "human" or self._real is None or frame is None:
            return
        if self._piece is None:
            seed, _, length = self._real.position
            self._piece = Recording(self.parts.world.model.spec, frame, seed=seed)
            self._piece.piece_of = -1 if length == 1 else seed  # this step is the game's first
        self._piece.append(action, brought)
        if brought.done or len(self._piece) >= LONGEST:
            self._cut()

    def _cut(self) -> None:
        """Ends the piece under way: what comes next is not its continuation."""
        if self._piece is not None:
            self.episodes.append(replace(self._piece.finish(), weight=self.parts.human_weight))
            self._piece = None

    # ---- moments ----
    def _arrive(self, moment: Snapshot) -> None:
        self._remember()
        self.now = moment

    def _remember(self) -> None:
        self._past.add(self.dreamer.condensed(self.now), self.fps)

    def _return_to(self, moment: Snapshot) -> None:
        self._cut()
        self.now, self.dreamer.rng_state = moment, moment.rng_state
        if moment.position is not None and self._real is not None:
            self._real.back(moment.position)


def _choice(key: str, word: Any, valid: tuple[str, ...]) -> str:
    if word not in valid:
        raise UserError(f"{key} is one of {', '.join(valid)}, not {str(word)[:40]}.")
    return str(word)


def _within(key: str, value: Any, low: float, high: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:  # nan is not within
        raise UserError(f"{key} is a number from {low:g} to {high:g}, not {str(value)[:40]}.")
    return float(value)
