"""What the command line's commands do. Each one is short: the work is done further left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from agent import team
from agent.loop import Loop
from agent.precision import mixed_precision
from agent.team import PeerLost
from envs.controls import Controls
from envs.errors import UserError
from envs.games import GameFailed, Games
from envs.make import make_games
from envs.settings import setting
from policies.planner import PlannerConfig
from runs import data_sets
from runs.cli import compose
from runs.config import Config, recordings, resumable
from runs.config_types import keys
from runs.folder import checkpoint
from runs.folder.files import file_name
from runs.folder.progress import Progress
from runs.folder.run import RESULTS, Run, recorded, trained_on
from runs.folder.system import choose_device, choose_threads, cores, keep_freed_memory

OF_THE_MACHINE = ("device", "threads", "workers", "cluster")
EVALUATED = ("episodes", "seed", "device", "threads", "game.max_steps")


@dataclass(frozen=True)
class ResumeConfig:
    """What `python main.py resume` takes beside the keys that a resumed run may change."""

    run: str = setting("", required=True, help="a run's folder or name")
    only: str = setting("", help="one part of a round once more, instead of continuing: collect, a stage, dream, real")


@dataclass(frozen=True)
class EvaluateConfig:
    """What `python main.py evaluate` takes beside some keys of the run."""

    run: str = setting("", required=True, help="a run's folder or name")
    player: str = setting("agent", choices=("agent", "planner"), help="who plays; a planner needs no policy")
    planner: PlannerConfig = PlannerConfig()


# Of the commands that read a run: the keys of their own, and those of a run's configuration that they may change.
OF_A_RUN: dict[str, tuple[Any, Callable[[Config], Sequence[str]]]] = {
    "resume": (ResumeConfig(), resumable),
    "evaluate": (EvaluateConfig(), lambda config: EVALUATED),
}


def opened(command: str, words: Sequence[str]) -> tuple[Any, ...]:
    """The run that `run=` names, with what else the words of resume or evaluate say.

    Raises:
        UserError: no such run, a key that it fixed for good, a value of a wrong type or out of range.
    """
    own, may_change = OF_A_RUN[command]
    mine = [word for word in words if word.split("=")[0] in keys(own)]
    if len([word for word in mine if word.startswith("run=")]) > 1:
        raise UserError(f"{command} needs one run=NAME.")
    asked = compose.filled(command, own, mine)
    run = Run.open(asked.run)
    others = [compose.renamed(word, keys(run.config)) for word in words if word not in mine]
    config = compose.changed(run.config, others, may_change(run.config))
    run.config = config
    if isinstance(asked, ResumeConfig):
        return (run, asked.only) if asked.only else (run,)
    if asked.player != "planner" and any(word.startswith("planner.") for word in mine):
        raise UserError("planner.* says how a planner plays: add player=planner.")
    return (run, asked.planner) if asked.player == "planner" else (run,)


def train(config: Config, folder: Path, command: str | None = None) -> Path:
    """A new run in `folder`, from the first step to its evaluation, by this process's command line or another.

    Returns the folder.
    """
    if team.size() > 1 and recordings(config):
        raise UserError("init_replay is not for several processes: train without torchrun.")
    for name in recordings(config):  # says so before anything else, when there is no such run
        if not _is_minari(name):
            recorded(name, config)
    if not team.rank():
        print(announcement(config), flush=True)
    for name in filter(_is_minari, recordings(config)):  # may be fetched first
        data_sets.open_minari(name.removeprefix(data_sets.PREFIX))
    device, threads = _prepare(config)
    if team.rank():
        _assist(config, device)
        return folder
    run = Run.create(config, folder, command, threads=threads, device=device)
    _work(run, device, threads, resumed=False)
    return folder


def resume(run: Run, only: str = "") -> None:
    """Goes on with a run from its newest checkpoint, or does one part of a round once more.

    A finished run goes on too: with more steps=, or with more generations or updates of the part it ended with.
    """
    if team.rank():
        _assist(run.config, _prepare(run.config)[0], run, only)
        return
    # The same number of threads sums in the same order: the continuation is the run that was never stopped.
    run.claim()
    known = run.meta.get("threads", 0)
    config = replace(run.config, threads=run.config.threads or (known if known <= cores() else 0))
    device, threads = _prepare(config)
    _work(run, device, threads, resumed=True, only=only)


def evaluate(run: Run, plan: PlannerConfig | None = None) -> dict[str, dict[str, Any]]:
    """Plays whole episodes with the newest checkpoint, sampled and greedy, or planned; returns the results.

    Of a world model alone the fidelity is measured instead; raises UserError when there is no suite of its game.
    """
    device, _ = _prepare(run.config)
    from runs.measure import evaluation, fidelity

    if run.config.train.policy or plan is not None:
        return evaluation.measure(run, device, plan)
    print(f"{run.folder} has no policy that could play: its world model is measured.", flush=True)
    return {"fidelity": fidelity.command(fidelity.FidelityConfig(run=str(run.folder), device=device))}


def info(config: Config) -> None:
    """Prints the components, the latent, the memory and the stages of a recipe; builds nothing else."""
    from runs.cli import info as information

    information.show(config)


def benchmark(config: Config) -> None:
    """Measures games, world model, imagination and policy, and the share of time each takes."""
    device, threads = _prepare(config)
    from runs.measure import benchmark as bench

    bench.measure(config, device=device, threads=threads)


def announcement(config: Config, results: Path = RESULTS) -> str:
    """What a run will do and how long that takes, by a published run of the same kind where there is one.

    By one of the same game if possible: what is learned in an update is as large for every game.
    """
    what = config.env if config.train.policy else f"a world model of {config.env} alone"
    said = f"Learning {what} with {config.recipe}, size {config.size}: {config.steps:,} steps of the real game"
    here = f"{cores()} core{'s'[: cores() > 1]} here"
    if not config.train.policy:
        return f"{said}, recorded ones included; {here}."

    def differs(told: dict[str, Any], *names: str) -> list[bool]:
        return [told[name] != getattr(config, name) for name in names]

    names = sorted(results.glob(f"{file_name(config.recipe)}-*-evaluation-sampled.json"))
    every = (json.loads(path.read_text()) for path in names)
    alike = [told for told in every if "variant" not in told and not any(differs(told, "recipe", "size"))]
    if not alike:
        return f"{said}; {here}, and no published run says how long it takes."
    on_gpu = choose_device(config.device) != "cpu"
    told = min(alike, key=lambda told: [bool(trained_on(told)["gpu"]) != on_gpu, *differs(told, "env", "protocol")])
    machine = trained_on(told)
    threads = told.get("training", {}).get("threads") or machine["cores"]
    # Of one thread its processor time: others may have shared the core.
    took = told.get("core_hours") if threads == 1 and not machine["gpu"] else None
    hours = (took or told["hours"]) * config.steps / told["env_steps"]
    long = f"{hours:.1f} hours" if hours > 1.5 else f"{max(1, round(60 * hours))} min"
    of = f" for {told['env']} ({told['protocol']})" if any(differs(told, "env", "protocol")) else ""
    on = machine["gpu"] or f"{threads} core{'s'[: threads > 1]} of {machine['cpu']}"
    # Results from before it was recorded were all made where it was true.
    if machine.get("bf16", True) and not mixed_precision(torch.device(choose_device(config.device))):
        on += ", with native bfloat16, without which, as here, a core takes about three times as long"
    return f"{said}, about {long} as published{of}, on {on}; {here}."


def about(games: Games) -> dict[str, Any]:
    """What a dream has to know of its game, so that it is played without it."""
    return {"spec": asdict(games.spec), "controls": Controls.of(games).to_dict(), "aspect": games.aspect}


def _work(run: Run, device: str, threads: int, *, resumed: bool, only: str = "") -> None:
    from runs import build
    from runs.measure import evaluation, fidelity  # noqa: F401  now, lest another commit be checked out meanwhile

    config = run.config
    games = make_games(config.env, config.game)
    run.note(**about(games))
    loop: Loop | None = None
    with Progress() as progress, team.joined(device) as crew:
        progress.say(f"{config.env}: {games.description}, {games.num_envs} side by side")
        if crew.size > 1:
            progress.say(f"{crew.size} processes, each with games, replay and dreams of its own")
        progress.say(f"{config.recipe}, size {config.size}, on {device}, {threads} torch threads")
        progress.say(f"{'resuming' if resumed else 'writing'} {run.folder}")
        try:
            loop = build.loop(config, games, run.episodes_folder, device, crew)
            if not resumed:
                _take_recorded(run, loop, games, progress)
            else:
                state = run.load_checkpoint(device, say=progress.say)
                with run.understood():
                    loop.load_state_dict(state)
                loop.choose(only, config.steps)
                run.keep_config(OF_THE_MACHINE)  # only now: a resume that fails has changed nothing
                run.rewind(threads=threads, device=device)
                # In a team the first process alone would have them, and be ahead of the others.
                if crew.size == 1 and (taken := loop.take(run.human_folder, human=True)):
                    progress.say(f"{taken} episodes that a person played join the replay")
                over = "" if loop.due(config.steps) else "; all of it is done, and steps=N or only=PART asks for more"
                progress.say(f"resumed at step {run.step:,}, round {loop.rounds:,}{over}")
            for sentence in loop.replay.skipped:
                progress.say(sentence)
            progress.start(config.steps, loop.step)
            loop.train(config.steps, run, progress, only)
            if crew.size > 1:
                run.note(processes=crew.size, communication_s=round(crew.seconds, 1))
        except PeerLost as problem:
            how = f"torchrun ... main.py resume {run.argument}, with any number of processes"
            raise UserError(f"{problem}. All up to step {run.step:,} is saved: go on with {how}.") from problem
        except KeyboardInterrupt:
            saved = checkpoint.there(run.folder / "checkpoints")
            how = f"go on with python main.py resume {run.argument}" if saved else "the same command begins again"
            progress.say(f"stopped at step {run.step:,}; {how}")
            raise
        except OSError:
            run.check_there()
            raise
        except GameFailed as problem:
            raise UserError(
                f"{str(problem).rstrip('.')}. All up to step {run.step:,} is saved: go on with python main.py resume "
                f"{run.argument} once the game works again."
            ) from problem
        finally:
            if loop and loop.real:
                loop.real.close()
            games.close()
            run.close()
            run.release()
    _conclude(run)


def _assist(config: Config, device: str, run: Run | None = None, only: str = "") -> None:
    """The part of a process of a team that is not its first: it plays and trains, and writes nothing."""
    from runs import build
    from runs.folder.null_logger import Nowhere, Phases

    games = make_games(config.env, config.game)
    try:
        with team.joined(device) as crew:
            loop = build.loop(config, games, None, device, crew)
            if run is not None:
                state = run.load_checkpoint(device, say=lambda sentence: None)
                with run.understood():
                    loop.load_state_dict(state, run.episodes_folder)
            loop.train(config.steps, Nowhere(), Phases(lambda: None), only)
    finally:
        games.close()


def _conclude(run: Run) -> None:
    """What stands at the end of a run: its evaluation, and pictures of how it learned."""
    from runs.report import curve
    from runs.report.reconstructions import draw_reconstructions

    try:
        evaluate(run)
    except GameFailed as problem:
        how = f"python main.py evaluate {run.argument} judges it once the game works again"
        raise UserError(f"{str(problem).rstrip('.')}. The run itself is complete: {how}.") from problem
    except UserError as problem:
        if run.config.train.policy:
            raise
        print(problem)  # there is no suite of the game: the run is complete without it
    print(f"the learning curve: {curve.draw(run)}")
    if drawn := draw_reconstructions(run):
        print(f"ten frames as the model came to see them: {drawn}")


def _take_recorded(run: Run, loop: Loop, games: Games, progress: Progress) -> None:
    """What `init_replay` names becomes the new run's first experience."""
    if not (named := recordings(run.config)):
        return
    with TemporaryDirectory(dir=run.folder, prefix=".recorded-") as place:
        taken = loop.take(*_folders(named, games, run.config, Path(place)))
    if not taken:
        raise UserError(f"No episode of {', '.join(named)} can be used: {loop.replay.skipped[0]}")
    run.note(init_replay={"episodes": taken, "steps": loop.replay.steps})
    progress.say(f"{taken} episodes of {', '.join(named)}, {loop.replay.steps:,} steps")


def _is_minari(name: str) -> bool:
    return name.startswith(data_sets.PREFIX)


def _folders(named: Sequence[str], games: Games, config: Config, place: Path) -> Iterator[Path]:
    """Where the recorded episodes lie; those of data sets are written into `place` first."""
    for number, name in enumerate(named):
        if _is_minari(name):
            yield data_sets.write(name.removeprefix(data_sets.PREFIX), games.spec, config.game, place / str(number))
        else:
            yield from recorded(name, config)


def _prepare(config: Config) -> tuple[str, int]:
    """(device, torch threads), chosen, measured and set."""
    device = choose_device(config.device)
    threads = config.threads or (max(1, cores() // team.beside()) if team.beside() > 1 else choose_threads())
    torch.set_num_threads(threads)
    keep_freed_memory()
    return device, threads
