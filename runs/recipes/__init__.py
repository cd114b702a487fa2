"""The recipes by name, and configurations rebuilt from plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from envs.errors import UserError, nearest
from runs.config import SIZES, Config
from runs.config_types import fill
from runs.recipes.iris import iris, iris_ac
from runs.recipes.reverie import reverie
from runs.recipes.world_models import world_models, world_models_ac

RECIPES: dict[str, Callable[[str], Config]] = {
    "reverie": reverie, "world_models": world_models, "world_models_ac": world_models_ac,
    "iris": iris, "iris_ac": iris_ac,
}  # fmt: skip


def preset(recipe: str, size: str) -> Config:
    """The complete configuration of a recipe at a size.

    Raises:
        UserError: an unknown recipe or size.
    """
    return RECIPES[choice("recipe", recipe, RECIPES)](choice("size", size, SIZES))


def from_dict(values: Mapping[str, Any]) -> Config:
    """The typed configuration from nested plain values, as config.json or the command line hold them.

    Raises:
        UserError: an unknown key, recipe or size, or a value of a wrong type.
    """
    recipe, size = (str(values.get(key, "")) for key in ("recipe", "size"))
    return fill(preset(recipe, size), values)


def choice(key: str, word: Any, valid: Mapping[str, Any] | tuple[str, ...]) -> str:
    """The word itself when it is one of the valid ones; raises UserError with them otherwise."""
    if word in valid:
        return str(word)
    raise UserError(f'Unknown {key} "{word}": choose one of {", ".join(valid)}. {nearest(str(word), valid)}'.strip())
