"""Scores of the 26 games of Atari 100k (Kaiser et al. 2020) and their aggregates (Agarwal et al. 2021).

`atari100k_scores.json` beside this file holds what random play, people and published systems reach.

Shapes: G games, S seeds (which may differ from game to game), E episodes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

PUBLISHED = Path(__file__).with_name("atari100k_scores.json")
RESAMPLES = 2_000
Score = TypeVar("Score", float, np.ndarray)
Returns = Mapping[str, Sequence[Sequence[float]]]  # game -> of each seed, the returns of its episodes


class Estimate(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@cache
def published() -> dict[str, dict[str, float]]:
    """Mean scores in the games' own units: game -> {"Random", "Human", and each published system}."""
    games: dict[str, dict[str, float]] = json.loads(PUBLISHED.read_text())["games"]
    return games


def systems() -> tuple[str, ...]:
    """The published systems, in the order of their publication."""
    return tuple(name for name in next(iter(published().values())) if name not in ("Random", "Human"))


def game_of(env: str) -> str:
    """The game of a gymnasium id: ALE/Pong-v5 and PongNoFrameskip-v4 are Pong."""
    return env.removeprefix("ALE/").split("-")[0].removesuffix("NoFrameskip")


def human_normalised(env: str, score: float) -> float | None:
    """`normalised` for a gymnasium id; None for a game without published scores."""
    game = game_of(env)
    return normalised(game, score) if game in published() else None


def normalised(game: str, score: Score) -> Score:
    """(score - random) / (human - random) of a game of the 26; raises KeyError for another."""
    low, high = published()[game]["Random"], published()[game]["Human"]
    return (score - low) / (high - low)  # type: ignore[return-value]


def aggregates(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Aggregates of human-normalised scores: of each of G games, its S scores (Agarwal et al. 2021, section 4).

    Mean and median are taken over the games' means; the interquartile mean over all scores without the lowest and the
    highest quarter; the optimality gap is what is missing to 1 on average, where nothing above 1 counts. Every game
    counts alike, however many seeds it has: those with fewer count several times each.
    """
    means = np.array([np.mean(of_game) for of_game in scores])
    seeds = math.lcm(*(len(of_game) for of_game in scores))
    every = np.sort(np.concatenate([np.repeat(np.asarray(one, dtype=float), seeds // len(one)) for one in scores]))
    cut = len(every) // 4
    return {
        "mean": float(means.mean()),
        "median": float(np.median(means)),
        "iqm": float(every[cut : len(every) - cut].mean()),
        "optimality_gap": float((1 - np.minimum(every, 1)).mean()),
    }


def estimates(returns: Returns, *, seed: int = 0) -> dict[str, Estimate]:
    """Aggregates with 95 % intervals by a bootstrap stratified by game.

    In each resample every game keeps its number of seeds, drawn with replacement: their means differ for the episodes
    as well as for the seeds. Of a game with one seed the episodes are drawn instead, so that the interval does not tell
    how differently seeds turn out.

    Raises KeyError for a game without published scores.
    """
    rng = np.random.default_rng(seed)
    normal = [
        [normalised(game, np.asarray(episodes, dtype=float)) for episodes in played] for game, played in returns.items()
    ]
    found = aggregates([[float(episodes.mean()) for episodes in of_seeds] for of_seeds in normal])
    drawn = []
    for _ in range(RESAMPLES):
        scores = []
        for of_seeds in normal:
            if len(of_seeds) == 1:
                scores.append([float(rng.choice(of_seeds[0], len(of_seeds[0])).mean())])
            else:
                scores.append(rng.choice([episodes.mean() for episodes in of_seeds], len(of_seeds)).tolist())
        drawn.append(aggregates(scores))
    bounds = {name: np.percentile([one[name] for one in drawn], (2.5, 97.5)) for name in found}
    return {name: Estimate(value, float(bounds[name][0]), float(bounds[name][1])) for name, value in found.items()}
