"""The recipes by name, and configurations rebuilt from plain values.

A file in this folder registers its recipes with `@recipe`. One from elsewhere is named by its place, as gymnasium
names games: `recipe=MODULE:FUNCTION`, where Python finds the module (`PYTHONPATH`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from envs import settings
from envs.errors import UserError, nearest
from runs.config import BEFORE, OLD_NAMES, SIZES, Config
from runs.config_types import fill, keys, renamed

Recipe = Callable[[str], Config]
RECIPES: dict[str, Recipe] = {}


def recipe(function: Recipe) -> Recipe:
    """Registers a function that returns the complete configuration at a size, under its own name."""
    RECIPES[function.__name__] = function
    return function


def find(name: str) -> Recipe:
    """The recipe of this name, or the function at MODULE:FUNCTION.

    Raises:
        UserError: there is no such recipe, module or function.
    """
    if name == "ppo":  # what its runs are called; see runs/folder/ppo.py
        raise UserError("PPO learns without a world model: only python main.py ppo, curve and publish read its runs.")
    if ":" not in name:
        return RECIPES[choice("recipe", name, RECIPES)]
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError, TypeError) as problem:
        raise UserError(f"There is no recipe {name}: {problem}. Does PYTHONPATH name its folder?") from problem


def preset(recipe: str, size: str) -> Config:
    """The complete configuration of a recipe at a size.

    Raises:
        UserError: an unknown recipe or size.
    """
    made = find(recipe)(choice("size", size, SIZES))
    if not isinstance(made, Config):
        raise UserError(f"The recipe {recipe} returns no runs.config.Config.")
    return replace(made, recipe=recipe, size=size)  # the names by which it is found again


def from_dict(values: Mapping[str, Any]) -> Config:
    """The typed configuration from nested plain values, as config.json or the command line hold them.

    Raises:
        UserError: an unknown key, recipe or size, or a value of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError("A configuration is a group of keys, not one value.")
    recipe, size = (str(values.get(key, "")) for key in ("recipe", "size"))
    template = preset(recipe, size)
    return fill(template, renamed(values, OLD_NAMES, keys(template)))


def from_recorded(values: Mapping[str, Any]) -> Config:
    """`from_dict` of what a run or a packed model wrote down, with `BEFORE` for keys that did not exist then."""
    config = from_dict(values)
    unsaid: dict[str, Any] = {}
    for key, value in BEFORE.items():
        group, _, name = key.partition(".")
        if key in keys(config) and name not in values.get(group, {}):
            unsaid.setdefault(group, {})[name] = value
    config = fill(config, unsaid)
    settings.check(config)
    return config


def choice(key: str, word: Any, valid: Mapping[str, Any] | tuple[str, ...]) -> str:
    """The word itself when it is one of the valid ones; raises UserError with them otherwise."""
    if word in valid:
        return str(word)
    raise UserError(f'Unknown {key} "{word}": choose one of {", ".join(valid)}. {nearest(str(word), valid)}'.strip())


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
