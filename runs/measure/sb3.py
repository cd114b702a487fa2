"""Dreams and games as Stable-Baselines3 sees them. Needs Stable-Baselines3: pip install ".[sb3]"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecMonitor

from agent.seeds import episode_seed
from envs.games import Games
from world_model.dream.envs import DreamVectorEnv


class _Rows(VecEnv):
    """What steps all of its rows at once by itself, and has no wrappers."""

    def __init__(self, rows: Any, num: int, observation: spaces.Space[Any], action: spaces.Space[Any]) -> None:
        self.rows = rows  # first, because the constructor asks for its render mode
        super().__init__(num, observation, action)
        self._chosen = np.zeros(0)

    def step_async(self, actions: np.ndarray) -> None:
        self._chosen = actions

    def close(self) -> None:
        self.rows.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.rows, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.rows, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [getattr(self.rows, method_name)(*args, **kwargs)] * self._count(indices)

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self._count(indices)

    def _count(self, indices: int | Sequence[int] | None) -> int:
        return len(list(self._get_indices(indices)))


class DreamVecEnv(_Rows):
    """A DreamVectorEnv as a Stable-Baselines3 VecEnv: every row learns from one forward pass of the world model.

    Raises ValueError for one that does not begin anew in the same step, as Stable-Baselines3 wants it.
    """

    def __init__(self, dream: DreamVectorEnv) -> None:
        if dream.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"the dreams must have autoreset_mode=SAME_STEP, not {dream.autoreset_mode.name}")
        self.dream = dream
        super().__init__(dream, dream.num_envs, dream.single_observation_space, dream.single_action_space)

    def reset(self) -> np.ndarray:
        """Begins every row; of what `seed` and `set_options` were told only the first counts, for one reset."""
        frames, _ = self.dream.reset(seed=self._seeds[0], options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        return frames

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Observations, rewards, endings (either kind), and of each row that is over its last observation."""
        frames, reward, terminated, truncated, told = self.dream.step(self._chosen)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for row in np.flatnonzero(terminated | truncated):
            infos[row] = {"terminal_observation": told["final_obs"][row], "TimeLimit.truncated": bool(truncated[row])}
        return frames, reward.astype(np.float32), terminated | truncated, infos


def monitored(dream: DreamVectorEnv, stack: int) -> VecEnv:
    """Dreams as Stable-Baselines3's agents learn in them: monitored, and `stack` observations deep."""
    rows = VecMonitor(DreamVecEnv(dream))
    return VecFrameStack(rows, stack) if stack > 1 else rows


class FrameStack(VecFrameStack):
    """Stacks the frames of a whole game, as it is played afterwards: those before a lost life are not taken away."""

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        frames, reward, done, infos = self.venv.step_wait()
        over = np.array(["episode" in info for info in infos])
        frames, infos = self.stacked_obs.update(frames, over, infos)
        return frames, reward, done, infos


class GamesVecEnv(_Rows):
    """N real games as a Stable-Baselines3 VecEnv; continuous actions are in [-1, 1].

    An ending that `Games` tells the learner (with life_loss every lost life) ends what Stable-Baselines3 takes for an
    episode; only where the game is over a row is reset, and `info["episode"]` then tells the whole game: its return "r"
    in the game's units and its length "l".

    Attributes:
        begun: episodes so far, which number the seeds.
    """

    def __init__(self, games: Games, seed: int, begun: int = 0) -> None:
        self.games, self.begun, self._seed = games, begun, seed
        frames, count = spaces.Box(0, 255, games.spec.frame, np.uint8), games.spec.action_size
        actions = spaces.Discrete(count) if games.spec.discrete else spaces.Box(-1, 1, (count,), np.float32)
        super().__init__(games, games.num_envs, frames, actions)
        self._score, self._length = np.zeros(games.num_envs), np.zeros(games.num_envs, np.int64)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Games have no render mode, for which the constructor asks."""
        return [None] * self._count(indices) if attr_name == "render_mode" else super().get_attr(attr_name, indices)

    def reset(self) -> np.ndarray:
        """Begins every row."""
        return self._begin(list(range(self.num_envs)))

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Frames, rewards, endings (either kind), and of each row that is over its last frame."""
        brought = self.games.step(self._chosen)
        self._score += brought.score
        self._length += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        over = brought.terminated | brought.truncated
        for row in np.flatnonzero(over).tolist():
            cut = bool(brought.truncated[row] and not brought.terminated[row])
            infos[row] = {"terminal_observation": brought.frame[row], "TimeLimit.truncated": cut}
        done = np.flatnonzero(brought.done).tolist()
        for row in done:
            infos[row]["episode"] = {"r": float(self._score[row]), "l": int(self._length[row])}
        frames = self._begin(done) if done else brought.frame
        return frames, brought.reward, over, infos

    def _begin(self, rows: list[int]) -> np.ndarray:
        self._score[rows], self._length[rows] = 0, 0
        seeds = [episode_seed(self._seed, self.begun + i) for i in range(len(rows))]
        self.begun += len(rows)
        return self.games.reset(seeds, rows)
