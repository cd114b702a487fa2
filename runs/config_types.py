"""Frozen dataclasses filled from plain values: every key and type is checked, every error is a sentence."""

from __future__ import annotations

import sys
import types
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from envs.errors import UserError, nearest
from envs.settings import walk

Config = TypeVar("Config")

SHORT = {int: "int", float: "float", bool: "bool", str: "str", type(None): "null"}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def fill(template: Config, given: Mapping[str, Any], *, prefix: str = "") -> Config:
    """A copy of a dataclass with the given (nested) values; what is not given stays.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one that the dataclass itself refuses.
    """
    types_of = get_type_hints(type(template))
    changed: dict[str, Any] = {}
    for name, value in given.items():
        key = prefix + name
        if name not in types_of:
            raise unknown_key(key, [prefix + valid for valid in keys(template)])
        current = getattr(template, name)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UserError(f"{key} is a group of keys ({', '.join(keys(current))}), not one value.")
            changed[name] = fill(current, value, prefix=key + ".")
        else:
            changed[name] = checked(key, value, types_of[name])
    try:
        return replace(template, **changed)  # type: ignore[type-var]
    except UserError:
        raise
    except ValueError as problem:  # from a __post_init__
        raise UserError(f"{prefix.rstrip('.') or 'The configuration'}: {problem}") from problem


def keys(template: object) -> list[str]:
    """Every dotted key of a dataclass, the groups themselves left out."""
    return list(values(template))


def values(template: object) -> dict[str, Any]:
    """Every dotted key of a dataclass with its value."""
    return {key: value for key, value, _ in walk(template)}


def renamed(given: Mapping[str, Any], old_names: Mapping[str, str], valid: Collection[str]) -> dict[str, Any]:
    """Nested values with old keys under the names they have now, where those are valid and the old ones are not."""
    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    for old, new in old_names.items():
        *groups, last = old.split(".")
        at: Any = values
        for group in groups:
            at = at.get(group) if isinstance(at, dict) else None
        if isinstance(at, dict) and last in at and old not in valid and new in valid:
            at.setdefault(new.split(".")[-1], at.pop(last))  # a rename stays within its group
    return values


# What other programs (DreamerV3, Stable-Baselines3, Gymnasium, ALE) call our keys.
ELSEWHERE = {
    "ent_coef": "policy.entropy", "actent": "policy.entropy", "gae_lambda": "policy.lam", "lambda": "policy.lam",
    "discount": "policy.gamma", "clip_range": "policy.clip_ratio", "n_epochs": "policy.epochs",
    "max_grad_norm": "policy.clip model.clip", "grad_clip": "policy.clip model.clip",
    "learning_rate": "model.lr policy.actor_lr", "learning_starts": "train.prefill", "total_timesteps": "steps",
    "timesteps": "steps", "train_ratio": "train.steps_per_round", "batch_length": "model.length",
    "seq_len": "model.length model.context_frames", "sequence_length": "model.length model.context_frames",
    "stoch": "model.groups", "imag_length": "policy.horizon", "imag_horizon": "policy.horizon",
    "imagination_horizon": "policy.horizon", "buffer_size": "replay.memory_gb", "replay_size": "replay.memory_gb",
    "frame_skip": "game.action_repeat", "frameskip": "game.action_repeat", "repeat": "game.action_repeat",
    "repeat_action_probability": "game.sticky", "sticky_actions": "game.sticky", "noop_max": "game.noops",
    "terminal_on_life_loss": "game.life_loss", "episodic_life": "game.life_loss", "grayscale": "game.gray",
    "grayscale_obs": "game.gray", "screen_size": "game.size", "img_size": "game.size", "n_envs": "game.num_envs",
    "max_episode_steps": "game.max_steps", "clip_reward": "game.clip_rewards", "env_id": "env", "task": "env",
    "game_id": "env", "n_eval_episodes": "episodes", "run_name": "name",
}  # fmt: skip


def unknown_key(key: str, valid: list[str]) -> UserError:
    """The error for a key that does not exist, with the nearest that does."""
    group, _, last = key.rpartition(".")
    same = [name for name in valid if name.rsplit(".")[-1] == last]  # right word, wrong group
    beside = [name for name in valid if group and name.startswith(group + ".")]  # wrong word, right group
    ends = [name for name in beside if name.endswith("_" + last)]
    near = ends or same or [name for name in ELSEWHERE.get(last.lower(), "").split() if name in valid]
    hint = f"Did you mean {' or '.join(near)}?" if near else nearest(key, valid) or nearest(last, valid)
    return UserError(f'Unknown key "{key}". {hint or "The keys are " + ", ".join(sorted(valid)) + "."}')


def checked(key: str, value: Any, kind: Any) -> Any:
    """The value as the annotated type, where that loses nothing (1e6 is a whole number, 1 is a number).

    Raises:
        UserError: it is of another type.
    """
    if kind is Any:
        return value
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        words = [str(choice) for choice in get_args(kind)]
        raise UserError(f'{key} is one of {", ".join(words)}, not "{value}". {nearest(str(value), words)}'.strip())
    choices = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for choice in choices:
        done, result = _convert(key, value, choice)
        if done:
            return result
    wanted = " or ".join(typed(choice) for choice in choices)
    raise UserError(f"{key} needs {wanted}, not {_shown(value)}.")


def _convert(key: str, value: Any, kind: Any) -> tuple[bool, Any]:
    """(fits, the value as this type)."""
    if kind is type(None) or kind is bool:
        return isinstance(value, kind), value
    if kind is int:
        whole = type(value) is int or (isinstance(value, float) and value.is_integer())
        return whole, int(value) if whole else None
    if kind is float:
        fits = isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)
        return fits, float(value) if fits else None
    if kind is str:
        fits = isinstance(value, str | int | float)  # Hydra reads device=0 as a number
        return fits, str(value)
    if get_origin(kind) is dict:
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else None
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        parts = get_args(kind)
        inner = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(inner) == len(value):
            return True, tuple(checked(f"{key}[{i}]", item, inner[i]) for i, item in enumerate(value))
    return False, None


def typed(kind: Any, words: Mapping[Any, str] = WORDS) -> str:
    """A type as a person calls it: "a whole number or null", "one of frame, tokens"; by `SHORT` "int or null"."""
    if get_origin(kind) is tuple:
        parts = ("..." if part is Ellipsis else typed(part, words) for part in get_args(kind))
        return f"a list like [{', '.join(parts)}]"
    if get_origin(kind) is dict:
        return "a mapping like {name: value}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(typed(part, words) for part in get_args(kind))
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 200 else f'"{value[:200]}..."'
    if type(value) is int and abs(value) > sys.float_info.max:
        return "one of hundreds of digits"  # which Python may refuse to print
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
