"""The command `fidelity`: how far ahead a model of discrete latents sees, on held-out games.

From real contexts the model dreams on under the real actions; then its tokens (or one-hot variables) are compared with
those of the real frames. In Pong also the ball's place. Writes results/fidelity.json in the run's folder.

Shapes: S contexts, T frames, N tokens or variables of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from agent.collector import Collector
from agent.evaluate import EVALUATION_SEED
from agent.player import Agent, Player
from agent.replay import Replay
from agent.replay_config import ReplayConfig
from envs.errors import UserError
from envs.games import Games
from envs.make import make_games
from envs.settings import setting
from runs import build
from runs.folder.progress import as_table
from runs.folder.run import Run
from runs.folder.system import choose_device
from runs.measure.objects import NEAR
from runs.measure.pong import SIZE, find_ball
from world_model.interface import Batch, WorldModel, to_unit

EPISODES, CONTEXTS, PART = 8, 512, 64
AHEAD = (1, 5, 10)  # steps


@dataclass(frozen=True)
class FidelityConfig:
    """What `python main.py fidelity` takes."""

    run: str = setting("", required=True, help="a run's folder or name")
    temperature: float = setting(0.0, 0, 100, help="of the dream; 0 takes the most likely codes")


def measure(run: Run, *, contexts: int = CONTEXTS, temperature: float = 0.0, device: str = "cpu") -> dict[str, Any]:
    """Plays held-out episodes with the newest checkpoint and looks ahead from frames drawn evenly among them.

    Raises UserError for latents of real numbers, whose tokens cannot be compared.
    """
    config = run.config
    games = make_games(config.env, config.game, EPISODES)
    try:
        agent = build.agent(config, games.spec, device)
        agent.load_state_dict(run.load_checkpoint(device)["agent"])
        codes(agent.world_model, agent.world_model.start(torch.zeros(1, 1, *games.spec.frame, device=device)).latent)
        batch = play(agent, games, contexts, config.train.burn_in + 1 + AHEAD[-1], seed=config.seed)
    finally:
        games.close()
    torch.manual_seed(config.seed)
    pong = "pong" in config.env.lower() and games.spec.frame == (3, SIZE, SIZE)
    rows = judge(agent.world_model, batch, config.train.burn_in + 1, temperature, ball=pong)
    command = f"python main.py fidelity run={run.folder}"
    found = {"command": command, "contexts": contexts, "temperature": temperature, "rows": rows}
    run.result("fidelity", found)
    return found


def play(agent: Agent, games: Games, count: int, length: int, *, seed: int) -> Batch:
    """`count` segments of `length` frames, from episodes with seeds that were never trained on."""
    held_out = Replay(None, games.spec, ReplayConfig(validation=0.0), seed=seed)
    collector = Collector(games, held_out, Player(agent), seed=seed + EVALUATION_SEED)
    while held_out.episodes < EPISODES:
        collector.collect(games.num)
    return held_out.sample(count, length)


@torch.inference_mode()
def judge(model: WorldModel, batch: Batch, context: int, temperature: float, *, ball: bool) -> list[dict[str, Any]]:
    """One row for each number of steps ahead, over the segments in which the game goes on throughout.

    `changed` are the codes that differ from those of the last frame seen; `still` is what predicting no change at all
    would reach.
    """
    whole = batch.has_action[:, :-1].all(1)
    batch = batch.rows(whole).to(next(model.parameters()).device)
    found: dict[int, list[dict[str, Tensor]]] = {ahead: [] for ahead in AHEAD}
    for begin in range(0, len(batch.frame), PART):
        frame, action = batch.frame[begin : begin + PART], batch.action[begin : begin + PART]
        state = model.start(to_unit(frame[:, :context]), action[:, : context - 1])
        followed, seen = state, codes(model, state.latent)
        for ahead in range(1, AHEAD[-1] + 1):
            now = context + ahead - 1
            state = model.step(state, action[:, now - 1], temperature=temperature).state
            followed = model.step(followed, action[:, now - 1], to_unit(frame[:, now])).state
            if ahead in AHEAD:
                real, dreamed = codes(model, followed.latent), codes(model, state.latent)
                part = {"right": dreamed == real, "moved": seen != real}
                if ball:
                    part |= _balls(frame[:, now], model.picture(state))
                found[ahead].append(part)
    return [_row(ahead, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
            for ahead, parts in found.items()]  # fmt: skip


def codes(model: WorldModel, latent: Tensor) -> Tensor:
    """Latents (S, ...) as whole numbers (S, N): tokens as they are, one-hot variables by their class."""
    if not latent.is_floating_point():
        return latent.flatten(1)
    if len(model.latent_shape) != 2:
        raise UserError("Only discrete latents can be compared token by token, and this recipe's are real numbers.")
    return latent.argmax(-1)


def _balls(real: Tensor, dreamed: Tensor) -> dict[str, Tensor]:
    """Whether the real frames (S, C, H, W) show a ball, and whether the dreamed one is near it."""
    there, near = [], []
    for one, other in zip(real.cpu().numpy(), (dreamed.float().cpu() * 255).numpy(), strict=True):
        place, dream = find_ball(one.astype(np.float64)), find_ball(other.astype(np.float64))
        there.append(place is not None)
        near.append(place is not None and dream is not None and float(np.linalg.norm(place - dream)) <= NEAR)
    return {"there": torch.tensor(there), "near": torch.tensor(near)}


def _row(ahead: int, told: dict[str, Tensor]) -> dict[str, Any]:
    right, moved = told["right"].float(), told["moved"].float()
    row = {
        "steps_ahead": ahead,
        "contexts": len(right),
        "accuracy": round(float(right.mean()), 4),
        "accuracy_still": round(float((1 - moved).mean()), 4),
        "accuracy_changed": round(float((right * moved).sum() / moved.sum().clamp(min=1)), 4),
        "changed": round(float(moved.mean()), 4),
    }
    if "near" in told:
        row |= {"ball_frames": int(told["there"].sum())}
        row |= {"ball_within_2px": round(float(told["near"].sum() / told["there"].sum().clamp(min=1)), 4)}
    return row


def command(asked: FidelityConfig) -> None:
    """Measures a run and prints what was found."""
    run = Run.open(asked.run)
    found = measure(run, temperature=asked.temperature, device=choose_device(run.config.device))
    title = f"{run.config.recipe} on {run.config.env}, {run.folder}, step {run.step:,}"
    Console(highlight=False).print(as_table(title, found["rows"]))
