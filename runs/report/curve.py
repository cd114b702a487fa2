"""The learning curve of a run as a picture: returns of the real game, and what its system declares to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.errors import UserError
from envs.settings import setting
from runs import build
from runs.config import Config
from runs.folder.files import write_figure
from runs.folder.ppo import METRICS, PpoRun, open_run
from runs.folder.run import Run
from runs.report.fitness_curve import draw_fitness
from runs.report.reconstructions import draw_reconstructions
from world_model.interface import Metric

POINTS = 100


def draw(run: Run) -> Path:
    """Draws returns of the real game and the run's own measures; returns the file. The points: results/curve.json.

    A run that evolves its policy has another figure: fitness by generation, and how vision and memory learned.
    """
    from matplotlib.figure import Figure  # late: half a second that most commands do not need

    figure, lines = Figure(figsize=(11, 6.5), layout="constrained"), run.metrics()
    run.result("curve", {"points": points(lines)})
    if any("policy/fitness" in line for line in lines):
        draw_fitness(figure, lines, run.config)
    else:
        _draw_returns(figure, lines, run.config, METRICS if isinstance(run, PpoRun) else build.metrics(run.config))
    path = run.folder / "pictures" / "curve.png"
    write_figure(path, figure)
    return path


def draw_beside(runs: Sequence[Run]) -> Path:
    """Draws the returns of several runs of one game against processor hours; returns the file, in the first's folder.

    Raises:
        UserError: they play different games.
    """
    from matplotlib.figure import Figure

    games = {run.config.env: run for run in runs}
    if len(games) > 1:
        told = ", ".join(f"{run.folder} is of {env}" for env, run in games.items())
        raise UserError(f"Runs of one game can be drawn in one picture: {told}.")
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axis = figure.add_subplot()
    for run in runs:
        config, lines = run.config, [line for line in run.metrics() if "episode/return" in line]
        known = all(line.get("core_hours") is not None for line in lines)
        hours = [line["core_hours" if known else "hours"] for line in lines]
        returns = np.array([line["episode/return"] for line in lines], dtype=float)
        label = f"{run.folder.name} ({config.recipe} {config.size}, seed {config.seed})"
        label += "" if known else ": hours of the wall clock, as it recorded no others"
        (drawn,) = axis.plot(hours, _mean_of_last(returns), label=label)
        axis.plot(hours, returns, ".", markersize=3, alpha=0.2, color=drawn.get_color())
    axis.set(xlabel="processor hours", ylabel="return (games while training, mean of the last 20 points)")
    axis.set_title(runs[0].config.env)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")
    path = runs[0].folder / "pictures" / "curves.png"
    write_figure(path, figure)
    return path


def points(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The learning curve in at most `POINTS` points: means of step, hours, processor hours and return of neighbours."""
    told = [line for line in lines if "episode/return" in line]
    found = []
    for part in np.array_split(np.arange(len(told)), min(POINTS, len(told))) if told else []:
        some = [told[i] for i in part]
        keys = [key for key in ("step", "hours", "core_hours", "episode/return") if all(key in one for one in some)]
        found.append({key.split("/")[-1]: round(float(np.mean([one[key] for one in some])), 5) for key in keys})
    return found


def _draw_returns(figure: Any, lines: list[dict[str, Any]], config: Config, metrics: Mapping[str, Metric]) -> None:
    """Returns of the real game and five of the run's own measures against agent steps.

    Of a world model alone these measures against processor hours: it may have learned for long from the same steps.
    """
    panels = {key: metric.panel for key, metric in metrics.items() if metric.panel}
    known = [key for key in panels if any(key in line for line in lines)][:5]
    title = f"{config.env}, {config.recipe} {config.size}, seed {config.seed}"
    alone = isinstance(config, Config) and not config.train.policy
    if alone:
        grid = figure.add_gridspec(1, max(1, len(known)))
        figure.suptitle(f"{title}: the world model alone")
    else:
        grid = figure.add_gridspec(2, max(4, len(known)), height_ratios=(2, 1))
        _returns(figure.add_subplot(grid[0, :]), lines, title)
    for i, key in enumerate(known):
        axis = figure.add_subplot(grid[-1, i])
        if alone:
            told = [line for line in lines if key in line]
            hours = "core_hours" if all("core_hours" in line for line in told) else "hours"
            axis.plot([line[hours] for line in told], [line[key] for line in told], "o-", markersize=3)
            axis.set(xlabel="processor hours" if hours == "core_hours" else "hours", ylim=(0, None))
        else:
            rounds = [line for line in lines if "rounds" in line or "updates" in line]  # without the pretraining
            axis.plot(*_series(rounds, key), linewidth=0.8)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.locator_params(axis="x", nbins=3)
        axis.set_title(panels[key], fontsize=8)
        axis.tick_params(labelsize=7)


def _returns(axis: Any, lines: list[dict[str, Any]], title: str) -> None:
    steps, returns = _series(lines, "episode/return")
    axis.plot(steps, returns, ".", markersize=3, alpha=0.35, label="games while training (policy sampled)")
    window = max(1, min(20, len(returns) // 5))
    axis.plot(steps, _mean_of_last(returns, window), label=f"mean of the last {window} points")
    if any(line["hours"] > 0 for line in lines):
        axis.secondary_xaxis("top", functions=_hours(lines)).set_xlabel("hours")
    axis.set(xlabel="agent steps of the real game", ylabel="return", title=title)
    axis.set_xlim(0, 1.02 * max((line["step"] for line in lines), default=1))  # also of one point alone
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.legend(loc="upper left")


def _mean_of_last(values: np.ndarray, window: int = 20) -> list[float]:
    return [float(values[max(0, i - window + 1) : i + 1].mean()) for i in range(len(values))]


def _hours(lines: list[dict[str, Any]]) -> tuple[Any, Any]:
    steps = np.array([0.0, *(line["step"] for line in lines)])
    hours = np.array([0.0, *(line["hours"] for line in lines)])
    keep = np.concatenate([[True], np.diff(steps) > 0])  # the pretraining logs several times at one step
    steps, hours = steps[keep], hours[keep]
    return (lambda step: np.interp(step, steps, hours)), (lambda hour: np.interp(hour, hours, steps))


def _series(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(line["step"], line[key]) for line in lines if key in line]
    array = np.array(found, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


@dataclass(frozen=True)
class CurveConfig:
    """What `python main.py curve` takes."""

    run: str = setting("", required=True, help="a run's folder or name")
    beside: tuple[str, ...] = setting((), help="others, drawn with it in one picture against processor hours: A,B")


def command(asked: CurveConfig) -> None:
    """Draws the curve of the run and its reconstructions over training, or the curves of several in one picture."""
    runs = [open_run(name) for name in (asked.run, *asked.beside)]
    if asked.beside:
        print(draw_beside(runs))
        return
    print(draw(runs[0]))
    if drawn := draw_reconstructions(runs[0]):
        print(drawn)
