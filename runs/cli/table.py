"""A row of the table of commands, and what `--help` says of all of them. Imports nothing that takes time."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

RECIPE, RUN = "recipe", "run"
ABOUT = """\
python main.py [command] key=value ...        learn a game inside a dream of it
"""
EXAMPLES = """\
python main.py COMMAND --help                 its keys, each with type, default, range and a line of help
python main.py --shell-completion bash        completion for bash, zsh or fish

examples
  python main.py env=ALE/Breakout-v5 seed=1 name=breakout
  python main.py -m env=ALE/Pong-v5,ALE/Breakout-v5 seed=0,1,2
  python main.py recipe=iris env=ALE/Pong-v5 protocol=atari100k
  python main.py resume run=NAME
  python main.py play                           the Pong that ships
  python main.py play record=dream.mp4 steps=600 player=agent
  python main.py --cfg job size=s               show the configuration, run nothing"""


GROUPS = {  # of the commands
    "runs": ("train", "resume", "evaluate", "atari100k"),
    "dreams": ("play", "export", "import", "pack"),
    "to look at": ("check", "info", "curve"),
    "to measure": ("benchmark", "fidelity", "suite", "dream_ppo", "ppo", "long_rollout", "objects", "probe", "clock",
                   "precision", "page"),
    "to publish": ("publish", "leaderboard", "docs"),
}  # fmt: skip


class Command(NamedTuple):
    """What a command says of itself, what does it, and what it reads."""

    help: str
    function: str  # "module:function", imported when the command runs; it gets what was read
    # "module:Dataclass"; RECIPE: the configuration of a new run; RUN: an existing run, some of whose keys change.
    reads: str
    example: str = ""  # words after its name
    passes_on: bool = False  # words that it does not know itself are train's


def load(place: str) -> Any:
    """What stands at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def overview(commands: Mapping[str, Command]) -> str:
    """Every command in a line, by what it is for."""
    width, lines = max(map(len, commands)) + 2, list[str]()
    for group, names in GROUPS.items():
        lines += ["", group, *(f"  {name:{width}}{commands[name].help}" for name in names)]
    return "\n".join([ABOUT.rstrip(), *lines, "", EXAMPLES])
