"""A counting fake: every frame, action and reward says which episode and which step it belongs to."""

from __future__ import annotations

import numpy as np

from agent.replay import Replay
from envs.episode import Episode
from envs.games import Transition
from envs.spec import Spec

DISCRETE = Spec(frame=(1, 2, 2), action_size=7, discrete=True)
CONTINUOUS = Spec(frame=(3, 2, 2), action_size=2, discrete=False)


def frame(seed: int, t: int, spec: Spec = DISCRETE) -> np.ndarray:
    """The picture (C, 2, 2) of step `t` of the episode with that seed: both numbers in base 256."""
    picture = np.array([[seed // 256, seed % 256], [t // 256, t % 256]], np.uint8)
    return np.broadcast_to(picture, spec.frame).copy()


def read(picture: np.ndarray) -> tuple[int, int]:
    """The (seed, t) that a picture shows."""
    high_seed, low_seed, high_t, low_t = picture[0].reshape(4).tolist()
    return high_seed * 256 + low_seed, high_t * 256 + low_t


def action(seed: int, t: int, spec: Spec = DISCRETE) -> np.ndarray:
    """What is done on seeing step `t`."""
    if spec.discrete:
        return np.array((seed + 3 * t) % 7)
    return np.array([((seed + t) % 11) / 10, -(t % 5) / 4], np.float32)


def reward(seed: int, t: int) -> float:
    """What that action brings (exact in float32)."""
    return seed * 1000 + t + 0.5


def step(seed: int, t: int, done: bool, spec: Spec = DISCRETE) -> Transition:
    """What the action at step `t` brings: one row's values. A life is lost every third step; a time limit ends it."""
    brought, lost = np.float32(reward(seed, t)), t % 3 == 2 and not done
    return Transition(frame(seed, t + 1, spec), *map(np.asarray, (brought, 2 * brought, lost, done, done)))


def episode(seed: int, steps: int, spec: Spec = DISCRETE, weight: float = 1.0) -> Episode:
    """The whole episode, built without the code under test."""
    brought = [step(seed, t, t == steps - 1, spec) for t in range(steps)]
    return Episode(
        frame=np.stack([frame(seed, t, spec) for t in range(steps + 1)]),
        action=np.stack([action(seed, t, spec) for t in range(steps + 1)])[:steps],
        reward=np.array([one.reward for one in brought], np.float32),
        terminated=np.array([one.terminated for one in brought], bool),
        truncated=np.array([one.truncated for one in brought], bool),
        score=float(sum(one.score for one in brought)),
        seed=seed,
        weight=weight,
    )


def play(replay: Replay, row: int, seed: int, steps: int, *, finish: bool = True) -> None:
    """Plays `steps` of an episode in `row`; without `finish` it stays open."""
    spec = replay.spec
    replay.begin(row, frame=frame(seed, 0, spec), seed=seed)
    for t in range(steps):
        replay.add(row, action(seed, t, spec), step(seed, t, finish and t == steps - 1, spec))


def again(seed: int, actions: np.ndarray) -> Episode:
    """Plays an unfinished episode of the discrete fake once more."""
    n = len(actions)
    assert actions.tolist() == [int(action(seed, t)) for t in range(n)]
    whole = episode(seed, n + 1)
    steps = (whole.action[:n], whole.reward[:n], whole.terminated[:n], whole.truncated[:n])
    return Episode(whole.frame[: n + 1], *steps, score=float(2 * whole.reward[:n].sum(dtype=np.float64)), seed=seed)
