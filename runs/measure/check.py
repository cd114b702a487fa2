"""The command `check`: what a game offers and what an agent would see of it, before anything is trained on it.

Plays some hundred random steps, twice over from the same seed, and writes a picture: the game's own frame and the
agent's, at a few moments. Shapes: T steps, C H W frame.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from envs.controls import Controls
from envs.games import Games
from envs.make import make_games
from runs.config import Config
from runs.folder.files import file_name, write_png
from runs.folder.run import OUT

STEPS, SEED = 400, 0  # of random play, and where it begins
MOMENTS = (0, 5, 15, 40, 100)  # whose pictures are shown
HEIGHT = 210  # of a picture, in pixels
GAP = 8


class Played(NamedTuple):
    """What random play brought, of one episode after the other."""

    frame: np.ndarray  # (T + 1, C, H, W) uint8
    reward: np.ndarray  # (T,)
    lengths: list[int]  # of the episodes that ended
    ended_by: dict[str, int]  # "game over" or "time limit"
    own: list[np.ndarray]  # the game's own pictures at MOMENTS
    seconds: float


def check(config: Config, folder: Path = OUT) -> dict[str, Any]:
    """Prints what was found, writes the picture and returns the same; raises UserError for a game that is no game.

    What a game's code raises while it is played is said with the step.
    """
    console = Console(highlight=False)
    games = make_games(config.env, config.game, 1)
    try:
        controls = Controls.of(games)
        actions = _actions(games)
        first = _play(games, actions, pictures=True)
    finally:
        games.close()
    again = make_games(config.env, config.game, 1)
    try:
        second = _play(again, actions)
    finally:
        again.close()
    found = describe(games, controls, first, second)
    console.print(_table(config, found))
    path = folder / f"check-{file_name(config.env)}.png"
    write_png(path, picture(first))
    console.print(f"what the game draws, and below it what the agent sees: {path}", soft_wrap=True)
    return found | {"picture": str(path)}


def _actions(games: Games) -> np.ndarray:
    rng = np.random.default_rng(SEED)
    if games.spec.discrete:
        return rng.integers(0, games.spec.action_size, STEPS)
    return rng.uniform(-1, 1, (STEPS, games.spec.action_size)).astype(np.float32)


def _play(games: Games, actions: np.ndarray, *, pictures: bool = False) -> Played:
    frames, rewards, lengths, own = [games.reset([SEED])[0]], list[float](), list[int](), list[np.ndarray]()
    ended_by = {"game over": 0, "time limit": 0}
    began, length = time.monotonic(), 0
    for t, action in enumerate(actions):
        if pictures and t in MOMENTS:
            own.append(games.render())
        step = games.step(action[None])
        frames.append(step.frame[0])
        rewards.append(float(step.reward[0]))
        length += 1
        if step.done[0]:
            lengths.append(length)
            ended_by["time limit" if step.truncated[0] else "game over"] += 1
            length = 0
            games.reset([SEED + len(lengths)])
    return Played(np.stack(frames), np.array(rewards), lengths, ended_by, own, time.monotonic() - began)


def describe(games: Games, controls: Controls, first: Played, second: Played) -> dict[str, Any]:
    """Everything that is printed, as plain values."""
    frame = first.frame
    other = next((t for t in range(len(frame)) if not np.array_equal(frame[t], second.frame[t])), None)
    paid = next((t for t in range(STEPS) if first.reward[t] != second.reward[t]), None)
    differ = min((t for t in (other, paid) if t is not None), default=None)
    moving = float((frame[1:] != frame[:-1]).any(1).mean())
    native = "x".join(map(str, first.own[0].shape[:2]))
    return {
        "seen": games.description,
        "own picture": f"{native} pixels",
        "actions": _named(games, controls),
        "keys": _keys(controls),
        "episodes": _episodes(first),
        "rewards": _rewards(first),
        "changes": f"{moving:.1%} of the agent's pixels change in a step",
        "replays": "yes: the same frames and rewards from the same seed" if differ is None else
        f"no: from step {differ} on it is another game with the same seed, so that a resumed run begins new episodes",
        "speed": f"{STEPS / first.seconds:,.0f} agent steps a second, one copy",
        "warnings": _warnings(frame, first),
    }  # fmt: skip


def _named(games: Games, controls: Controls) -> str:
    names = games.action_names[:20]
    more = f", ... ({len(games.action_names)} in all)" if len(games.action_names) > len(names) else ""
    if controls.low is None or controls.high is None:
        return ", ".join(names) + more
    bounds = zip(names, controls.low, controls.high, strict=False)
    return ", ".join(f"{name} from {low:g} to {high:g}" for name, low, high in bounds) + more


def _keys(controls: Controls) -> str:
    single = [(chord[0], action) for chord, action in controls.keys if len(chord) == 1][:12]
    if not controls.discrete:
        return ", ".join(key for key, _ in single) or "none"
    return ", ".join(f"{key}: {controls.names[int(action)]}" for key, action in single) or "none"  # type: ignore[arg-type]


def _episodes(played: Played) -> str:
    if not played.lengths:
        return f"none ended within {STEPS} random steps; game.max_steps=N ends one after N"
    ends = " and ".join(f"{count} by {how}" for how, count in played.ended_by.items() if count)
    return f"{len(played.lengths)} ended within {STEPS} random steps ({ends}), after {_range(played.lengths)} steps"


def _rewards(played: Played) -> str:
    told = played.reward[played.reward != 0]
    if not len(told):
        return f"none within {STEPS} random steps"
    return f"{len(told)} within {STEPS} random steps, of {_range(told.tolist())}"


def _range(values: Sequence[float]) -> str:
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def _warnings(frame: np.ndarray, played: Played) -> list[str]:
    found = []
    if (frame == frame[:1]).all():
        found.append("The picture never changes: an agent learns nothing from it.")
    if not played.reward.any():
        found.append("No reward came: with random play alone a policy would learn to earn nothing.")
    if played.lengths and max(played.lengths) < 4:
        found.append("Its episodes last a step or two: there is hardly anything to dream.")
    if np.abs(played.reward).max() > 1_000:
        found.append("Its rewards are large: game.clip_rewards=true learns their signs.")
    return found


def _table(config: Config, found: dict[str, Any]) -> Table:
    table = Table(title=f"{config.env}, as recipe={config.recipe} size={config.size} sees it", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, text in found.items():
        for line in text if isinstance(text, list) else [text]:
            table.add_row("look" if isinstance(text, list) else name, line)
    return table


def picture(played: Played) -> np.ndarray:
    """The game's own pictures above, the agent's frames below, (H, W, 3) uint8."""
    columns = []
    for t, own in zip(MOMENTS, played.own, strict=False):
        frame = played.frame[t].transpose(1, 2, 0)
        seen = np.repeat(frame, 3, 2) if frame.shape[2] == 1 else frame
        above, below = _of_height(own, cv2.INTER_AREA), _of_height(np.ascontiguousarray(seen), cv2.INTER_NEAREST)
        wide = max(above.shape[1], below.shape[1])
        columns.append(np.concatenate([_padded(above, wide), _padded(below, wide)]))
    return np.concatenate(columns, 1)


def _of_height(image: np.ndarray, how: int) -> np.ndarray:
    width = max(1, round(image.shape[1] * HEIGHT / image.shape[0]))
    return cv2.resize(image, (width, HEIGHT), interpolation=how)


def _padded(image: np.ndarray, width: int) -> np.ndarray:
    left = (width - image.shape[1]) // 2
    return np.pad(image, ((GAP, GAP), (left + GAP, width - image.shape[1] - left + GAP), (0, 0)), constant_values=40)
