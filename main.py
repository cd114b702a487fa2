"""The command line: `python main.py [command] key=value ...`, or `dreamloop` once it is installed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__":  # first of all: until a command has begun there is nothing to be ended in good order
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: os._exit(130))

try:
    from runs.cli.exit_codes import guarded, interruptible
    from runs.cli.table import RECIPE, RUN, Command, load
except ModuleNotFoundError as missing:
    if __name__ != "__main__" or (missing.name or "").split(".")[0] in ("envs", "runs"):
        raise
    print(f"{sys.executable} has no {missing.name}: make train installs what is needed into .venv, "
          "and .venv/bin/python main.py uses it.", file=sys.stderr)  # fmt: skip
    sys.exit(2)

COMMANDS = {
    "train": Command("a new run, in a folder under runs/out/ (the default)", "runs.cli.train:train", RECIPE,
                     "env=ALE/Breakout-v5 seed=1"),
    "resume": Command("continue a run that was stopped", "runs.cli.commands:resume", RUN, "run=NAME"),
    "atari100k": Command("the 26 games of the benchmark: runs what is missing, then one table and one picture",
                         "runs.cli.atari100k:command", "runs.cli.atari100k:Atari100kConfig", "games=Boxing,Pong",
                         passes_on=True),
    "evaluate": Command("play whole episodes of the real game, sampled and greedy", "runs.cli.commands:evaluate", RUN,
                        "run=NAME episodes=100"),
    "play": Command("the dream in the browser, in a window or on film", "runs.cli.play:play",
                    "runs.cli.play:PlayConfig", "run=NAME mode=both"),
    "export": Command("a dream as a page without a server: the model plays in the browser, on any static host",
                      "runs.cli.export:command", "runs.cli.export:ExportConfig", "run=NAME out=FOLDER"),
    "import": Command("a checkpoint that another program published becomes a run",
                      "runs.cli.import_checkpoint:import_run", "runs.cli.import_checkpoint:ImportConfig",
                      "format=iris path=Pong.pt env=ALE/Pong-v5 run=NAME"),
    "check": Command("what a game offers and what an agent would see of it, with a picture; for a game of your own",
                     "runs.measure.check:check", RECIPE, "env=MODULE:Name-v0"),
    "info": Command("what a recipe is made of, with its parameter counts", "runs.cli.commands:info", RECIPE,
                    "recipe=iris size=m"),
    "benchmark": Command("how fast games, world model, dream and policy are here", "runs.cli.commands:benchmark",
                         RECIPE, "threads=2"),
    "suite": Command("frozen episodes of a game, on which every world model is judged: seeds and actions in a file",
                     "runs.measure.suite:command", "runs.measure.suite:SuiteConfig", "run=NAME"),
    "fidelity": Command("how far ahead a world model predicts, on the frozen episodes of its game",
                        "runs.measure.fidelity:command", "runs.measure.fidelity:FidelityConfig", "run=NAME"),
    "probe": Command("what the codes of frame pairs hold: actions, positions, the score",
                     "runs.measure.probe:command", "runs.measure.probe:ProbeConfig", "run=NAME"),
    "clock": Command("whether the clock that a game shows keeps time in a dream", "runs.measure.clock:command",
                     "runs.measure.clock:ClockConfig", "run=NAME"),
    "objects": Command("how often the reconstruction keeps Pong's ball", "runs.measure.objects:command",
                       "runs.measure.objects:ObjectsConfig", "run=NAME"),
    "long_rollout": Command("ten minutes of dream without a reset, minute by minute",
                            "runs.measure.long_rollout:command", "runs.measure.long_rollout:LongRolloutConfig",
                            "run=NAME"),
    "dream_ppo": Command("what Stable-Baselines3's PPO learns in the dream, judged in the real game",
                         "runs.measure.dream_ppo:command", "runs.measure.dream_ppo:DreamPpoConfig", "run=NAME"),
    "ppo": Command("model-free baseline: what Stable-Baselines3's PPO learns in the real game in N processor hours",
                   "runs.measure.ppo:command", "runs.folder.ppo:PpoConfig", "env=ALE/Boxing-v5 hours=1.25"),
    "precision": Command("what bfloat16 and int8 change in the predictions of a run of iris",
                         "runs.measure.precision:command", "runs.measure.precision:PrecisionConfig", "run=NAME"),
    "page": Command("how fast the page is in a headless browser, or a stress test of its server",
                    "runs.measure.page:command", "runs.measure.page:PageConfig", "run=NAME what=stress"),
    "curve": Command("the learning curve of a run as a picture, and reconstructions of ten frames over it",
                     "runs.report.curve:command", "runs.report.curve:CurveConfig", "run=NAME"),
    "pack": Command("a run's model as two small files, like those that ship", "runs.folder.pretrained:command",
                    "runs.folder.pretrained:PackConfig", "run=NAME out=FOLDER"),
    "leaderboard": Command("every published fidelity in one table: games, horizons, recipes",
                           "runs.report.leaderboard:command", "runs.report.leaderboard:LeaderboardConfig"),
    "publish": Command("copy a run's results to runs/results/", "runs.report.publish:command",
                       "runs.report.publish:PublishConfig", "run=NAME variant=WORD"),
    "docs": Command("write the generated pages of docs/: commands, metrics, results, atari100k", "runs.cli.docs:write",
                    "runs.cli.docs:DocsConfig"),
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for a person's mistake, 130 after Ctrl-C."""
    if sys.platform == "win32":
        print("This program runs on Linux and macOS; on Windows it runs in WSL.", file=sys.stderr)
        return 2
    return guarded(lambda: _dispatch(list(sys.argv[1:] if words is None else words)))


def _dispatch(words: list[str]) -> None:
    from envs.errors import UserError, nearest

    name = "train"
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    named = bool(words) and "=" not in words[0] and not words[0].startswith(("-", "+", "~"))
    if named:
        name = words.pop(0)
        if name not in COMMANDS:
            hint = nearest(name, COMMANDS)
            raise UserError(f'Unknown command "{name}": choose one of {", ".join(COMMANDS)}. {hint}'.strip())
    row, asked_for_help = COMMANDS[name], {"--help", "-h"} & set(words)
    # What follows is imported late: it brings torch, and neither a wrong word nor the overview should wait for it.
    if "--version" in words and not named:
        from runs.folder.system import facts

        told = facts()
        ours = told["versions"].get("dreamloop", "(not installed)")
        print(f"dreamloop {ours}, torch {told['versions']['torch']}, commit {told['commit']}")
    elif asked_for_help and not named and not any("=" in word for word in words):
        from runs.cli import table

        print(table.overview(COMMANDS))
    elif {"--shell-completion", "-sc"} & {word.split("=")[0] for word in words}:
        from runs.cli import completion

        print(completion.script(words, COMMANDS))
    elif asked_for_help:
        from runs.cli import docs

        print(docs.help_of(name, row, [word for word in words if not word.startswith("-")]))
    elif name == "train":
        load(row.function)(words)
    else:
        _run(name, row, words)


def _run(name: str, row: Command, words: list[str]) -> None:
    """Any command but train: its words become one typed configuration, or a run with some keys changed."""
    from envs.errors import UserError
    from runs.cli import compose
    from runs.config_types import keys

    if any(word.startswith("-") for word in words):
        raise UserError(f"{name} takes no flags; -m and --cfg are for train.")
    if row.reads == RECIPE:
        words = compose.prepared(words)
        (asked,) = compose.check(compose.with_size(words))
        work = load(row.function)
        interruptible()
        work(asked)
    elif row.reads == RUN:
        from runs.cli import commands

        arguments = commands.opened(name, words)
        interruptible()
        getattr(commands, name)(*arguments)
    else:
        template = load(row.reads)()
        others = [word for word in words if row.passes_on and word.split("=")[0] not in keys(template)]
        asked_for = compose.filled(name, template, [word for word in words if word not in others])
        more = [others] if row.passes_on else [COMMANDS] if name == "docs" else []
        work = load(row.function)
        interruptible()
        work(asked_for, *more)


if __name__ == "__main__":
    sys.exit(main())
