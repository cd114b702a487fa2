"""The command `objects`: does the reconstruction keep Pong's ball?

Writes results/objects.json in the run's folder, and results/objects.png: the worst and some ordinary examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from agent.player import Agent, Player
from agent.seeds import evaluation_seed
from envs.errors import UserError
from envs.games import Games
from envs.make import make_games
from envs.settings import setting
from runs import build
from runs.folder.files import write_png
from runs.folder.run import Run
from runs.folder.system import choose_device
from runs.measure.pong import Mirror, Truth, find_ball
from world_model.interface import WorldModel, to_unit
from world_model.token_world import TokenWorld

FRAMES, EPISODES = 1_000, 8
NEAR = 2.0  # pixels of the 64x64 picture
EXAMPLES, SCALE = 32, 3  # of the picture


@dataclass(frozen=True)
class ObjectsConfig:
    """What `python main.py objects` takes."""

    run: str = setting("", required=True, help="a run's folder or name, of Pong")


class Sample(NamedTuple):
    """M held-out frames in which the ball is in play and visible."""

    frame: np.ndarray  # (M, 3, 64, 64) uint8
    truth: list[Truth]
    candidates: int  # how many such frames the episodes had

    @property
    def centre(self) -> np.ndarray:
        """Where the balls are, (M, 2)."""
        return np.stack([truth.centre for truth in self.truth])


def measure(run: Run, *, frames: int = FRAMES, device: str = "cpu") -> dict[str, object]:
    """Plays held-out episodes with the newest checkpoint and looks for the ball in the reconstructions."""
    config = run.config
    games = make_games(config.env, config.game, EPISODES)
    try:
        agent = build.agent(config, games.spec, device)
        state = run.load_checkpoint(device)
        with run.understood():
            agent.load_state_dict(state["agent"])
        if isinstance(agent.world_model, TokenWorld) and agent.world_model.pairs:
            raise UserError(
                "objects judges frames that are seen alone; this run encodes pairs: see fidelity's ball_seen instead."
            )
        sample = play(agent, games, frames, seed=config.seed)
    finally:
        games.close()
    shown = reconstruct(agent.world_model, sample.frame)
    found = {"episodes": EPISODES, "policy": "sampled"} | judge(sample, shown)
    found |= {"command": f"python main.py objects run={run.folder}", "candidates": sample.candidates}
    found |= {"ram_gap_max_px": round(max(t.memory_gap for t in sample.truth), 3)}
    run.result("objects", found)
    write_png(run.folder / "results" / "objects.png", picture(sample, shown))
    return found


def play(agent: Agent, games: Games, frames: int, *, seed: int) -> Sample:
    """Whole episodes with seeds that were never trained on; `frames` of their frames with a ball, drawn evenly.

    Raises RuntimeError when the emulator that tells where the ball is does not show what the games show.
    """
    rng = np.random.default_rng(seed)
    seeds = [evaluation_seed(seed, number) for number in range(2 * games.num_envs)]
    mirrors: list[Mirror | None] = [Mirror(games.env, games.config, seed) for seed in seeds[: games.num_envs]]
    player, candidates = Player(agent), 0
    kept: list[tuple[np.ndarray, Truth]] = []
    now, is_first = games.reset(seeds[: games.num_envs]), np.ones(games.num_envs, dtype=bool)
    while any(mirrors):
        actions = player.act(now, is_first)
        brought = games.step(actions)
        now, is_first = brought.frame, brought.done.copy()
        for row, mirror in enumerate(mirrors):
            if mirror is None:
                continue
            mirror.step(int(actions[row]))
            if not np.array_equal(mirror.frame(), now[row]):
                raise RuntimeError(f"row {row} of {games.env} does not show what the plain emulator shows")
            if truth := mirror.ball():
                candidates += 1
                _keep(kept, (now[row].copy(), truth), int(rng.integers(candidates)), frames)
            if brought.done[row]:
                mirrors[row] = None
        done = np.flatnonzero(brought.done).tolist()
        if done and any(mirrors):
            now = games.reset([seeds[games.num_envs + row] for row in done], done)  # plays on, but does not count
    if len(kept) < 2:
        raise UserError(f"The ball was hardly ever in play in {games.num_envs} episodes: there is nothing to measure.")
    return Sample(np.stack([frame for frame, _ in kept]), [truth for _, truth in kept], candidates)


def _keep(kept: list[tuple[np.ndarray, Truth]], entry: tuple[np.ndarray, Truth], place: int, most: int) -> None:
    """Reservoir sampling: with a random place among all so far, each entry is kept with the same probability."""
    if len(kept) < most:
        kept.append(entry)
    elif place < most:
        kept[place] = entry


@torch.inference_mode()
def reconstruct(model: WorldModel, frame: np.ndarray) -> np.ndarray:
    """What the latents keep of frames (M, C, H, W) uint8, each seen alone: the same shape, up to 255."""
    device = next(model.parameters()).device
    parts = [
        model.picture(model.start(to_unit(torch.from_numpy(part).to(device)).unsqueeze(1))).float().cpu()
        for part in np.array_split(frame, max(1, len(frame) // 100))
    ]
    return torch.cat(parts).mul(255).numpy()


def distances(frames: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Distance (M,) from each centre (M, 2) to the ball found in its frame; infinite where none is found."""
    places = [find_ball(frame) for frame in frames]
    return np.array([np.inf if p is None else np.linalg.norm(p - c) for p, c in zip(places, centre, strict=True)])


def judge(sample: Sample, shown: np.ndarray) -> dict[str, float | int | bool]:
    """Shares of the reconstructions with the ball where it is, and what the detector makes of pictures it should know.

    Controls: the detector on the real frames (must find the ball within 1 pixel), on the mean frame instead of every
    reconstruction (must not find it), and each reconstruction against another frame's ball (what chance is worth).
    """
    centre = sample.centre
    real, kept = distances(sample.frame, centre), distances(shown, centre)
    mean = np.broadcast_to(sample.frame.mean(0), sample.frame.shape)
    other = distances(shown, np.roll(centre, len(centre) // 2, 0))
    on_real, on_mean = share(real, 1.0), share(distances(mean, centre), NEAR)
    return {
        "frames": len(centre),
        "within_2px": share(kept, NEAR),
        "within_1px": share(kept, 1.0),
        "found": share(kept, np.finfo(float).max),
        "median_px": round(float(np.median(kept)), 3),
        "detector_real_within_1px": on_real,
        "detector_real_median_px": round(float(np.median(real)), 3),
        "control_mean_frame_within_2px": on_mean,
        "control_other_frame_within_2px": share(other, NEAR),
        "detector_valid": on_real >= 0.99 and on_mean <= 0.01,
    }


def share(distance: np.ndarray, limit: float) -> float:
    """The share of distances up to the limit."""
    return round(float((distance <= limit).mean()), 4)


def picture(sample: Sample, shown: np.ndarray, columns: int = 4) -> np.ndarray:
    """Examples (H, W, 3) uint8, each real | reconstruction | both marked; the upper half are the worst ones."""
    order = np.argsort(-distances(shown, sample.centre), kind="stable")
    half = min(EXAMPLES, len(order)) // 2
    ordinary = np.random.default_rng(0).permutation(order[half:])[:half]
    tiles = [_tile(sample.frame[i], shown[i], sample.centre[i]) for i in (*order[:half], *ordinary)]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)], 0)


def _tile(frame: np.ndarray, shown: np.ndarray, centre: np.ndarray) -> np.ndarray:
    real, kept = (
        part.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0).repeat(SCALE, 0).repeat(SCALE, 1)
        for part in (frame, shown)
    )
    marks, place = real // 3, find_ball(shown)
    cv2.circle(marks, _spot(centre), round(NEAR * SCALE), (255, 255, 255), 1)  # where it may be
    if place is not None:
        good = np.linalg.norm(place - centre) <= NEAR
        colour = (80, 255, 80) if good else (255, 80, 80)
        cv2.drawMarker(marks, _spot(place), colour, cv2.MARKER_CROSS, 3 * SCALE, 1)
    else:
        cv2.putText(marks, "none", (4, SCALE * 60), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 80, 80), 1)
    tile = np.concatenate([real, kept, marks], 1)
    tile[-2:] = tile[:, -2:] = 255
    return tile


def _spot(place: np.ndarray) -> tuple[int, int]:
    x, y = ((place + 0.5) * SCALE).round().astype(int).tolist()
    return x, y


def command(asked: ObjectsConfig) -> None:
    """Measures a run and prints what was found."""
    run = Run.open(asked.run)
    found = measure(run, device=choose_device(run.config.device))
    table = Table(title=f"the ball in {run.config.env}, {run.folder}, step {run.step:,}", show_header=False)
    for name, value in found.items():
        table.add_row(name, str(value))
    Console(highlight=False).print(table)
