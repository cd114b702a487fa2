"""Atari games on ALE's C++ vector environment, meaning what their gymnasium id means."""

from __future__ import annotations

import os
from typing import Any

import ale_py
import gymnasium
import numpy as np
from ale_py import roms
from gymnasium.envs.registration import EnvSpec

from envs.games import GameConfig, Games, Played
from envs.gym import ATARI, find, make_env
from envs.spec import Spec

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else every emulator prints a banner
FRAMES = 108_000  # an episode, which ids without a limit have too: half an hour of play
DEFAULTS: dict[str, Any] = {  # what AtariEnv takes, of which ids need not give all
    "game": "pong", "mode": None, "difficulty": None, "obs_type": "rgb", "frameskip": 4,
    "repeat_action_probability": 0.25, "full_action_space": False, "continuous": False,
    "max_num_frames_per_episode": None,
}  # fmt: skip


def is_atari(found: EnvSpec, config: GameConfig) -> bool:
    """Says whether AtariGames can play this id just as it means.

    Not those with a random frame skip (Pong-v4), which have no fixed action repeat, nor what somebody has registered
    with a wrapper, a time limit, a mode or a difficulty: gymnasium's own way plays these.
    """
    if found.entry_point != ATARI:
        return False
    asked = means(found)
    plain = not found.additional_wrappers and found.max_episode_steps is None and asked.keys() <= DEFAULTS.keys()
    plain = plain and all(asked[name] == DEFAULTS[name] for name in ("obs_type", "mode", "difficulty", "continuous"))
    return plain and isinstance(config.action_repeat or asked["frameskip"], int)


def rom(env: str) -> str:
    """The name of the game in an Atari id's cartridge, as "pong"; "" for other ids."""
    found = gymnasium.registry.get(env.rpartition(":")[2])
    return str(means(found)["game"]) if found is not None and found.entry_point == ATARI else ""


def means(found: EnvSpec) -> dict[str, Any]:
    """The arguments of an Atari id, those that it leaves out included."""
    return DEFAULTS | found.kwargs


def timing(found: EnvSpec, config: GameConfig) -> tuple[int | tuple[int, int], float]:
    """Frames of an agent step and the probability of a repeated action: those of `config`, else of any game's id.

    An id that skips frames at random (Pong-v4) has the bounds of their number, (2, 5) for 2 to 4.
    """
    asked = means(found) if found.entry_point == ATARI else found.kwargs
    sticky = asked.get("repeat_action_probability", 0.0) if config.sticky is None else config.sticky
    return config.action_repeat or asked.get("frameskip", 1), float(sticky)


class AtariGames(Games):
    """N copies of an Atari game on as many threads of C++ as there are cores.

    Where an agent step lasts 2 or more emulator frames, the picture is the maximum of the last two: consoles draw some
    objects only in every other frame. `reset_mask` restarts single rows; the vector environment's own autoreset
    (NEXT_STEP) never comes to act, because `Games` refuses to step a row that is done.
    """

    def __init__(self, env: str, num_envs: int, *, config: GameConfig) -> None:
        super().__init__(env, num_envs, config=config)
        self._found = find(env, config.kwargs)
        asked = means(self._found)
        repeat, sticky = timing(self._found, config)
        assert isinstance(repeat, int)  # see is_atari
        noops = config.noops or 0
        self._settings: dict[str, Any] = {
            "game": asked["game"],
            "frameskip": repeat,
            "maxpool": repeat > 1,
            "repeat_action_probability": sticky,
            "noop_max": noops,
            "full_action_space": asked["full_action_space"],
            "max_num_frames_per_episode": asked["max_num_frames_per_episode"] or FRAMES,
            "stack_num": 1,
            "episodic_life": False,
            "reward_clipping": False,
            "use_fire_reset": False,
        }
        # More threads than cores are slower (5,200 instead of 7,900 steps/s with 16 rows on 2 cores).
        threads = min(num_envs, os.cpu_count() or 1)
        self._ale = self._open(num_envs, config.frame_size, gray=config.gray, threads=threads)
        self.action_names = tuple(action.name for action in self._ale.ale.get_action_set())
        self.spec = Spec(config.frame_shape, len(self.action_names), discrete=True)
        self.description = ", ".join(
            [
                f"{repeat} frames a step" if repeat > 1 else "1 frame a step (most skip: game.action_repeat=4)",
                f"sticky {sticky:g}",
                *([f"up to {noops} no-ops"] if noops else []),
                f"{len(self.action_names)} actions",
                config.picture,
            ]
        )
        self._lives = np.zeros(num_envs, dtype=np.int32)
        self._seeds = [0] * num_envs
        self._taken: list[list[int]] = [[] for _ in range(num_envs)]  # the current episode's actions, for render()
        self._shadow: _Shadow | None = None

    def _open(self, num_envs: int, size: tuple[int, int], *, gray: bool, threads: int) -> ale_py.AtariVectorEnv:
        height, width = size
        return ale_py.AtariVectorEnv(
            num_envs=num_envs, img_height=height, img_width=width, grayscale=gray, num_threads=threads, **self._settings
        )

    def _restart(self, rows: list[int], seeds: list[int]) -> np.ndarray:
        mask = np.zeros(self.num_envs, dtype=bool)
        mask[rows] = True
        by_row = dict(zip(rows, seeds, strict=True))
        options = None if mask.all() else {"reset_mask": mask}
        picture, info = self._ale.reset(seed=np.array([by_row[row] for row in sorted(by_row)]), options=options)
        for row, seed in by_row.items():
            self._seeds[row] = seed
            self._taken[row] = []
        self._lives = info["lives"].copy()
        return _channels_first(picture)

    def _play(self, actions: np.ndarray) -> Played:
        picture, score, game_over, truncated, info = self._ale.step(actions)
        for taken, action in zip(self._taken, actions.tolist(), strict=True):
            taken.append(action)
        # ALE's own life_loss_info would not tell a lost life from the end of the game.
        life_lost = info["lives"] < self._lives
        self._lives = info["lives"].copy()
        return Played(_channels_first(picture), score.astype(np.float32), game_over, life_lost, truncated)

    def render(self, row: int = 0) -> np.ndarray:
        """Returns the console's full picture, (210, 160, 3) uint8 in most games.

        The vector environment gives only the small picture, so a second emulator replays the row's episode at full
        size: the first call for an episode costs its length so far, each later one the steps since.
        """
        if self._shadow is None:
            self._shadow = _Shadow(self._open(1, _screen(self._settings["game"]), gray=False, threads=1))
        return self._shadow.follow(self._seeds[row], self._taken[row])

    @property
    def aspect(self) -> float:
        """Of a television, whose pixels were wider than high."""
        return 4 / 3

    def keys_to_action(self) -> dict[tuple[str, ...], Any] | None:
        """Returns ALE's own keys: w a s d to move, space to fire, e to wait."""
        single = make_env(self._found)
        try:
            keys: dict[tuple[str, ...], Any] = single.unwrapped.get_keys_to_action()  # type: ignore[attr-defined]
        finally:
            single.close()
        return keys

    def close(self) -> None:
        """Closes both vector environments; the emulators' threads end with this object."""
        self._ale.close()
        if self._shadow is not None:
            self._shadow.game.close()
            self._shadow = None


class _Shadow:
    """One emulator at full size that follows whichever episode it is asked for."""

    def __init__(self, game: ale_py.AtariVectorEnv) -> None:
        self.game = game
        self._episode: list[int] | None = None  # the very list of actions that is followed; a new episode has a new one
        self._played = 0
        self._picture = np.zeros(0, dtype=np.uint8)

    def follow(self, seed: int, actions: list[int]) -> np.ndarray:
        """Plays the actions not yet played and returns the picture (H, W, 3) uint8."""
        if self._episode is not actions:
            picture, _ = self.game.reset(seed=np.array([seed]))
            self._episode, self._played, self._picture = actions, 0, picture[0, 0]
        for action in actions[self._played :]:
            self._picture = self.game.step(np.array([action]))[0][0, 0]
        self._played = len(actions)
        return self._picture.copy()


def _screen(game: str) -> tuple[int, int]:
    """Returns the height and width of a game's own picture: not every cartridge shows 210 lines."""
    path = roms.get_rom_path(game)
    assert path is not None, game
    console = ale_py.ALEInterface()
    console.loadROM(path)
    height, width = console.getScreenDims()
    return height, width


def _channels_first(picture: np.ndarray) -> np.ndarray:
    if picture.ndim == 4:  # gray: the stack of one frame is the channel
        return picture
    return np.ascontiguousarray(picture[:, 0].transpose(0, 3, 1, 2))  # (N, 1, H, W, 3) -> (N, 3, H, W)
