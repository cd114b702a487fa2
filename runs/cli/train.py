"""The command `train`: a run, or with -m several, by Hydra and its launchers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from runs import recipes
from runs.cli import commands, compose
from runs.cli.exit_codes import guarded
from runs.config import Config


def train(words: Sequence[str], job: Callable[[object], None] | None = None) -> None:
    """A run, or with -m several: what Hydra does with the words, checked as a whole before.

    `job(composed)` does the work of each; a new run when None.
    """
    words = compose.prepared(words)
    flags = compose.parse(words)
    if not flags.hydra_help:
        sized = compose.with_size(flags.overrides)
        compose.check(sized, multirun=flags.multirun)
        chosen = sized[len(flags.overrides) :]
        words = words + chosen
        if chosen and chosen != ["size=xs"] and not (flags.cfg or flags.info):
            # The device must not decide unheard what is learned.
            print(f"{chosen[0]} was chosen by the device, as no size= was given; the published results are of size=xs.")
    before = sys.argv
    sys.argv = [before[0], *words]  # where Hydra reads them
    try:
        compose.launch(job or _job, words)
    finally:
        sys.argv = before


def composed(by_hydra: object) -> tuple[Config, Path]:
    """The typed configuration of the job under way and its folder, as a person can type it again."""
    config = recipes.from_dict(OmegaConf.to_container(by_hydra, resolve=True))  # type: ignore[arg-type]
    folder = Path(HydraConfig.get().runtime.output_dir)
    return config, folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _job(by_hydra: object) -> None:
    config, folder = composed(by_hydra)
    # Hydra would wrap what is raised here in lines of its own.
    code = guarded(lambda: commands.train(config, folder))
    if code:
        raise SystemExit(code)
