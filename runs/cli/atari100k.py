"""The command `atari100k`: the 26 games of the benchmark as one sweep that can be stopped and resumed.

Each game and seed is a run of its own in a folder of its own. One that is finished is skipped, one that was stopped
is resumed. Several at once: jobs=N on one machine, or Hydra's launchers, of which hydra/launcher=ray plays
as many as the cluster has places.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from rich.console import Console
from rich.table import Table

from envs.errors import UserError, nearest
from envs.settings import setting
from runs.cli import commands, compose, side_by_side, train
from runs.cli.exit_codes import guarded, interruptible
from runs.config import Config
from runs.config_types import values
from runs.folder import checkpoint
from runs.folder.files import file_name, write_json
from runs.folder.run import OUT, Run
from runs.folder.system import facts
from runs.measure.scores import game_of, published
from runs.report import atari100k as report

# What a run may be resumed with and still be the one that was asked for: how far, and by which machine.
FREE = ("steps", "episodes", *commands.OF_THE_MACHINE, "train.cuda_graphs")
FIXED = ("env", "seed", "protocol", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir")


@dataclass(frozen=True)
class Atari100kConfig:
    """What `python main.py atari100k` takes beside the keys of train."""

    games: tuple[str, ...] = setting((), help="some of the 26, as in games=Pong,Boxing; all when not given")
    seeds: tuple[int, ...] = setting((0,), 0, 2**31 - 1, help="seeds of each game, as in seeds=0,1,2")
    out: str = setting("", help="folder of the runs; runs/out/atari100k-RECIPE when not given")
    jobs: int = setting(
        1, 1, 1024, help="runs at once on this machine, each a process with a log in `out`; threads=1 unless given"
    )
    only_run: bool = setting(False, help="runs what is missing, without the table: for several processes on one `out`")
    only_table: bool = setting(False, help="writes table and picture of what is finished, and runs nothing")


def command(asked: Atari100kConfig, words: Sequence[str]) -> None:
    """Runs what is missing, then writes summary.json and curves.png and prints the table.

    Raises:
        UserError: a game that is none of the 26, a key that the sweep itself decides, one with several values; or, at
            the end, what was asked for and is not finished.
    """
    games, seeds = _games(asked.games), list(dict.fromkeys(asked.seeds))
    if asked.only_run and asked.only_table:
        raise UserError("only_run= and only_table= leave nothing to do: choose one.")
    words = compose.prepared(words)
    for override in compose.read(words):
        key = override.key_or_group
        if key in FIXED:
            raise UserError(f"{key} is decided by atari100k itself: see games=, seeds= and out=.")
        if key == "hydra/launcher" and asked.jobs > 1:
            raise UserError("jobs= and hydra/launcher= both say where the runs go: choose one.")
        if override.is_sweep_override():
            raise UserError(f"{key} needs one value: a table is of one system, another has an out= of its own.")
    one = [*words, "protocol=atari100k", f"env=ALE/{games[0]}-v5", f"seed={seeds[0]}"]
    (expected,) = compose.check(compose.with_size(one))
    if not expected.train.policy:
        raise UserError("The table is of scores, and train.policy=false leaves nobody who could play for one.")
    recipe = expected.recipe
    out = Path(asked.out) if asked.out else OUT / f"atari100k-{file_name(recipe)}"
    failed: list[int] = []
    if not asked.only_table:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"{out} cannot be made a folder: {problem.strerror}.") from problem
        sweep = [
            "-m", *words, "protocol=atari100k",
            "env=" + ",".join(f"ALE/{game}-v5" for game in games), "seed=" + ",".join(map(str, seeds)),
            f"hydra.sweep.dir={out}", "hydra.sweep.subdir='${folder:${env}}-${seed}'",
        ]  # fmt: skip
        if asked.jobs > 1:
            failed = side_by_side.run(_commands(games, seeds, out, words), asked.jobs, out)
        else:
            train.train(sweep, partial(_job, failed))
    if not asked.only_run:
        _tell(expected, out, {(game, seed) for game in games for seed in seeds}, ran=not asked.only_table)
    if failed:
        raise SystemExit(max(failed))


def _tell(expected: Config, out: Path, wanted: set[tuple[str, int]], *, ran: bool) -> None:
    """Table, picture and summary of what is finished in a folder; UserError when something that was run is not."""
    recipe = expected.recipe
    found = out.glob("*/results/evaluation-sampled.json")
    own = (path for path in found if _alike(path.parents[1], expected))
    entries = report.load(own, expected.steps, expected.episodes)
    if not entries:
        raise UserError(f"No game is finished in {out} with these settings.")
    told = report.summary(entries)
    write_json(out / "summary.json", {"what": "atari100k", "recipe": recipe} | facts() | told)
    yardstick = report.load(OUT.glob("*/results/evaluation-sampled.json"), None, expected.episodes)
    beside = [entry for entry in yardstick if entry["game"] in told["games"]]
    report.picture([*entries, *beside], out / "curves.png")
    heading, *rows = report.lines(told, recipe, report.BESIDE)
    table = Table(title=f"Atari 100k, {len(told['games'])} of 26 games, {out}")
    for name in heading:
        table.add_column(name, justify="left" if name == "game" else "right")
    for row in rows:
        table.add_row(*row, end_section=row[0] == list(told["games"])[-1])
    Console(highlight=False).print(table)
    print(f"{out / 'summary.json'}, {out / 'curves.png'}")
    done = {(entry["game"], entry["seed"]) for entry in entries}
    missing = [f"{game}, seed {seed}" for game, seed in sorted(wanted - done)]
    if missing and ran:
        raise UserError(f"Not finished: {'; '.join(missing)}. The same command goes on.")


def _commands(games: Sequence[str], seeds: Sequence[int], out: Path, words: Sequence[str]) -> dict[str, list[str]]:
    """What to type for each game and seed alone, by the name of its run."""
    given = any(override.key_or_group == "threads" for override in compose.read(words))
    alone = [*words] if given else [*words, "threads=1"]
    return {
        f"{game}-{seed}": ["atari100k", f"games={game}", f"seeds={seed}", f"out={out}", "only_run=true", *alone]
        for seed in seeds for game in games
    }  # fmt: skip


def _games(words: Sequence[str]) -> list[str]:
    known = {game.lower(): game for game in published()}
    found = []
    for word in words:
        game = known.get(game_of(word).lower())
        if game is None:
            hint = nearest(word, list(published()))
            raise UserError(f'"{word}" is none of the 26 games of Atari 100k: {", ".join(published())}. {hint}'.strip())
        found.append(game)
    return list(dict.fromkeys(found)) or list(published())


def _job(failed: list[int], composed: object) -> None:
    """One game and seed, called by Hydra or one of its launchers. What fails is said, and the others go on."""
    interruptible()
    code = guarded(lambda: _go_on(*train.composed(composed)))
    if code == 130:  # Ctrl-C is meant for all of them
        raise SystemExit(code)
    if code:
        failed.append(code)


def _go_on(config: Config, folder: Path) -> None:
    """Begins a run, resumes it, or does nothing where it is finished."""
    path = folder / "results" / "evaluation-greedy.json"  # the last one that is written
    begun = path.exists() or checkpoint.there(folder / "checkpoints")  # else it was killed before its first one
    if not (begun and (folder / "config.json").exists()):
        words = HydraConfig.get().overrides.task
        commands.train(config, folder, command=shlex.join(["python", "main.py", *words]))
        return
    run = Run.open(folder)
    if other := _other(run.config, config):
        raise UserError(f"{folder} was begun with another {other}: choose another out= or delete it.")
    result = json.loads(path.read_text()) if path.exists() else {}
    if (played := result.get("env_steps", 0)) >= config.steps + report.MORE:
        raise UserError(f"{folder} has learned from {played:,} steps, not {config.steps:,}: choose another out=.")
    if played >= config.steps and result.get("episodes", 0) >= config.episodes:
        print(f"{config.env}, seed {config.seed}: finished, {folder}", flush=True)
        return
    run.config = config
    commands.resume(run)


def _other(config: Config, asked: Config, besides: Sequence[str] = ()) -> str:
    """The first key that a run was begun with otherwise, of those that decide what it is; "" when there is none."""
    ours, theirs = values(asked), values(config)
    return next((key for key in ours if ours[key] != theirs.get(key) and key not in (*FREE, *besides)), "")


def _alike(folder: Path, asked: Config) -> bool:
    """Whether a run has these settings, of whichever game and seed."""
    try:
        return not _other(Run.open(folder).config, asked, ("env", "seed"))
    except UserError:  # a run of something else
        return False
