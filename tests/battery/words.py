"""Command lines at random, and values that no key takes.

The program is called in this process with its work taken out: what is tried is how words are read, checked and refused.
"""

from __future__ import annotations

import contextlib
import io
import random
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import main
from envs.settings import walk
from runs.cli import commands, table, train
from runs.cli.compose import register
from runs.cli.exit_codes import guarded
from runs.config_types import values
from runs.recipes import RECIPES, preset
from tests.battery.report import Report

RECIPE = "reverie"
WHOLE = 50  # command lines that a process of its own runs to its end
FLAGS = [
    "--help",
    "-h",
    "-m",
    "--cfg",
    "job",
    "--cfg=job",
    "--info",
    "-c",
    "--version",
    "-x",
    "--",
    "--multirun",
    "-cd",
]
FLAGS += ["--config-dir=/nowhere", "--hydra-help", "-cn", "--resolve", "-p", "--shell-completion", "bash", "-sc"]
BROKEN = [
    "", "=", "a=", "=b", "a==b", "a=[1", "a={x:1", "+a=1", "~model", "++model.lr=x", "model@=3", "hydra.verbose={}",
    "'", '"', "\\", "a='b", "ü=ö", "model=", "model.=1", ".=1", "${x}", "a=${nothing}", "env=${env}", "a\tb=1", "a=\n",
    "a,b=1", "x" * 5_000, "9" * 400, "model.lr=" + "9" * 400, "run=" + "n" * 300, "hydra.run.dir=", "run=.", "run=/",
    "hydra.run.dir=/dev/null/x", "recipe=", "recipe=nothing:here", "recipe=../x", "size=huge", "env=nowhere:Game-v0",
    "protocol=none", "env=Pong", "env=", "game.kwargs={", "game.kwargs={a:1}", "steps=1_000", "init_replay=nowhere",
    "seed=18446744073709551616",
]  # fmt: skip
ABSURD = ["nan", "inf", "-inf", "1e400", "-1e400", "9" * 300, "-" + "9" * 300, "x", "[]", "{}", "[1,2]", "{a:1}", "''"]


@dataclass
class Outcome:
    """What a command line came to."""

    code: int | None
    error: str  # what it wrote to standard error
    crash: str  # a traceback, or ""
    taken: list[Any]  # what its work would have been called with


@contextlib.contextmanager
def _idle(taken: list[Any]) -> Iterator[None]:
    """Commands are read, checked and opened as ever; what they would do is only noted."""
    load, functions = table.load, {row.function for row in main.COMMANDS.values()} - {"runs.cli.commands:info"}
    before = {name: getattr(commands, name) for name in ("resume", "evaluate")}

    def loaded(place: str) -> Any:
        if place == "runs.cli.train:train":
            return lambda words: train.train(words, partial(_noted, taken))
        found = load(place)
        return (lambda *given: taken.append(given)) if place in functions else found

    main.load = loaded
    for name in before:
        setattr(commands, name, lambda *given: taken.append(given))
    try:
        yield
    finally:
        main.load = load
        for name, function in before.items():
            setattr(commands, name, function)


def _noted(taken: list[Any], composed: object) -> None:
    """In the place of a run: its configuration is noted, and what cannot be one ends the program as a run would."""
    if code := guarded(lambda: taken.append(train.composed(composed)[0])):
        raise SystemExit(code)


def outcome(words: Sequence[str]) -> Outcome:
    """Calls the program with these words."""
    told, taken, crash, code = io.StringIO(), list[Any](), "", None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told), _idle(taken):
        try:
            code = main.main(list(words))
        except BaseException:  # whatever leaves the program is a finding
            crash = traceback.format_exc()
    return Outcome(code, told.getvalue(), crash, taken)


def lines(count: int, seed: int, report: Report) -> dict[str, Any]:
    """`count` command lines at random, the first WHOLE of them by a process each as well."""
    rng, codes = random.Random(seed), Counter[str]()
    register([RECIPE])
    known = values(preset(RECIPE, "toy"))
    for number in report.track(range(count), "command lines"):
        words = _line(rng, known)
        found = outcome(words)
        codes[str(found.code)] += 1
        if found.crash or found.code not in (0, 2):
            report.fault("traceback", words, found.crash or f"exit code {found.code}")
        elif found.code == 2 and len(found.error.strip().splitlines()) > 1 + _notes(found.error):
            report.fault("more than a sentence", words, found.error)
        elif wrong := _unlike(words, found.taken):
            report.fault("silently wrong", words, wrong)
        if number < WHOLE:
            _whole(words, found, report)
    return {"command_lines": count, "by_a_process_each": min(count, WHOLE), "exit_codes": dict(codes)}


def _line(rng: random.Random, known: dict[str, Any]) -> list[str]:
    name = rng.choice([*main.COMMANDS, "train", "train", "resume", "evaluate", "trian", "Train", "déjà", "-"])
    pool = [f"{key}={_value(rng, known[key])}" for key in rng.sample(list(known), 4)]
    pool += [f"{_misspelt(rng, key)}={known[key]}" for key in rng.sample(list(known), 1)]
    pool += rng.sample(BROKEN, 2) + rng.sample(FLAGS, 1) + [f"run={rng.choice(['toy', 'toi', '.', ''])}", "size=toy"]
    pool += [f"env={rng.choice(['Catch-v0', 'ALE/Pong-v5', 'Ctach-v0', 'CartPole-v1'])}"]
    words = rng.sample(pool, rng.randrange(5))
    return words if rng.random() < 0.3 else [name, *words]


def _value(rng: random.Random, now: Any) -> Any:
    choices = [now, now, rng.choice(ABSURD), rng.randrange(-5, 5), rng.random(), f"{now},{now}", "true", "null"]
    return rng.choice(choices)


def _misspelt(rng: random.Random, key: str) -> str:
    at = rng.randrange(len(key))
    return key[:at] + rng.choice("xyz._") + key[at + rng.randrange(2) :]


def _notes(text: str) -> int:
    """Lines beside the sentence: of a key that has a new name, and which runs of a sweep it was about."""
    return text.count("is called") + text.count("Of the sweep")


def _unlike(words: Sequence[str], taken: list[Any]) -> str:
    """Where one configuration was made of the words: a key that is not what was asked for."""
    if len(taken) != 1 or not hasattr(taken[0], "recipe"):
        return ""
    made = values(taken[0])
    for key, text in {key: text for key, _, text in (word.partition("=") for word in words)}.items():  # the last counts
        if key in made and not _same(made[key], text):
            return f"{key} is {made[key]!r}, asked for was {text!r}"
    return ""


def _same(value: Any, text: str) -> bool:
    text = text.strip("'\"")
    if isinstance(value, bool) or value is None:
        return text.lower() in ({True: "true", False: "false", None: "null"}[value], str(value).lower())
    if isinstance(value, int | float):
        return float(text) == value
    if isinstance(value, tuple | list | dict):
        return True  # one of several notations
    return str(value) == text


def _whole(words: Sequence[str], found: Outcome, report: Report) -> None:
    """The same by a process of its own, unless it is one that would train or serve for long."""
    if found.taken:
        return
    program = [sys.executable, str(Path(main.__file__)), *words]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    if done.returncode != found.code or "Traceback" in done.stderr:
        report.fault("another outcome in a process of its own", words, f"{done.returncode}, {done.stderr[-600:]}")


def absurd(count: int, seed: int, report: Report) -> dict[str, Any]:
    """`count` values that are out of a key's declared range or of another type, over every recipe: none is taken."""
    rng, tried, recipes = random.Random(seed), 0, list(RECIPES)
    known = {recipe: [entry for entry in walk(preset(recipe, "toy")) if _numeric(entry)] for recipe in recipes}
    for number in report.track(range(count), "absurd values"):
        recipe = recipes[number % len(recipes)]
        key, _, rule = rng.choice(known[recipe])
        beyond = [repr(rule.low - 1)] if rule.low is not None else [repr(rule.above)] if rule.above is not None else []
        beyond += [repr(2 * rule.high + 1)] if rule.high is not None else []
        value = rng.choice(beyond) if beyond and rng.random() < 0.6 else rng.choice(ABSURD)
        words = ["env=Catch-v0", "size=toy", f"recipe={recipe}", f"{key}={value}"]
        found, tried = outcome(words), tried + 1
        if found.crash or found.code not in (0, 2):
            report.fault("traceback", words, found.crash or f"exit code {found.code}")
        elif found.code == 0:
            report.fault("silently wrong", words, "it was taken")
        elif found.error.strip().count("\n"):
            report.fault("more than a sentence", words, found.error)
    counted = {recipe: len(entries) for recipe, entries in known.items()}
    return {"absurd_values": tried, "keys_with_numbers": counted}


def _numeric(entry: tuple[str, Any, Any]) -> bool:
    _, value, _ = entry
    return isinstance(value, int | float) and not isinstance(value, bool)


def undeclared() -> list[str]:
    """Numbers of any recipe without a declared bound: a value of any size would be taken."""
    found = set()
    for recipe in RECIPES:
        for key, value, rule in walk(preset(recipe, "toy")):
            bounded = rule.low is not None or rule.above is not None or rule.choices
            if _numeric((key, value, rule)) and not bounded:
                found.add(key)
    return sorted(found)
