"""The games: any gymnasium id with pictures, Atari in C++, and the tiny games that tests play."""

from __future__ import annotations

import ale_py
import gymnasium

from envs import tiny
from envs.errors import UserError, nearest
from envs.games import PROTOCOLS, GameConfig, Games, Transition
from envs.spec import Spec

gymnasium.register_envs(ale_py)
tiny.register()

__all__ = ["PROTOCOLS", "GameConfig", "Games", "Spec", "Transition", "UserError", "nearest"]
