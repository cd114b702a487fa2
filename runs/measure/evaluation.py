"""The command `evaluate`: whole episodes, sampled and greedy, as a table, a JSON file and a video."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from agent.evaluate import LONG, Acting, Evaluation, evaluate_policy
from agent.player import Player
from envs.games import Games
from envs.make import make_games
from policies.planner import Planner, PlannerConfig, planning
from runs import build
from runs.config_types import values
from runs.folder.run import Run, result_name
from runs.measure.scores import human_normalised

OF_EPISODES = ("episodes", "seed", "game.max_steps")  # which games are judged, and how far
HEARTBEAT = 12.0  # seconds between two lines where there is no terminal
ROWS = 32  # games side by side: acting for many at once costs little more than for one


def measure(run: Run, device: str, plan: PlannerConfig | None = None) -> dict[str, dict[str, Any]]:
    """Evaluates the newest checkpoint; writes and returns results/evaluation-sampled.json and -greedy.json.

    Other episodes than the run's own are another result beside it: evaluation-sampled-episodes20.json.
    With a planner in the policy's place results/evaluation-planner.json, which also says how it planned.
    """
    config = run.config
    games = make_games(config.env, config.game, min(ROWS, config.episodes))
    try:
        agent = build.agent(config, games.spec, device)
        state = run.load_checkpoint(device)
        with run.understood():
            agent.load_state_dict(state["agent"])
        # What a population was judged by is no experience of the world model, and not among the run's steps.
        about = {"judged_in_real_game": state["real"]} if state.get("real") else {}
        if plan is None:
            return judge(run, games, lambda greedy: Player(agent, greedy=greedy), about)
        plan = planning(plan, config.policy)
        planner = Planner(agent.world_model, agent.learner.value, plan, config.policy.temperature)
        about |= {"planner": asdict(plan)}
        suffix = result_name("", plan, "method", "candidates", "horizon", "iterations", "repeat")
        return judge(run, games, lambda greedy: Player(agent, planner=planner), about, ("planner",), suffix)
    finally:
        games.close()


def judge(
    run: Run, games: Games, player: Callable[[bool], Acting], about: Mapping[str, Any],
    modes: Sequence[str] = ("sampled", "greedy"), suffix: str = "",
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Whole episodes of whoever `player(greedy)` is; writes and returns the results, with what is said `about`.

    `suffix` ends the names of the files.
    """
    console = Console(highlight=False)
    results = {}
    try:
        for mode in modes:
            began = time.monotonic()
            found = _play(player(mode == "greedy"), games, run, mode, console)
            summary: dict[str, Any] = dict(found.summary())
            score = human_normalised(run.config.env, summary["mean"])
            seconds = round(time.monotonic() - began, 1)
            summary |= {"policy": mode, "human_normalised": score, "evaluation_seconds": seconds} | dict(about)
            run.result("-".join(["evaluation", mode, *_otherwise(run)]) + suffix, summary)
            results[mode] = summary
            if len(found.film):
                run.video(run.step, f"evaluation-{mode}", found.film)
    finally:
        run.close()
    console.print(_table(run, results))
    return results


def _otherwise(run: Run) -> list[str]:
    """What was asked of the evaluation that the run does not have so: ["episodes20", "seed3"]."""
    asked, own = values(run.config), values(run.written)
    return [f"{key.split('.')[-1]}{asked[key]}" for key in OF_EPISODES if asked[key] != own[key]]


def _play(player: Acting, games: Games, run: Run, mode: str, console: Console) -> Evaluation:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"evaluating, {mode}", total=run.config.episodes)
        said = time.monotonic()

        def tell(done: int, mean: float | None, longest: int) -> None:
            nonlocal said
            text = f"evaluating, {mode}" + ("" if mean is None else f": mean {mean:.1f}")
            going = f", longest under way {longest:,} steps" if longest else ""
            bar.update(task, completed=done, description=text + going)
            if longest == LONG and not done:
                console.print(
                    f"No episode has ended after {LONG:,} steps: if the game has no end, stop (Ctrl-C) and evaluate "
                    "with game.max_steps=N.", soft_wrap=True
                )  # fmt: skip
            if not console.is_terminal and time.monotonic() - said > HEARTBEAT:
                console.print(f"{time.strftime('%H:%M:%S')}  {text}, {done} of {run.config.episodes} episodes{going}")
                said = time.monotonic()

        return evaluate_policy(
            player, games, run.config.episodes, seed=run.config.seed, film=mode != "greedy", tell=tell
        )


def _table(run: Run, results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=f"{run.config.env}, {run.config.episodes} episodes, step {run.step:,}")
    for name in ("policy", "mean", "std", "median", "lowest", "highest", "human-normalised"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for mode, result in results.items():
        score = result["human_normalised"]
        numbers = (result["mean"], result["std"], result["median"], min(result["returns"]), max(result["returns"]))
        table.add_row(mode, *(f"{value:.2f}" for value in numbers), "-" if score is None else f"{score:.3f}")
    return table
