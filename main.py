"""The command line: `python main.py [command] key=value ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from envs.errors import UserError, nearest
from runs.cli.exit_codes import guarded

if TYPE_CHECKING:
    from runs.folder.run import Run

OF_THE_MACHINE = ("device", "threads", "workers", "cluster")
COMMANDS = ("train", "resume", "evaluate", "play", "import", "info", "benchmark")

HELP = """\
python main.py [command] key=value ...        learn a game inside a dream of it

commands
  train       (the default) a new run, in a folder under runs/out/
  resume      run=FOLDER: go on with a run that was stopped; only=PART: one part of a round once more, such as real
  evaluate    run=FOLDER: play whole episodes, sampled and greedy
  play        the dream in the browser, with run=FOLDER that run's, else that of the model in the box
  import      format=iris path=FILE env=ID: a published checkpoint becomes a run, called run=NAME
  info        the components of a recipe, with their parameter counts
  benchmark   how fast games, world model, dream and policy are here

keys
  env         any gymnasium id with pictures (ALE/Pong-v5)
  recipe      {recipes}
  size        {sizes} (chosen by the device when not given)
  protocol    {protocols}
  steps       agent steps of the real game ({steps:,})
  seed        of everything random (0)
  episodes    whole episodes of an evaluation ({episodes})
  device      auto, cpu or cuda (auto)
  threads     of torch (0: the fastest number is measured at the start)
  workers     processes that play the real game for CMA-ES (0: one a core); cluster=local, auto or an address: Ray
  run         the folder of an existing run, or its name under runs/out/
  play: mode (dream, real, both), player (human, agent, random), temperature, fps, start, seed, host, port, open=false,
        window=true, record=FILE.mp4 with steps
  hydra.run.dir                                the folder of a new run
  model.* policy.* train.* replay.* game.*     every number; --cfg job shows them all

examples
  python main.py env=ALE/Breakout-v5 seed=1
  python main.py -m env=ALE/Pong-v5,ALE/Breakout-v5 seed=0,1,2
  python main.py resume run=runs/out/NAME
  python main.py evaluate run=NAME episodes=100
  python main.py play run=NAME mode=both
  python main.py play record=dream.mp4 steps=600 player=agent
  python main.py import format=iris path=Pong.pt env=ALE/Pong-v5 run=NAME
  python main.py --cfg job size=s               show the configuration, run nothing
  python main.py --hydra-help                   sweeps, launchers, completion"""


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for a person's mistake, 130 after Ctrl-C."""
    return guarded(lambda: _dispatch(list(sys.argv[1:] if words is None else words)))


def _dispatch(words: list[str]) -> None:
    command = "train"
    if words and "=" not in words[0] and not words[0].startswith(("-", "+", "~")):
        command = words.pop(0)
        if command not in COMMANDS:
            hint = nearest(command, COMMANDS)
            raise UserError(f'Unknown command "{command}": choose one of {", ".join(COMMANDS)}. {hint}'.strip())
    # Imported late: they bring torch, and a wrong command should not wait for it.
    from runs.cli import commands, compose

    compose.register()
    flags = compose.parse(words)
    if flags.help:
        print(_help())
    elif command == "train":
        plain = not (flags.hydra_help or flags.shell_completion)
        _train(words, flags.overrides, multirun=flags.multirun, plain=plain, quiet=flags.cfg or flags.info)
    elif len(words) != len(flags.overrides):
        raise UserError(f"{command} takes no flags; -m and --cfg are for train.")
    elif command == "play":
        from runs.cli.play import play

        play(flags.overrides)
    elif command == "import":
        from runs.cli.import_checkpoint import import_run

        import_run(flags.overrides)
    elif command == "resume":
        only = [word.removeprefix("only=") for word in flags.overrides if word.startswith("only=")]
        commands.resume(_open(command, [word for word in flags.overrides if not word.startswith("only=")]), *only[-1:])
    elif command == "evaluate":
        commands.evaluate(_open(command, flags.overrides))
    else:
        (config,) = compose.check(compose.with_size(flags.overrides))
        getattr(commands, command)(config)


def _train(words: list[str], overrides: list[str], *, multirun: bool, plain: bool, quiet: bool) -> None:
    from runs.cli import compose

    if plain:
        sized = compose.with_size(overrides)
        compose.check(sized, multirun=multirun)
        chosen = sized[len(overrides) :]
        words = words + chosen
        if chosen and not quiet:  # the device must not decide unheard what is learned
            print(f"{chosen[0]} was chosen by the device, as no size= was given; the published results are of size=xs.")
    before = sys.argv
    sys.argv = [before[0], *words]  # where Hydra reads them
    try:
        compose.launch(_task, words)
    finally:
        sys.argv = before


def _task(composed: object) -> None:
    """One run, called by Hydra or one of its launchers."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from runs import recipes
    from runs.cli import commands

    config = recipes.from_dict(OmegaConf.to_container(composed, resolve=True))  # type: ignore[arg-type]
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):  # what a person can type again
        folder = folder.relative_to(Path.cwd())
    # Hydra would wrap what is raised here in lines of its own.
    code = guarded(lambda: commands.train(config, folder))
    if code:
        raise SystemExit(code)


def _open(command: str, words: list[str]) -> Run:
    """The run that `run=` names, with what else the command line says."""
    from runs.cli import compose
    from runs.config import resumable
    from runs.folder import run

    named = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    if len(named) != 1 or not named[0]:
        raise UserError(f"{command} needs one run=FOLDER. {run.newest()}".strip())
    opened = run.Run.open(named[0])
    others = [word for word in words if not word.startswith("run=")]
    allowed = resumable(opened.config) if command == "resume" else ("episodes", "seed", "device", "threads")
    config = compose.changed(opened.config, others, allowed)
    if command == "resume":
        here = {key: getattr(opened.config, key) for key in OF_THE_MACHINE}
        opened.change(replace(config, **here))  # what a run was asked for last is what it goes on with
    opened.config = config
    return opened


def _help() -> str:
    from envs.games import PROTOCOLS
    from runs.config import SIZES, Config
    from runs.recipes import RECIPES

    return HELP.format(
        recipes=", ".join(RECIPES), sizes=", ".join(SIZES), protocols=", ".join(PROTOCOLS),
        steps=Config.steps, episodes=Config.episodes,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
