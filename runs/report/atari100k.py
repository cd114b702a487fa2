"""Atari 100k as one table and one picture, from the results of finished runs, beside what is published elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runs.folder.files import write_figure
from runs.folder.ppo import PPO
from runs.measure.scores import Estimate, aggregates, estimates, game_of, normalised, published, systems
from runs.report.publish import markdown

PROTOCOL, POLICY, SIZE = "atari100k", "sampled", "xs"
BESIDE = ("DreamerV3-2023", "STORM")  # drawn in the picture
TITLES = {"mean": "mean", "median": "median", "iqm": "IQM", "optimality_gap": "optimality gap"}
STEPS, EPISODES = 100_000, 100
MORE = 4_096  # agent steps by which a run may be longer: all of its games play whole steps
COLUMNS = 5
PAGE = """\
# Atari 100k

100,000 agent steps of each game (400,000 frames), no sticky actions, up to 30 no-ops at the start, life loss terminal
in training; then 100 whole games with the sampled policy. `python main.py atari100k` makes such a table: it runs what
is missing, resumes what was stopped and skips what is finished. Human-normalised: 0 is random play, 1 a person (Kaiser
et al. 2020). IQM: the mean of the middle half (plain mean below four scores; Agarwal et al. 2021); intervals are of
95 %, by a bootstrap over the seeds of each game, or with one seed, over its episodes, which says nothing about variance
between seeds. Core-hours are processor time; with a GPU, the host's: see [On a GPU](gpu.md). The other systems' columns
are means over five seeds, trained on GPUs, and aggregated over the same games from these means. Over all 26 games and
single runs their IQM is 0.501 (IRIS), 0.49 to 0.52 (DreamerV3) and 0.561 (STORM)."""


def load(files: Iterable[Path], steps: int | None = STEPS, episodes: int = EPISODES) -> list[dict[str, Any]]:
    """The results among `files` that count: sampled, of this protocol, `steps` and so many `episodes`, of the 26 games.

    None loads the baseline instead, PPO's, which is given time and not steps.
    Each with its file's name under "file" and its learning curve, where one lies beside it, under "points".
    """
    found = []
    for path in sorted(files):
        told = json.loads(path.read_text())
        known = isinstance(told.get("env"), str) and game_of(told["env"]) in published()
        counts = told.get("protocol") == PROTOCOL and told.get("policy") == POLICY and "variant" not in told
        counts = counts and told["episodes"] >= episodes
        if steps is None:
            counts &= told.get("recipe") == PPO
        else:
            counts &= told.get("recipe") != PPO and steps <= told["env_steps"] < steps + MORE
        if known and counts:
            beside = path.with_name(path.name.removesuffix(f"evaluation-{POLICY}.json") + "curve.json")
            points = json.loads(beside.read_text())["points"] if beside.exists() else []
            found.append(told | {"game": game_of(told["env"]), "file": path.name, "points": points})
    return found


def summary(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every game's scores and the aggregates with their intervals, as plain JSON; of at least one entry.

    The published systems are aggregated over the same games, of each of which their papers' mean is one score.
    """
    games: dict[str, list[Mapping[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: (entry["game"], entry["seed"])):
        games.setdefault(entry["game"], []).append(entry)
    rows = {}
    for game, of_seeds in games.items():
        score = float(np.mean([entry["mean"] for entry in of_seeds]))
        rows[game] = {
            "score": score,
            "human_normalised": normalised(game, score),
            "seeds": [entry["seed"] for entry in of_seeds],
            "scores": [entry["mean"] for entry in of_seeds],
            "episodes": [entry["episodes"] for entry in of_seeds],
            "core_hours": [entry.get("core_hours") for entry in of_seeds],
            "hours": [entry["hours"] for entry in of_seeds],
            "on_a_gpu": [on_a_gpu(entry) for entry in of_seeds],
            "files": [entry["file"] for entry in of_seeds],
        }
    found = estimates({game: [entry["returns"] for entry in of_seeds] for game, of_seeds in games.items()})
    others = {
        system: aggregates([[normalised(game, published()[game][system])] for game in games]) for system in systems()
    }
    missing = [game for game in published() if game not in games]
    return {
        "protocol": PROTOCOL, "policy": POLICY, "games": rows, "missing": missing,
        "aggregates": {name: estimate._asdict() for name, estimate in found.items()}, "published": others,
    }  # fmt: skip


def lines(told: Mapping[str, Any], ours: str, beside: Sequence[str]) -> list[tuple[str, ...]]:
    """The table of a summary as text: a heading, a line a game, and the aggregates, each after its interval.

    `ours` heads our own column; `beside` are the published systems that are shown.
    """
    heading = ("game", ours, "core-hours", "human-normalised", "random", "human", *beside)
    rows = []
    for game, row in told["games"].items():
        known = published()[game]
        several = f" ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else ""
        spent = [value for value in row["core_hours"] if value is not None]
        beside_it = " and a GPU" if any(row["on_a_gpu"]) else ""
        rows.append((
            game, _score(row["score"]) + several, f"{np.mean(spent):.2f}{beside_it}" if spent else "-",
            f"{row['human_normalised']:.3f}", *(_score(known[name]) for name in ("Random", "Human", *beside)),
        ))  # fmt: skip
    for name, title in TITLES.items():
        estimate = Estimate(**told["aggregates"][name])
        value = f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
        rows.append((
            f"{title}, human-normalised", "", "", value, "", "",
            *(f"{told['published'][system][name]:.3f}" for system in beside),
        ))  # fmt: skip
    return [heading, *rows]


def on_a_gpu(entry: Mapping[str, Any]) -> bool:
    """Whether a run was trained on one."""
    return str(entry.get("training", {}).get("device", "cpu")).startswith("cuda")


def _score(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def page(results: Path) -> str:
    """docs/atari100k.md: a table for each system that has published results, and the picture where there is one."""
    systems_here = _published_here(results)
    text = [PAGE]
    for system, own in systems_here.items():
        told = summary(own)
        heading, *rows = lines(told, f"`{system}`", systems())
        commands = sorted({_general(entry["training"]["command"]) for entry in own})
        text.append(f"## {system}, {len(told['games'])} of 26 games")
        text.append(markdown(heading, rows))
        commits = ", ".join(sorted({entry["training"]["commit"][:7] for entry in own}))
        text.append(
            "With the settings of " + "; ".join(f"`{command}`" for command in commands)
            + f",\nat the commits {commits}: each game's file names its own, and a newer one may learn otherwise."
        )  # fmt: skip
    if systems_here:
        text.append("![learning curves](atari100k.png), and [all figures as JSON](atari100k.json).")
    return "\n\n".join(text)


def numbers(results: Path) -> str:
    """docs/atari100k.json: what the page's tables are made of, by system."""
    return json.dumps({system: summary(own) for system, own in _published_here(results).items()}, indent=1)


def _published_here(results: Path) -> dict[str, list[dict[str, Any]]]:
    """By recipe, and size where it is not the usual one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in load(results.glob(f"*-evaluation-{POLICY}.json")):
        size = "" if entry["size"] == SIZE else f" {entry['size']}"
        found.setdefault(entry["recipe"] + size, []).append(entry)
    return found


def _general(command: str) -> str:
    """A run's command line as one for all games: without what differs from run to run, or is the benchmark's own."""
    own = ("env=", "seed=", "hydra.", "name=", "run=", "protocol=")
    _, _, *words = (word for word in command.split() if not word.startswith(own))
    return " ".join(["python main.py atari100k", *sorted(words)])


def picture(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the learning curve of every game of the entries against processor hours into a PNG file."""
    from matplotlib.figure import Figure  # late: half a second that most commands do not need

    games = sorted({entry["game"] for entry in entries})
    down = -(-len(games) // COLUMNS)
    figure = Figure(figsize=(3.1 * min(COLUMNS, len(games)), 2.4 * down + 0.5), layout="constrained")
    for place, game in enumerate(games):
        axis = figure.add_subplot(down, min(COLUMNS, len(games)), place + 1)
        for entry in (entry for entry in entries if entry["game"] == game):
            _curve(axis, entry)
        known = published()[game]
        for name, style in zip(("Human", *BESIDE), ("--", ":", "-."), strict=True):
            axis.axhline(known[name], color="gray", linewidth=0.8, linestyle=style, label=name)
        axis.set_title(game, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("processor hours", fontsize=7)
        axis.locator_params(axis="both", nbins=4)
    shown = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(COLUMNS, len(games)), fontsize=8)
    write_figure(path, figure)


def _curve(axis: Any, entry: Mapping[str, Any]) -> None:
    color = "tab:orange" if entry["recipe"] == PPO else "tab:green" if on_a_gpu(entry) else "tab:blue"
    points = [point for point in entry["points"] if point.get("core_hours") is not None]
    if points:
        hours = [point["core_hours"] for point in points]
        axis.plot(hours, [point["return"] for point in points], color=color, linewidth=1)
    if entry.get("core_hours") is None:  # an older run: nobody knows where its point belongs
        return
    label = f"{entry['recipe']}, after training{' on a GPU' if on_a_gpu(entry) else ''}"
    axis.plot([entry["core_hours"]], [entry["mean"]], "o", color=color, markersize=4, label=label)
