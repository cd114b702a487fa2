"""What the command line's commands do. Each one is short: the work is done further left."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from agent.loop import Loop
from envs.controls import Controls
from envs.games import Games
from runs.config import Config
from runs.folder.progress import Progress
from runs.folder.run import EPISODES, Run, find
from runs.folder.system import choose_device, choose_threads, cores, keep_freed_memory


def train(config: Config, folder: Path) -> None:
    """A new run in `folder`, from the first step to its evaluation."""
    device, threads = _prepare(config)
    if config.init_replay:
        find(config.init_replay)  # says so before there is a folder, when there is no such run
    run = Run.create(config, folder, threads=threads, device=device)
    _work(run, device, threads, resumed=False)


def resume(run: Run, only: str = "") -> None:
    """Goes on with a run from its newest checkpoint, or does one part of a round once more."""
    # The same number of threads sums in the same order: the continuation is the run that was never stopped.
    known = run.meta.get("threads", 0)
    config = replace(run.config, threads=run.config.threads or (known if known <= cores() else 0))
    device, threads = _prepare(config)
    _work(run, device, threads, resumed=True, only=only)


def evaluate(run: Run) -> None:
    """Plays whole episodes with the newest checkpoint, sampled and greedy."""
    device, _ = _prepare(run.config)
    from runs.measure import evaluation

    evaluation.measure(run, device)


def info(config: Config) -> None:
    """Prints the components, the latent, the memory and the stages of a recipe; builds nothing else."""
    from runs.cli import info as information

    information.show(config)


def benchmark(config: Config) -> None:
    """Measures games, world model, imagination and policy, and the share of time each takes."""
    device, threads = _prepare(config)
    from runs.measure import benchmark as bench

    bench.measure(config, device=device, threads=threads)


def about(games: Games) -> dict[str, Any]:
    """What a dream has to know of its game, so that it is played without it."""
    return {"spec": asdict(games.spec), "controls": Controls.of(games).to_dict()}


def _work(run: Run, device: str, threads: int, *, resumed: bool, only: str = "") -> None:
    from runs import build
    from runs.report import curve

    config = run.config
    games = config.game.build(config.env)
    run.note(**about(games))
    loop: Loop | None = None
    with Progress() as progress:
        progress.say(f"{config.env}: {games.description}, {games.num} side by side")
        progress.say(f"{config.recipe}, size {config.size}, on {device}, {threads} torch threads")
        progress.say(f"{'resuming' if resumed else 'writing'} {run.folder}")
        try:
            loop = build.loop(config, games, run.episodes_folder, device)
            if config.init_replay and not resumed:
                taken = loop.replay.take_over(find(config.init_replay) / EPISODES)
                progress.say(f"{taken} episodes of {config.init_replay}, {loop.replay.steps:,} steps")
            if resumed:
                loop.load_state_dict(run.load_checkpoint(device, say=progress.say))
                run.rewind(threads=threads, device=device)
                if taken := loop.replay.take_in(run.human_folder):
                    progress.say(f"{taken} episodes that a person played join the replay")
                progress.say(f"resumed at step {run.step:,}, update {loop.updates:,}")
            for sentence in loop.replay.skipped:
                progress.say(sentence)
            progress.start(config.steps, loop.replay.steps)
            loop.train(config.steps, run, progress, only)
        except KeyboardInterrupt:
            if run.step:
                progress.say(f"stopped at step {run.step:,}; go on with python main.py resume run={run.folder}")
            raise
        finally:
            if loop and loop.real:
                loop.real.close()
            games.close()
            run.close()
    evaluate(run)
    print(f"the learning curve: {curve.draw(run)}")


def _prepare(config: Config) -> tuple[str, int]:
    """(device, torch threads), chosen, measured and set."""
    device = choose_device(config.device)
    threads = config.threads or choose_threads()
    torch.set_num_threads(threads)
    keep_freed_memory()
    return device, threads
