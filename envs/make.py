"""The games of a gymnasium id: the one place that knows which engine plays it."""

from __future__ import annotations

from envs.atari import AtariGames, is_atari, timing
from envs.car_racing import CarRacingGames, is_car_racing
from envs.games import GameConfig, Games
from envs.gym import GymGames, find


def make_games(env: str, config: GameConfig, num_envs: int | None = None) -> Games:
    """`num_envs` copies (`config.num_envs` when None) of the gymnasium id `env`.

    Raises UserError for an unknown id, a game without pictures, or a setting out of range.
    """
    config.check()
    found = find(env, config.kwargs)
    kind = AtariGames if is_atari(found, config) else CarRacingGames if is_car_racing(found) else GymGames
    return kind(env, config.num_envs if num_envs is None else num_envs, config=config)


def timing_of(env: str, config: GameConfig) -> dict[str, int | tuple[int, int] | float]:
    """`action_repeat` and `sticky` as the game is played, where the settings leave them to the gymnasium id.

    Raises UserError for an unknown id.
    """
    repeat, sticky = timing(find(env, config.kwargs), config)
    return {"action_repeat": repeat, "sticky": sticky}
