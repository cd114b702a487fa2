"""The command `long_rollout`: ten minutes of dream without a reset, beside as long a game.

The agent plays, or random play does; endings are counted and dreamed over. Each minute (900 steps at 15 a second) is
described by rewards, continuation and pixels, in Pong also by how often a ball is to be seen. The first row is the same
of the real game, by the same player, which begins anew where it ends. With `dreams=64 steps=256 player=random` it is
how far short dreams pay a stranger what the game does.
Writes results/long-rollout.json (-random for random play) and .png in the run's folder: the first frame of each minute
above one 8 steps later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from agent.player import Agent, Player
from agent.seeds import evaluation_seed
from envs.errors import UserError
from envs.make import make_games
from envs.settings import setting
from runs.build import no_policy
from runs.dreams import Loaded, load_parts
from runs.folder import files
from runs.folder.run import keep, result_name
from runs.measure.pong import SIZE, find_ball
from world_model.dream.batch import DreamBatch
from world_model.interface import to_pixels, to_unit
from world_model.noise import forked_rng

MINUTE, LATER, SCALE = 900, 8, 2
PLAYERS = ("agent", "random")
SHORT = {  # of the figures, for a narrow terminal
    "won": "won", "lost": "lost", "cont_mean": "cont", "cont_min": "least", "endings": "ends", "pixel_mean": "mean",
    "pixel_std": "std", "from_usual": "apart", "moves": "moves", "ball_share": "ball",
}  # fmt: skip
ENDING = 0.5  # continuation below which the model says that the game is over


@dataclass(frozen=True)
class LongRolloutConfig:
    """What `python main.py long_rollout` takes."""

    run: str | None = setting(None, help="a run's folder or name; the Pong that ships when not given")
    player: str = setting("agent", choices=PLAYERS, help="who plays dream and game")
    steps: int = setting(10 * MINUTE, 1, 10**7, help="steps of each dream, and of each game")
    dreams: int = setting(1, 1, 1024, help="dreams side by side, and as many games; figures are means over them")
    seed: int = setting(0, 0, 2**31 - 1, help="seed of the dream and the game")
    temperature: float | None = setting(
        None, 0, 100, help="temperature of the dream; that of the policy's training when not given"
    )
    device: str = setting("auto", help="auto, cpu or cuda")


def measure(loaded: Loaded, asked: LongRolloutConfig) -> tuple[dict[str, Any], np.ndarray]:
    """The figures and the strip (H, W, 3) uint8.

    Raises:
        UserError: `player=agent` of a world model that was trained alone.
    """
    if asked.player == "agent" and not loaded.config.train.policy:
        raise UserError("This world model was trained alone, without an agent: player=random plays it.")
    model = loaded.agent.world_model
    agent = loaded.agent if asked.player == "agent" else Agent(model, no_policy(model.spec)).to(loaded.agent.device)
    usual = np.median(to_pixels(to_unit(loaded.starts.frame).flatten(0, 1)), axis=0)
    warmth, ball = loaded.temperature(asked.temperature), _has_ball(loaded)
    minutes, tops, bottoms = [], [], []
    dreams, policy = DreamBatch(loaded.world(many=asked.dreams > 1), asked.seed), agent.learner.policy
    with dreams.rng_scope():
        now = dreams.begin(np.arange(asked.dreams) % len(loaded.starts.frame))
        memory = policy.initial(asked.dreams)
        for begin in range(0, asked.steps, MINUTE):
            pictures, rewards, conts = [], [], []
            for _ in range(min(MINUTE, asked.steps - begin)):
                action, memory = policy.act(model.features(now.state), memory)
                now = dreams.step(now.state, action, warmth)
                pictures.append(now.observation)
                rewards.append(now.reward)
                conts.append(now.cont)
            minutes.append(_described(np.stack(pictures), usual, ball) | _told(np.array(rewards), np.array(conts)))
            tops.append(pictures[0][0])
            bottoms.append(pictures[min(LATER, len(pictures) - 1)][0])
    found = {"player": asked.player, "temperature": warmth, "steps": asked.steps, "dreams": asked.dreams}
    return found | {"game": _played(loaded, agent, asked, usual, ball), "minutes": minutes}, _strip(tops, bottoms)


def _played(loaded: Loaded, agent: Agent, asked: LongRolloutConfig, usual: np.ndarray, ball: bool) -> dict[str, Any]:
    """The figures of the real game under the same player, as many games for as long; a minute's, of rates."""
    games, player = make_games(loaded.config.env, loaded.config.game, asked.dreams), Player(agent)
    begun, ends, rewards = games.num_envs, 0, []
    minutes: list[dict[str, Any]] = []
    try:
        frames = games.reset([evaluation_seed(asked.seed, number) for number in range(begun)])
        is_first = np.ones(begun, bool)
        with forked_rng(loaded.agent.device):
            torch.manual_seed(asked.seed)
            for begin in range(0, asked.steps, MINUTE):
                pictures = []  # of this minute alone: those of ten take gigabytes
                for _ in range(min(MINUTE, asked.steps - begin)):
                    brought = games.step(player.act(frames, is_first))
                    frames, is_first = brought.frame, brought.done
                    pictures.append(to_pixels(to_unit(torch.from_numpy(frames))))
                    rewards.append(brought.reward)
                    if over := np.flatnonzero(is_first).tolist():
                        seeds = [evaluation_seed(asked.seed, begun + i) for i in range(len(over))]
                        begun, ends, frames = begun + len(over), ends + len(over), games.reset(seeds, over)
                minutes.append({"steps": len(pictures)} | _described(np.stack(pictures), usual, ball))
    finally:
        games.close()
    share = min(MINUTE, asked.steps) / asked.steps
    paid = {name: round(value * share, 2) for name, value in _paid(np.array(rewards)).items()}
    lasted = [minute.pop("steps") for minute in minutes]
    shown = {name: round(float(np.average([of[name] for of in minutes], weights=lasted)), 3) for name in minutes[0]}
    return shown | paid | {"endings": round(ends * share / asked.dreams, 2)}


def _paid(reward: np.ndarray) -> dict[str, float]:
    """Rewards (T, N) as they are learned from: what one dream won and lost."""
    parts = {"won": np.maximum(reward, 0), "lost": np.maximum(-reward, 0)}
    return {name: round(float(part.sum(0).mean()), 2) for name, part in parts.items()}


def _told(reward: np.ndarray, cont: np.ndarray) -> dict[str, Any]:
    """What the heads predict over one minute, (T, N) each."""
    return _paid(reward) | {
        "cont_mean": round(float(cont.mean()), 4), "cont_min": round(float(cont.min()), 3),
        "endings": _begun(cont < ENDING), "finite": bool(np.isfinite(reward).all() and np.isfinite(cont).all()),
    }  # fmt: skip


def _begun(marks: np.ndarray) -> float:
    """How often marks (T, N) appear after none, in one of the N."""
    return round(float((marks[:1].sum() + (marks[1:] & ~marks[:-1]).sum()) / marks.shape[1]), 2)


def _described(pictures: np.ndarray, usual: np.ndarray, ball: bool) -> dict[str, Any]:
    """Pixels (T, N, H, W, 3) up to 255: mean and spread, how far they are from the usual picture, how much moves."""
    apart = np.mean([np.abs(picture.astype(np.float32) - usual).mean() for picture in pictures])
    pairs = zip(pictures[1:], pictures[:-1], strict=True)
    moves = np.mean([np.abs(new.astype(np.int16) - old).mean() for new, old in pairs] or [0.0])
    mean = float(pictures.mean())
    spread = np.mean([np.square(picture - mean).mean() for picture in pictures]) ** 0.5  # one at a time: as float64
    told: dict[str, Any] = {
        "pixel_mean": round(mean, 2), "pixel_std": round(float(spread), 2),
        "from_usual": round(float(apart), 3), "moves": round(float(moves), 3),
    }  # fmt: skip
    if ball:
        seen = [find_ball(one.transpose(2, 0, 1).astype(np.float64)) for one in pictures.reshape(-1, SIZE, SIZE, 3)]
        told["ball_share"] = round(float(np.mean([place is not None for place in seen])), 3)
    return told


def _has_ball(loaded: Loaded) -> bool:
    return "Pong" in loaded.config.env and loaded.agent.world_model.spec.frame == (3, SIZE, SIZE)


def _strip(tops: list[np.ndarray], bottoms: list[np.ndarray]) -> np.ndarray:
    rows = [np.concatenate([np.pad(one, ((2, 2), (2, 2), (0, 0))) for one in row], 1) for row in (tops, bottoms)]
    return np.concatenate(rows, 0).repeat(SCALE, 0).repeat(SCALE, 1)


def command(asked: LongRolloutConfig) -> None:
    """Measures, prints and writes."""
    loaded = load_parts(asked.run, asked.device)
    found, strip = measure(loaded, asked)
    name = "long-rollout" + ("-random" if asked.player == "random" else "")
    name = result_name(name, asked, "dreams", "steps", "temperature", "seed")
    path = keep(loaded.run, name, {"what": "long-rollout", "env": loaded.config.env} | found, loaded.config.env)
    files.write_png(path.with_suffix(".png"), strip)
    _show(found, path)


def _show(found: dict[str, Any], path: Path) -> None:
    many = f"{found['dreams']} dreams" if found["dreams"] > 1 else "a dream"
    title = f"{many} of {found['steps']:,} steps at temperature {found['temperature']:g}, played by {found['player']}"
    lines = Table(title=title, box=None, pad_edge=False, collapse_padding=True)
    names = [name for name in SHORT if name in found["minutes"][0]]
    for name in ("minute", *(SHORT[name] for name in names)):
        lines.add_column(name, justify="right")
    lines.add_row("game", *(str(found["game"].get(name, "")) for name in names))
    for i, minute in enumerate(found["minutes"]):
        lines.add_row(str(i + 1), *(str(minute[name]) for name in names))
    console = Console(highlight=False)
    console.print(lines)
    console.print(f"written to {path}", soft_wrap=True)
