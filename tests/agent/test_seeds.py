"""Whose episode is which."""

from __future__ import annotations

from itertools import combinations

from agent import seeds
from agent.seeds import episode_seed


def test_no_two_purposes_play_the_same_episodes() -> None:
    offsets = [0, seeds.EVALUATION_SEED, seeds.TRACK_SEED, seeds.SUITE_SEED, seeds.CLOCK_SEED]
    played = [{episode_seed(offset + run, n) for n in range(200)} for offset in offsets for run in range(3)]
    assert all(len(a & b) <= 1 for a, b in combinations(played, 2)), "but for chance"
    assert all(0 <= seed < 2**31 for seed in set().union(*played))
