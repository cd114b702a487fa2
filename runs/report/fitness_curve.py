"""The learning curve of a run whose policy evolves: fitness by generation, vision, memory, and games while collecting.

Shapes: G generations of the whole run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runs.config import Config

Line = dict[str, Any]  # of metrics.jsonl
PAPER = {1: -54.6, 25: 668, 50: 767, 100: 799, 200: 823}  # generation: mean of the population, of 1,800 in their log
WIDEST = 25  # generations shown at least beside the paper's, whose second number this is
COLOURS = {"dream": "tab:purple", "real": "tab:orange"}
NAMES = {"dream": "in the dream", "real": "in the real game"}


class Generations(NamedTuple):
    """What was logged of each generation, (G,) each."""

    number: np.ndarray  # counted over the whole run, from 1
    mean: np.ndarray
    std: np.ndarray
    best: np.ndarray
    real: np.ndarray  # bool: judged in the real game
    phase: np.ndarray  # int: which Gaussian it was of; each begins anew around the mean of the one before


def draw_fitness(figure: Any, lines: list[Line], config: Config) -> None:
    """Draws on an empty matplotlib figure what metrics.jsonl tells of such a run."""
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 2))
    title = f"{config.env}, {config.recipe} {config.size}, seed {config.seed}"
    _fitness(figure.add_subplot(grid[0, :]), generations(lines), title, paper=config.env.startswith("CarRacing"))
    _vision(figure.add_subplot(grid[1, 0]), lines, config)
    _memory(figure.add_subplot(grid[1, 1]), lines, config)
    _games(figure.add_subplot(grid[1, 2]), lines)


def generations(lines: list[Line]) -> Generations:
    """Counts the generations of all phases, and tells those of the real game: `real/generations` grew."""
    rows: list[tuple[Any, ...]] = []
    before, own, played, phase, real = 0.0, 0.0, 0.0, 0, False
    for line in lines:
        now = line.get("real/generations", played)
        if "policy/fitness" in line:
            number = line.get("policy/generation", own + 1)  # within its phase
            if 1 < number <= own:  # once more, after a run was killed between log and checkpoint
                rows = [row for row in rows if row[0] < before + number]
            else:
                real = now > played
                if number <= own:
                    before, phase = before + own, phase + 1
            own = number
            measured = (line.get(f"policy/{key}") for key in ("fitness", "fitness_std", "fitness_best"))
            rows.append((before + own, *measured, real, phase))
        played = now
    number, mean, std, best, judged, phases = np.array(rows, dtype=float).reshape(-1, 6).T
    return Generations(number, mean, std, best, judged.astype(bool), phases.astype(int))


def _fitness(axis: Any, found: Generations, title: str, *, paper: bool) -> None:
    named = set()
    # A line joins what one Gaussian reached in one place; a dream's fitness and the real game's are not of one kind.
    for where, part in _parts(found):
        x, mean, std, best = (numbers[part] for numbers in (found.number, found.mean, found.std, found.best))
        look, label = {"color": COLOURS[where]}, where not in named
        axis.axvspan(x[0] - 0.5, x[-1] + 0.5, **look, alpha=0.07, linewidth=0)
        axis.fill_between(x, mean - std, mean + std, **look, alpha=0.25, linewidth=0)
        text = f"{NAMES[where]}: mean of the population ± 1 std"
        axis.plot(x, mean, **look, marker=".", markersize=4, label=text if label else None)
        axis.plot(x, best, **look, linewidth=0.8, linestyle=":", label=f"{NAMES[where]}: best" if label else None)
        named.add(where)
    last = found.number.max()
    if paper:
        last = max(last, WIDEST)
        axis.plot([*PAPER], [*PAPER.values()], "k--", linewidth=1, label="Ha & Schmidhuber, their log, real game")
    axis.set(xlim=(0.5, last + 0.5), xlabel="generation, counted over the whole run", title=title)
    axis.set_ylabel("fitness: mean return less decay")
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _parts(found: Generations) -> list[tuple[str, slice]]:
    """Where each stretch of one phase in one place was, and which generations it has."""
    changes = np.flatnonzero(np.diff(found.phase).astype(bool) | np.diff(found.real)) + 1
    bounds = [0, *changes.tolist(), len(found.number)]
    return [("real" if found.real[a] else "dream", slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]


def _vision(axis: Any, lines: list[Line], config: Config) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    x, (pixels, kl, nats) = _learned(lines, "vision", ("pixels", "kl", "kl_nats"), config)
    kl = np.where(np.isnan(kl), nats, kl)
    axis.plot(x, pixels + kl, ".-", markersize=3, linewidth=1, label="loss: squared error + KL")
    axis.plot(x, nats, ".-", markersize=3, linewidth=1, label="KL, nats")
    _finish(axis, "vision", "updates", labelled=bool(len(x)))
    if len(x):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def _memory(axis: Any, lines: list[Line], config: Config) -> None:
    x, (nll, unexplained) = _learned(lines, "memory", ("nll", "reward_unexplained"), config)
    axis.plot(x, nll, ".-", markersize=3, linewidth=1, label="surprise, nats a dimension")
    axis.plot(x, unexplained, ".-", markersize=3, linewidth=1, label="share of the reward unexplained")
    _finish(axis, "memory", "updates", labelled=bool(len(x)))


def _games(axis: Any, lines: list[Line]) -> None:
    found = [(line["step"], line["episode/return"]) for line in lines if "episode/return" in line]
    x, y = np.array(found, dtype=float).reshape(-1, 2).T
    axis.plot(x, y, "o-", markersize=4, linewidth=1)
    _finish(axis, "mean return of the games collected", "agent steps of the real game")


def _finish(axis: Any, title: str, xlabel: str, *, labelled: bool = False) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(xlabel, fontsize=8)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.locator_params(axis="x", nbins=4, integer=True)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    if labelled:
        axis.legend(fontsize=7)


def _learned(lines: list[Line], stage: str, keys: tuple[str, ...], config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Updates of a stage (N,) and its measures (len(keys), N), nan where not logged.

    Updates are not logged but follow from the schedule: a line every `log_every` of a round's, and one for the rest.
    """
    a_round, every = getattr(config.model, f"{stage}_updates", 0), config.train.log_every
    told: dict[int, int] = {}  # lines of each round
    rows = []
    for line in lines:
        if f"{stage}/{keys[0]}" not in line:
            continue
        number = int(line["rounds"] if "rounds" in line else line.get("updates", 0))
        told[number] = told.get(number, 0) + 1
        done = min(told[number] * every, a_round) if a_round else told[number] * every
        rows.append((number * a_round + done, *(line.get(f"{stage}/{key}", np.nan) for key in keys)))
    table = np.array(rows, dtype=float).reshape(-1, 1 + len(keys)).T
    return table[0], table[1:]
