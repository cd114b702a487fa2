"""Recorded play from elsewhere: the data sets of Minari as episodes, for `init_replay=minari:NAME`.

Shapes: T steps, C H W frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.episode import Episode
from envs.errors import UserError, nearest
from envs.games import GameConfig, from_bounds
from envs.pictures import as_picture, framed, part_with_picture
from envs.spec import Spec

PREFIX = "minari:"


def open_minari(name: str) -> Any:
    """The data set of that name on this machine, downloaded when it is not there.

    Raises UserError when Minari is not installed, or knows no such data set.
    """
    try:
        import minari
    except ImportError as problem:
        raise UserError(f'init_replay={PREFIX}{name} needs Minari: pip install "minari[hdf5,hf]".') from problem
    try:
        return minari.load_dataset(name, download=True)
    except Exception as problem:  # of the network, of the file, of the name
        hint = nearest(name, minari.list_local_datasets())
        text = (str(problem).splitlines() or [type(problem).__name__])[0].rstrip(".")
        raise UserError(f"Minari has no data set {name}: {text}. {hint}".strip()) from problem


def episodes(name: str, spec: Spec, config: GameConfig) -> Iterator[Episode]:
    """Its episodes as this game's, frames resized as the game's are; a recorded step is taken as an agent's.

    Raises UserError for observations that are no pictures, and for other actions than the game's.
    """
    found = open_minari(name)
    picture = part_with_picture(found.observation_space)
    if picture is None:
        raise UserError(f"The observations of the data set {name} are no pictures: {found.observation_space}.")
    (key, part), space = picture, found.action_space
    discrete = isinstance(space, spaces.Discrete)
    count = int(space.n) if discrete else int(np.prod(space.shape or (0,)))
    if discrete != spec.discrete or count != spec.action_size or not (discrete or isinstance(space, spaces.Box)):
        wanted = f"{spec.action_size} {'choices' if spec.discrete else 'continuous values'}"
        raise UserError(f"The data set {name} has other actions than the game, {space} and not {wanted}.")
    for number, one in enumerate(found.iterate_episodes()):
        seen = one.observations if key is None else one.observations[key]
        frames = []
        for observed in seen:
            shown = as_picture(observed, part)
            if shown is None:
                raise UserError(f"An observation of episode {number} of the data set {name} is no picture.")
            frames.append(framed(shown, config.frame_size, gray=config.gray))
        taken = np.asarray(one.actions)
        if isinstance(space, spaces.Discrete):
            action = taken.astype(np.int64).reshape(-1) - int(space.start)
        else:
            action = from_bounds(taken.reshape(len(taken), -1), space.low.reshape(-1), space.high.reshape(-1))
        score = np.asarray(one.rewards, np.float32)
        reward = np.clip(score, -1, 1) if config.clip_rewards else score
        ended = np.asarray(one.terminations, bool)
        late = np.asarray(one.truncations, bool) & ~ended
        yield Episode(np.stack(frames), action, reward, ended, late, float(score.sum()), number)


def write(name: str, spec: Spec, config: GameConfig, folder: Path) -> Path:
    """Writes them as a folder of episodes, which it returns; raises UserError like `episodes`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, episode in enumerate(episodes(name, spec, config)):
        if len(episode):
            episode.save(folder / f"{number:06d}.npz")
    return folder
