"""The help of every key and every metric, from their declarations: `COMMAND --help` and the pages of docs/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from envs.games import PROTOCOLS
from envs.settings import declared, setting
from runs import build
from runs.cli import compose
from runs.cli.commands import OF_A_RUN
from runs.cli.table import RECIPE, RUN, Command, load
from runs.config import SIZES
from runs.config_types import SHORT, typed
from runs.folder.files import write_atomic
from runs.folder.ppo import METRICS, PPO
from runs.folder.run import RESULTS
from runs.recipes import RECIPES, preset
from runs.report import atari100k, publish
from world_model.interface import Metric

SHOWN_SIZE = "xs"  # whose numbers the pages show
FLAGS = """\
-m               one run for each combination of values: -m seed=0,1,2
--cfg job        shows the configuration and runs nothing
--hydra-help     sweeps, launchers
name=NAME        the new run is runs/out/NAME; hydra.run.dir= takes any path"""
Row = tuple[str, str, str, str, str]
OF_EVERY_LINE = {  # of metrics.jsonl
    "step": Metric("agent steps of the real game so far"),
    "hours": Metric("hours of work so far"),
    "core_hours": Metric("CPU hours of the process so far, all threads; workers of a population not counted"),
}
HEADING: Row = ("key", "type", "default", "range", "what it is")


@dataclass(frozen=True)
class DocsConfig:
    """What `python main.py docs` takes."""

    out: str = setting("docs", help="folder of the pages")


class Page(NamedTuple):
    """A generated page: its name in docs/ and its text."""

    name: str
    text: str


def rows(config: Any, prefix: str = "") -> Iterator[Row]:
    """Every key of a dataclass: (key, type, default, range, help)."""
    kinds = get_type_hints(type(config))
    for one in fields(config):
        value, rule = getattr(config, one.name), declared(one)
        if is_dataclass(value):
            yield from rows(value, f"{prefix}{one.name}.")
        else:
            shown = {"None": "null", "True": "true", "False": "false", "": "-"}.get(str(value), str(value))
            required = "required" if rule.required else shown
            yield prefix + one.name, typed(kinds[one.name], SHORT), required, rule.limits or "-", rule.full_help


def help_of(name: str, row: Command, words: Sequence[str] = ()) -> str:
    """What `python main.py COMMAND --help` prints; a recipe's keys are those of the recipe and size in the words."""
    lines = [f"python main.py {name} key=value ...        {row.help}", ""]
    if row.reads == RECIPE:
        chosen = dict(word.split("=", 1) for word in words if "=" in word)
        recipe, size = chosen.get("recipe", compose.DEFAULT_RECIPE), chosen.get("size", SHOWN_SIZE)
        lines += _columns(sorted(rows(preset(recipe, size)), key=lambda row: "." in row[0]))
        lines += ["", f"recipes    {', '.join(RECIPES)}, or MODULE:FUNCTION; their keys: recipe=NAME size=SIZE --help"]
        lines += [f"sizes      {', '.join(SIZES)} (chosen by the device when not given)"]
        lines += [f"protocols  {', '.join(PROTOCOLS)}", *(["", FLAGS] if name == "train" else [])]
    elif row.reads == RUN:
        lines += _columns(_of_a_run(name))
    else:
        lines += _columns(rows(load(row.reads)()))
    if row.passes_on:
        lines += ["", "and every key of train: python main.py train --help"]
    return "\n".join([*lines, "", f"example: python main.py {name} {row.example}".rstrip()])


def write(asked: DocsConfig, commands: Mapping[str, Command]) -> None:
    """Writes the generated pages."""
    files = list(RESULTS.glob("*-evaluation-sampled.json"))
    if entries := atari100k.load(files):
        games = {entry["game"] for entry in entries}
        yardstick = [entry for entry in atari100k.load(files, None) if entry["game"] in games]
        atari100k.picture([*entries, *yardstick], Path(asked.out) / "atari100k.png")
    for page in pages(commands):
        path = Path(asked.out) / page.name
        write_atomic(path, page.text.encode())
        print(path)


def pages(commands: Mapping[str, Command]) -> tuple[Page, ...]:
    """Every generated page of docs/."""
    results = (
        "# Results\n\nOne file in `runs/results/` a row, with the command and the commit that made it. Steps and hours "
        "are the run's: not those of PPO that learned in its dream, and without the hours of runs whose episodes were "
        "reused. Copy: the last frame repeated, as a baseline.\n\n"
    )
    return (
        Page("commands.md", _commands(commands)),
        Page("metrics.md", _metrics()),
        Page("results.md", _generated(results + publish.tables())),
        Page("atari100k.md", _generated(atari100k.page(RESULTS))),
        Page("atari100k.json", atari100k.numbers(RESULTS)),
    )


def _commands(commands: Mapping[str, Command]) -> str:
    names = [f"[`{name}`](#{name})" for name in commands]
    text = ["# Commands", f"`python main.py COMMAND key=value ...`: {', '.join(names)}.",
            "`COMMAND --help` says the same, `--shell-completion bash` (zsh, fish) completes it. Errors that a person "
            "can cause are one sentence and exit code 2."]  # fmt: skip
    for name, row in commands.items():
        example = f"python main.py {name} {row.example}".rstrip()
        text += [f"## {name}", f"{row.help[0].upper()}{row.help[1:]}. `{example}`"]
        if row.reads == RECIPE and name != "train":
            text.append("Its keys are those of [train](#train).")
        elif row.reads == RECIPE:
            text += _of_recipes()
        else:
            listed = _of_a_run(name) if row.reads == RUN else rows(load(row.reads)())
            text.append(publish.markdown(HEADING, list(listed)))
        if name == "resume":
            text.append("Of these keys a run has those of its recipe.")
        if row.passes_on:
            text.append("And the keys of [train](#train).")
    return _generated("\n\n".join(text))


def _of_recipes() -> list[str]:
    """The keys of a new run: those that all recipes share, and of each its model and policy."""
    text = [f"Recipes: {', '.join(f'`{name}`' for name in RECIPES)}, or `MODULE:FUNCTION`. Sizes: {', '.join(SIZES)}, "
            f"chosen by the device when not given. Protocols: {', '.join(PROTOCOLS)}. Defaults are those of `reverie` "
            f"at size {SHOWN_SIZE}; below, each recipe's own.", f"```\n{FLAGS}\n```"]  # fmt: skip
    every = rows(preset(compose.DEFAULT_RECIPE, SHOWN_SIZE))
    shared = sorted((row for row in every if not _own(row)), key=lambda row: "." in row[0])
    text.append(publish.markdown(HEADING, shared))
    usual = {row[0]: row[2] for row in shared}
    for recipe in RECIPES:
        known = list(rows(preset(recipe, SHOWN_SIZE)))
        others = [
            f"`{key}={value}`" for key, _, value, *_ in known if key != "recipe" and value != usual.get(key, value)
        ]
        text.append(f"### {recipe}")
        if others:
            text.append(f"Of the keys above it has {', '.join(others)}.")
        text.append(publish.markdown(HEADING, [row for row in known if _own(row)]))
    return text


def _own(row: Row) -> bool:
    return row[0].startswith(("model.", "policy."))


def _of_a_run(name: str) -> list[Row]:
    """The command's own keys, and those of a run that it may change, of whichever recipe."""
    own, may_change = OF_A_RUN[name]
    found = {row[0]: row for row in rows(own)}
    for recipe in (compose.DEFAULT_RECIPE, *RECIPES):
        config = preset(recipe, SHOWN_SIZE)
        known = {row[0]: row for row in rows(config)}
        found = {key: (key, known[key][1], "the run's", *known[key][3:]) for key in may_change(config)} | found
    return sorted(found.values(), key=lambda row: (row[0] not in ("run", "only"), "." in row[0]))


def _metrics() -> str:
    text = ["# Metrics", "What a run writes into `metrics.jsonl` and TensorBoard, as declared beside each loss."]
    found: dict[str, dict[str, Metric]] = {}
    of_each = {recipe: build.metrics(preset(recipe, "toy")) for recipe in RECIPES} | {PPO: METRICS}
    for recipe, metrics in of_each.items():
        for key, metric in (OF_EVERY_LINE | metrics).items():
            found.setdefault(key, {}).setdefault(recipe, metric)
    lines = []
    for key, of in found.items():
        for metric in dict.fromkeys(of.values()):
            users = [recipe for recipe, other in of.items() if other == metric]
            who = "all" if len(users) == len(of_each) else ", ".join(users)
            lines.append((f"`{key}`", who, metric.text, metric.shown, "yes" if metric.panel else ""))
    text.append(publish.markdown(("metric", "recipes", "meaning", "on the terminal as", "in the curve"), lines))
    return _generated("\n\n".join(text))


def _generated(text: str) -> str:
    return f"<!-- written by python main.py docs -->\n\n{text}\n"


def _columns(listed: Iterator[Row] | Sequence[Row]) -> list[str]:
    every = [HEADING, *listed]
    widths = [min(34, max(len(row[i]) for row in every)) for i in range(4)]
    widths.append(0)
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]
