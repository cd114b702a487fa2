"""Dreams as Stable-Baselines3 sees them. Needs Stable-Baselines3: pip install ".[sb3]"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from world_model.dream.envs import DreamVectorEnv


class DreamVecEnv(VecEnv):
    """A DreamVectorEnv as a Stable-Baselines3 VecEnv: every row learns from one forward pass of the world model."""

    def __init__(self, dream: DreamVectorEnv) -> None:
        self.dream = dream  # first, because the constructor asks for its render mode
        super().__init__(dream.num_envs, dream.single_observation_space, dream.single_action_space)
        self._chosen: np.ndarray | None = None

    def reset(self) -> np.ndarray:
        """Begins every row; of what `seed` was told only the first counts, for one reset."""
        frames, _ = self.dream.reset(seed=self._seeds[0])
        self._reset_seeds()
        return frames

    def step_async(self, actions: np.ndarray) -> None:
        self._chosen = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Frames, rewards, endings (either kind), and of each row that is over its last frame."""
        frames, reward, terminated, truncated, told = self.dream.step(self._chosen)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for row in np.flatnonzero(terminated | truncated):
            infos[row] = {"terminal_observation": told["final_obs"][row], "TimeLimit.truncated": bool(truncated[row])}
        return frames, reward.astype(np.float32), terminated | truncated, infos

    def close(self) -> None:
        self.dream.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.dream, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.dream, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [getattr(self.dream, method_name)(*args, **kwargs)] * self._count(indices)

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self._count(indices)

    def _count(self, indices: int | Sequence[int] | None) -> int:
        return len(list(self._get_indices(indices)))
