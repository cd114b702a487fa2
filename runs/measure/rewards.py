"""How well a world model predicts rewards one step ahead: of the frozen games, and of those that its run has kept.

The first are held out, on the second it was trained. If it predicts the second far better its rewards are overfitted,
and whoever begins to learn in its dream gets rewards almost unrelated to the game's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agent.batch import cut
from agent.replay import held_out
from envs.episode import Episode
from runs.dreams import Loaded, usable_episodes
from world_model.interface import State, WorldModel, to_unit

SEGMENTS, PART = 384, 64  # in all, and side by side
SHOWN, TOLD = 12, 20  # frames of a segment that are only seen, and those whose reward is told
OWN = 16  # of the run's episodes, evenly over its life


def own_episodes(loaded: Loaded, held: bool = False) -> list[Episode]:
    """What the run was trained on, or what it `held` out, as far as it is still there: at most OWN episodes."""
    paths = loaded.run.episode_paths if loaded.run is not None else []
    share = loaded.config.replay.validation
    paths = [path for path in paths if path.stem.isdecimal() and held_out(int(path.stem), share) == held]
    chosen = np.linspace(0, len(paths) - 1, min(OWN, len(paths))).astype(int)
    found = usable_episodes([paths[i] for i in chosen], loaded.agent.world_model.spec)
    return [one for one in found if one.piece_of < 0 or held_out(one.piece_of, share) == held]


@torch.inference_mode()
def correlations(loaded: Loaded, played: Sequence[Episode]) -> dict[str, Any] | None:
    """Correlations with the real rewards, `seen` with the frame shown and `dreamed` without, and how many `events`.

    None where no game is long enough.
    """
    model, rng, length = loaded.agent.world_model, np.random.default_rng(0), SHOWN + TOLD
    long = [one for one in played if len(one) >= length]
    if not long:
        return None
    share = np.array([_places(one, length) for one in long], float)
    found = []
    for _ in range(0, SEGMENTS, PART):
        chosen = [long[i] for i in rng.choice(len(long), PART, p=share / share.sum())]
        starts = [int(rng.integers(_places(one, length))) for one in chosen]
        batch = cut(chosen, starts, length, spec=model.spec).to(loaded.agent.device)
        state = model.start(to_unit(batch.frame[:, :SHOWN]), batch.action[:, : SHOWN - 1])
        for t in range(SHOWN, length):
            state, rewards = one_step(model, state, batch.action[:, t - 1], to_unit(batch.frame[:, t]))
            found.append(torch.stack([*rewards, batch.reward[:, t - 1]]).double().cpu())
    dreamed, seen, real = torch.cat(found, 1)
    return {"dreamed": correlation(dreamed, real), "seen": correlation(seen, real), "events": int((real != 0).sum())}


def _places(episode: Episode, length: int) -> int:
    """Where in an episode a segment of so many frames can begin; its last one may be the game's last."""
    return len(episode) + 1 - length + 1


def one_step(model: WorldModel, state: State, action: Tensor, frame: Tensor) -> tuple[State, tuple[Tensor, Tensor]]:
    """The state in which the frame has been seen, and the reward (S,) of arriving there, dreamed and seen."""
    memory = model.advance(state, action)
    dreamed, _ = model.outcome(model.imagine(memory, 0))
    state = model.observe(memory, frame)
    return state, (dreamed, model.outcome(state)[0])


def correlation(one: Tensor, other: Tensor) -> float | None:
    """Pearson's; None where either never changes."""
    spread = one.std(unbiased=False) * other.std(unbiased=False)
    if not len(one) or float(spread) < 1e-9:
        return None
    return round(float(((one - one.mean()) * (other - other.mean())).mean() / spread), 4)
