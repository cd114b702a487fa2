"""The command `long_rollout`: ten minutes of dream without a reset.

The agent plays; endings are counted and dreamed over. Each minute (900 steps at 15 a second) is described by rewards,
continuation and pixels, in Pong also by how often a ball is to be seen, beside the same figures of real frames.
Writes results/long-rollout.json and .png in the run's folder: each minute's first frame above one 8 steps later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from envs.settings import setting
from play.dreamer import Dreamer
from runs.cli.play import parts
from runs.dreams import Loaded, load_parts
from runs.folder import files
from runs.folder.run import keep
from runs.measure.pong import SIZE, find_ball
from world_model.interface import to_pixels, to_unit

MINUTE, LATER, SCALE = 900, 8, 2
SHORT = {  # of the figures, for a narrow terminal
    "points_won": "won", "points_lost": "lost", "reward": "reward", "cont_mean": "cont", "cont_min": "least",
    "endings": "ends", "pixel_mean": "mean", "pixel_std": "std", "from_usual": "apart", "moves": "moves",
    "ball_share": "ball",
}  # fmt: skip
ENDING = 0.5  # continuation below which the model says that the game is over


@dataclass(frozen=True)
class LongRolloutConfig:
    """What `python main.py long_rollout` takes."""

    run: str | None = setting(None, help="a run's folder or name; the Pong that ships when not given")
    steps: int = setting(10 * MINUTE, 1, 10**7, help="of the dream")
    seed: int = setting(0, 0, 2**31 - 1, help="of the dream")
    temperature: float | None = setting(None, 0, 100, help="of the dream; that of the policy's training when not given")
    device: str = setting("auto", help="auto, cpu or cuda")


def measure(loaded: Loaded, asked: LongRolloutConfig) -> tuple[dict[str, Any], np.ndarray]:
    """The figures and the strip (H, W, 3) uint8."""
    shared = parts(loaded)
    warmth = loaded.temperature(asked.temperature)
    dreamer, ball = Dreamer(shared, asked.seed), _has_ball(loaded)
    real = to_pixels(to_unit(loaded.starts.frame).flatten(0, 1))
    usual = np.median(real, axis=0)
    minutes, tops, bottoms = [], [], []
    with dreamer.rng_scope():
        side, memory = dreamer.from_start(0), dreamer.policy.initial(1)
        for begin in range(0, asked.steps, MINUTE):
            pictures, rewards, conts = [], [], []
            for _ in range(min(MINUTE, asked.steps - begin)):
                view, _ = dreamer.look(side)
                action, memory = dreamer.act(view, memory)
                side = dreamer.dream(side, action, warmth)
                pictures.append(side.picture)
                rewards.append(side.reward)
                conts.append(side.cont)
            minutes.append(_described(np.stack(pictures), usual, ball) | _told(np.array(rewards), np.array(conts)))
            tops.append(pictures[0])
            bottoms.append(pictures[min(LATER, len(pictures) - 1)])
    found = {"temperature": warmth, "steps": asked.steps, "real_frames": _described(real, usual, ball)}
    return found | {"minutes": minutes}, _strip(tops, bottoms)


def _told(reward: np.ndarray, cont: np.ndarray) -> dict[str, Any]:
    """What the heads say over one minute."""
    return {
        "points_won": int((reward > 0.5).sum()), "points_lost": int((reward < -0.5).sum()),
        "reward": round(float(reward.sum()), 2), "cont_mean": round(float(cont.mean()), 4),
        "cont_min": round(float(cont.min()), 3), "endings": _begun(cont < ENDING),
        "finite": bool(np.isfinite(reward).all() and np.isfinite(cont).all()),
    }  # fmt: skip


def _begun(marks: np.ndarray) -> int:
    """How often a mark appears after none."""
    return int(marks[:1].sum() + (marks[1:] & ~marks[:-1]).sum())


def _described(pictures: np.ndarray, usual: np.ndarray, ball: bool) -> dict[str, Any]:
    """Pixels (T, H, W, 3) up to 255: their mean and spread, how far they are from the usual picture, how much moves."""
    apart = np.abs(pictures.astype(np.float32) - usual)
    moves = np.abs(np.diff(pictures.astype(np.float32), axis=0)).mean() if len(pictures) > 1 else 0.0
    told: dict[str, Any] = {
        "pixel_mean": round(float(pictures.mean()), 2), "pixel_std": round(float(pictures.std()), 2),
        "from_usual": round(float(apart.mean()), 3), "moves": round(float(moves), 3),
    }  # fmt: skip
    if ball:
        places = [find_ball(picture.transpose(2, 0, 1).astype(np.float64)) for picture in pictures]
        told["ball_share"] = round(float(np.mean([place is not None for place in places])), 3)
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
    path = keep(loaded.run, "long-rollout", {"env": loaded.config.env} | found, loaded.config.env)
    files.write_png(path.with_suffix(".png"), strip)
    _show(found, path)


def _show(found: dict[str, Any], path: Path) -> None:
    title = f"a dream of {found['steps']:,} steps at temperature {found['temperature']:g}"
    lines, names = (
        Table(title=title, box=None, pad_edge=False, collapse_padding=True),
        [name for name in SHORT if name in found["minutes"][0]],
    )
    for name in ("minute", *(SHORT[name] for name in names)):
        lines.add_column(name, justify="right")
    lines.add_row("real", *(str(found["real_frames"].get(name, "")) for name in names))
    for i, minute in enumerate(found["minutes"]):
        lines.add_row(str(i + 1), *(str(minute[name]) for name in names))
    console = Console(highlight=False)
    console.print(lines)
    console.print(f"written to {path}", soft_wrap=True)
