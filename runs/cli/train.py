"""The command `train`: a run, or with -m several, by Hydra and its launchers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from agent import team
from envs.errors import UserError
from runs import recipes
from runs.cli import commands, compose
from runs.cli.exit_codes import guarded, interruptible
from runs.config import Config


def train(words: Sequence[str], job: Callable[[object], None] | None = None) -> None:
    """A run, or with -m several: what Hydra does with the words, checked as a whole before.

    `job(composed)` does the work of each; a new run when None.
    """
    words = compose.prepared(compose.named(words))
    flags = compose.parse(words)
    if not flags.hydra_help:
        sized = compose.with_size(flags.overrides)
        compose.check(sized, multirun=flags.multirun)
        chosen = sized[len(flags.overrides) :]
        flags.overrides += chosen
        if chosen and chosen != ["size=xs"] and not (flags.cfg or flags.info):
            # The device must not decide unheard what is learned.
            print(f"{chosen[0]} was chosen by the device, as no size= was given; the published results are of size=xs.")
    if team.size() > 1 and flags.multirun:
        raise UserError("torchrun trains one run on several processes: a sweep (-m) has a launcher of its own.")
    if team.rank():  # Hydra would make a folder for it
        (config,) = compose.check(flags.overrides)
        interruptible()
        raise SystemExit(guarded(lambda: commands.train(config, Path())))
    words = compose.in_order(flags)
    failed: list[tuple[Path, int]] = []
    before = sys.argv
    sys.argv = [before[0], *words]  # where Hydra reads them
    try:
        compose.launch(job or partial(_job, failed, os.getpid()))
    finally:
        sys.argv = before
    if failed:
        if flags.multirun:
            print(
                f"Of the sweep {', '.join(str(folder) for folder, _ in failed)} failed; why stands above.",
                file=sys.stderr,
            )
        raise SystemExit(max(code for _, code in failed))


def composed(by_hydra: object) -> tuple[Config, Path]:
    """The typed configuration of the job under way and its folder."""
    return recipes.from_dict(OmegaConf.to_container(by_hydra, resolve=True)), _folder()  # type: ignore[arg-type]


def _folder() -> Path:
    """Of the job under way, as a person can type it again."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _job(failed: list[tuple[Path, int]], process: int, by_hydra: object) -> None:
    # Hydra would wrap what is raised here in lines of its own, and begin no further run of a sweep.
    interruptible()
    code, folder = guarded(lambda: commands.train(*composed(by_hydra))), _folder()
    if code == 130 or (code and os.getpid() != process):  # Ctrl-C is meant for all; other processes tell no list
        raise SystemExit(code)
    if code:
        failed.append((folder, code))
