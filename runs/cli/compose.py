"""The command line's `key=value` words: Hydra's syntax and composition, checked as a whole before anything is built.

Groups `recipe` and `size` pick one complete configuration (`preset/<recipe>-<size>`), `protocol` sets the keys of
a published protocol, and single keys come last: `recipe=reverie size=s protocol=atari100k game.sticky=0.25`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from envs import settings
from envs.errors import UserError
from envs.games import PROTOCOLS
from envs.make import make_games
from runs import build
from runs.config import OLD_NAMES, SIZES, Config
from runs.config_types import fill, keys, unknown_key
from runs.config_types import values as values_of
from runs.folder.files import file_name
from runs.folder.ppo import PpoConfig
from runs.folder.run import OUT, newest
from runs.folder.system import choose_device
from runs.recipes import RECIPES, choice, find, from_dict, preset


@runtime_checkable
class Checked(Protocol):
    """A configuration that can also say what does not go together."""

    def check(self) -> None: ...


Settings = TypeVar("Settings")
NAME = "run"  # of the root configuration in Hydra's store
GROUPS: dict[str, Sequence[str]] = {"size": SIZES, "protocol": tuple(PROTOCOLS)}  # and "recipe"
# What a protocol means beside the game. Atari 100k counts every step, so none is kept from training.
PROTOCOL_KEYS: dict[str, dict[str, Any]] = {"atari100k": {"steps": 100_000, "replay": {"validation": 0.0}}}
DEFAULT_RECIPE = "reverie"


def prepared(words: Sequence[str]) -> list[str]:
    """The words with old keys renamed, each of which is said, and the recipes they name in Hydra's ConfigStore."""
    named = {key: value for word in words for key, _, value in [word.partition("=")]}
    asked = named.get("recipe", DEFAULT_RECIPE)
    elsewhere = [word.strip("'\"") for word in asked.split(",") if ":" in word]
    here = [name for name in RECIPES if name in asked or "*" in asked]
    register(here + elsewhere or list(RECIPES))
    chosen = next(iter(elsewhere), asked)
    valid = keys(preset(chosen, SIZES[0])) if chosen in RECIPES or elsewhere else []
    # Hydra adds no key to a mapping that it knows to be empty, unless it is told to.
    words = [quoted(word) for word in words]
    return ["++" + word if word.startswith("game.kwargs=") else renamed(word, valid) for word in words]


def named(words: Sequence[str]) -> list[str]:
    """The words with `name=NAME` as what Hydra calls it: the folder runs/out/NAME of a new run.

    Raises UserError for a name that is a path, for one of several runs, and beside another folder.
    """
    names = [word.partition("=")[2].strip("'\"") for word in words if word.startswith("name=")]
    if not names:
        return list(words)
    if {"-m", "--multirun"} & set(words):
        raise UserError("name= is one run's: the folder of a sweep is hydra.sweep.dir=...")
    if any(word.startswith("hydra.run.dir=") for word in words):
        raise UserError("name= and hydra.run.dir= both say where the run lies: leave out one.")
    return [*(word for word in words if not word.startswith("name=")), f"hydra.run.dir={folder_of(names[-1])}"]


def folder_of(name: str) -> Path:
    """Where a new run of this name lies; raises UserError for a name that is a path."""
    if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
        raise UserError(f'name="{name}" is no name of a folder: hydra.run.dir=... takes any path.')
    return OUT / name


RUNS = ("run", "name", "init_replay", "beside", "out")  # keys whose values name runs or folders


def quoted(word: str) -> str:
    """A word as Hydra's grammar reads it: a value that it cannot read, such as a path with = or ü, is text.

    So is a run whose name looks like a number, 3e-4 or 2026_01_01.
    """
    key, equals, value = word.partition("=")
    if not equals or word.startswith("-"):
        return word
    known = _read(word)
    if known is not None and not (key in RUNS and isinstance(known.value(), int | float)):
        return word
    text = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ("\\" + found[2] if found[2] else ""), value)
    return whole if _read(whole := f'{key}="{text}"') is not None else word


def register(recipes: Sequence[str]) -> None:
    """Puts these recipes, at every size, into Hydra's ConfigStore instead of those that are there.

    No others: Hydra copies the whole store several times a start, and all recipes make that a second.
    """
    OmegaConf.register_new_resolver("folder", lambda text: file_name(str(text)), replace=True)
    store = ConfigStore.instance()
    store.repo.pop("preset", None)
    for recipe in (*RECIPES, *(name for name in recipes if ":" in name)):
        store.store(group="recipe", name=recipe, node={"recipe": recipe}, package="_global_")
    for recipe in recipes:
        for size in SIZES:
            store.store(group="preset", name=f"{recipe}-{size}", node=asdict(preset(recipe, size)), package="_global_")
    for size in SIZES:
        store.store(group="size", name=size, node={"size": size}, package="_global_")
    for word, game in PROTOCOLS.items():
        node = {"protocol": word, "game": game} | PROTOCOL_KEYS.get(word, {})
        store.store(group="protocol", name=word, node=node, package="_global_")
    store.store(name=NAME, node=_root())


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides of a command line; raises UserError for an unknown flag."""
    if "--" in words:
        _refuse("-- has no meaning here: write key=value words and flags as they are")
    parser = get_args_parser()
    # argparse would print its usage and leave.
    parser.error = _refuse  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(list(words))
    for name in ("config_path", "config_name", "config_dir", "experimental_rerun"):
        if getattr(flags, name) is not None:  # the last one would run what a pickle says
            _refuse(f"--{name.replace('_', '-')} has no meaning here: a recipe is chosen by recipe=NAME")
    if flags.resolve and not flags.cfg:
        _refuse("--resolve goes with --cfg job")
    if sum(map(bool, (flags.run, flags.multirun, flags.cfg, flags.info, flags.shell_completion))) > 1:
        _refuse("choose one of --run, --multirun, --cfg and --info")
    return flags


def in_order(flags: argparse.Namespace) -> list[str]:
    """The command line again, as Hydra's own parser understands it: flags first, each with its value."""
    if flags.hydra_help:
        return ["--hydra-help"]  # it takes nothing beside it
    alone = [f"--{name}" for name in ("run", "multirun", "resolve") if getattr(flags, name)]
    valued = [f"--{name}={value}" for name in ("cfg", "info", "package") if (value := getattr(flags, name)) is not None]
    return [*alone, *valued, *flags.overrides]


def check(words: Sequence[str], *, multirun: bool = False) -> list[Config]:
    """Every configuration that the overrides name: one, or with `multirun` each value of each sweep once.

    Raises:
        UserError: an unknown key, recipe, size, protocol or environment, or a value of a wrong type or out of range.
    """
    overrides = read(words)
    sweeps = [override for override in overrides if override.is_sweep_override()]
    if sweeps and not multirun:
        key = sweeps[0].get_key_element()
        raise UserError(f"{key} has several values, which is a sweep: add -m for one run each, or quote the comma.")
    # A value is checked beside the first value of the other sweeps: the sum of their lengths and not the product.
    first = {id(override): next(iter(_texts(override))) for override in sweeps}
    plain = [override.input_line or "" for override in overrides if override not in sweeps]
    lines = [plain + list(first.values())]
    for override in sweeps:
        others = plain + [text for other, text in first.items() if other != id(override)]
        lines += [[*others, text] for text in list(_texts(override))[1:]]
    found = [_compose(line) for line in lines]
    _check_read(found, [override.key_or_group for override in overrides])
    return found


def with_size(words: Sequence[str]) -> list[str]:
    """The overrides with the size that suits the device, when they name none: xs without a GPU, s with one."""
    given = {override.key_or_group: override for override in read(words)}
    if "size" in given:
        return list(words)
    device = given["device"].value() if "device" in given and not given["device"].is_sweep_override() else "auto"
    return [*words, f"size={'xs' if choose_device(str(device)) == 'cpu' else 's'}"]


def read(words: Sequence[str]) -> list[Override]:
    """The parsed overrides; raises UserError for one that is not `key=value`, unknown keys and unknown choices."""
    overrides = _parsed(words)
    chosen = {"recipe": DEFAULT_RECIPE, "size": SIZES[0]}
    for override in overrides:
        if override.key_or_group == "recipe":
            chosen["recipe"] = [text.split("=", 1)[1].strip("'\"") for text in _texts(override)][-1]
            find(chosen["recipe"])
        elif override.key_or_group in GROUPS:
            for text in _texts(override):
                chosen[override.key_or_group] = choice(
                    override.key_or_group, text.split("=", 1)[1], tuple(GROUPS[override.key_or_group])
                )
    valid = keys(preset(chosen["recipe"], chosen["size"]))
    for override in overrides:
        _check_key(override, valid)
    return overrides


def launch(task: Callable[[DictConfig], None]) -> None:
    """Runs `task` under Hydra, once or once for each combination of a sweep, in a run folder of its own."""
    # Errors are for our own caller to show; Hydra would print a part of the traceback and leave with code 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    GlobalHydra.instance().clear()

    # Hydra looks for configurations beside this function, which therefore must stand in a package.
    @hydra.main(version_base="1.3", config_path=None, config_name=NAME)
    def job(composed: DictConfig) -> None:
        task(composed)

    try:
        job()
    except HydraException as problem:  # of a flag of its own, such as a folder that is not there
        raise _hydra_refuses(problem) from problem


def new_folder(config: Config | PpoConfig) -> Path:
    """Where a run lies whose folder nobody named, as Hydra would name it."""
    words = (file_name(config.env), file_name(config.recipe), str(config.seed))
    return OUT / "-".join([*words, time.strftime("%Y%m%d-%H%M%S")])


def changed(config: Settings, words: Sequence[str], allowed: Sequence[str] | None = None) -> Settings:
    """A configuration with the overrides of all or of the allowed keys.

    Raises:
        UserError: a key that is unknown or that the run fixed for good, a value of a wrong type or out of range.
    """
    known = values_of(config)
    allowed = list(known) if allowed is None else allowed
    values: dict[str, Any] = {}
    overrides = _parsed(words)
    for override in overrides:
        key = override.key_or_group
        if key not in allowed:
            if key not in known:
                raise unknown_key(key, list(allowed))
            raise UserError(f"{key} was fixed when the run began: only {', '.join(allowed)} can be given here.")
        listed = isinstance(known[key], tuple)  # of whose values one, or several with commas, will do
        if override.is_sweep_override() and not (listed and override.is_choice_sweep()):
            raise UserError(f"{key} needs one value: a sweep (several values) is for train.")
        value: Any = override.value()
        if isinstance(value, ChoiceSweep):
            value = [item.text if isinstance(item, QuotedString) else item for item in value.list]
        elif listed and not isinstance(value, list):
            value = [value]
        at = values
        *groups, last = key.split(".")
        for group in groups:
            at = at.setdefault(group, {})
        at[last] = value
    config = fill(config, values)
    settings.check(config)
    if isinstance(config, Checked):
        config.check()
    _check_read([config], [override.key_or_group for override in overrides])
    return config


def renamed(word: str, valid: Sequence[str]) -> str:
    """A word under the name that its key has now; says so."""
    key, equals, value = word.partition("=")
    sign, bare = key[: len(key) - len(key.lstrip("+~"))], key.lstrip("+~")
    new = OLD_NAMES.get(bare, "")
    if bare in valid or new not in valid:
        return word
    print(f"{bare} is called {new} now.", file=sys.stderr)
    return sign + new + equals + value


def filled(command: str, template: Settings, words: Sequence[str]) -> Settings:
    """What a command reads, from its `key=value` words.

    Raises:
        UserError: an unknown or missing key, a value of a wrong type or out of range.
    """
    asked = changed(template, [renamed(word, keys(template)) for word in words])
    for key, value, rule in settings.walk(asked):
        if rule.required and not value:
            if key == "run":
                raise UserError(f"{command} needs one run=NAME. {newest()}".strip())
            raise UserError(f"{command} needs {key}=...: see python main.py {command} --help.")
    return asked


def _root() -> dict[str, Any]:
    name = "${folder:${env}}-${folder:${recipe}}-${seed}-${now:%Y%m%d-%H%M%S}"
    return {
        "defaults": [
            {"recipe": DEFAULT_RECIPE},
            {"size": "xs"},
            {"preset@_global_": "${recipe}-${size}"},
            {"protocol": "default"},
            {"override hydra/job_logging": "none"},
            {"override hydra/hydra_logging": "none"},
            "_self_",
        ],
        "hydra": {
            "run": {"dir": "runs/out/" + name},
            "sweep": {"dir": "runs/out", "subdir": name + "-${hydra.job.num}"},
            "output_subdir": None,
            "job": {"chdir": False},
        },
    }


def _compose(lines: Sequence[str]) -> Config:
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize(version_base="1.3", config_path=None):
            composed = hydra.compose(NAME, overrides=list(lines), return_hydra_config=True)
            values = {key: composed[key] for key in composed if key != "hydra"}
            config = from_dict(OmegaConf.to_container(OmegaConf.create(values), resolve=True))  # type: ignore[arg-type]
    except (HydraException, OmegaConfBaseException) as problem:
        raise _hydra_refuses(problem) from problem
    config.check()
    # Built once without memory or folder: what is wrong with the environment or the model is said before a run begins.
    games = make_games(config.env, config.game, 1)
    games.close()
    build.agent(config, games.spec, "meta").world_model.stages()
    if not any(line.startswith("hydra/launcher") for line in lines):  # which may have other machines
        choose_device(config.device)
    return config


def _hydra_refuses(problem: Exception) -> UserError:
    text = " ".join(str(problem).split("Config search path")[0].split())
    return UserError(f"Hydra refuses the command line: {text}")


def _parsed(words: Sequence[str]) -> list[Override]:
    overrides = []
    for word in words:
        override = _read(quoted(word))
        if override is None:
            shown = word if len(word) <= 80 else word[:80] + "..."
            bare = " A command stands before all keys." if word.isidentifier() else ""
            raise UserError(f'Cannot read "{shown}": write key=value, with quotes around special characters.{bare}')
        overrides.append(override)
    return overrides


def _read(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError, RecursionError):  # numbers of thousands of digits, deep nesting
        return None


def _texts(override: Override) -> Iterator[str]:
    """Each value of an override as `key=value`."""
    if override.is_discrete_sweep():
        key = override.get_key_element()
        yield from (f"{key}={text}" for text in override.sweep_string_iterator())
    else:
        yield override.input_line or ""


def _check_read(configs: Sequence[Any], typed: Sequence[str]) -> None:
    """Raises UserError for a key that somebody typed and that none of the configurations reads."""
    for key in typed:
        reasons = [settings.unread(config, key) for config in configs]
        if reasons[0] and all(reasons):
            raise UserError(reasons[0])


def _check_key(override: Override, valid: list[str]) -> None:
    key = override.key_or_group
    if key == "hydra.verbose" and not isinstance(override.value(), bool | str | list):
        raise UserError("hydra.verbose is true, false or a list of loggers.")
    if key.startswith("hydra.") or key.startswith("hydra/"):
        return
    if override.is_delete():
        raise UserError(f"{key} cannot be removed: every key has a value.")
    if key == "run":
        raise UserError("train starts a new run: to go on with one, use python main.py resume run=..., "
                        "and to name the new run, name=...")  # fmt: skip
    if key not in valid and not any(name.startswith(key + ".") for name in valid):
        raise unknown_key(key, valid)


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message[0].upper()}{message[1:]}. See python main.py --help.")
