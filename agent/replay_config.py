"""The settings of the replay."""

from __future__ import annotations

from dataclasses import dataclass

from envs.settings import setting


@dataclass(frozen=True)
class ReplayConfig:
    """What is kept in memory and what is sampled from it."""

    memory_gb: float = setting(
        2.5,
        1e-3,
        resumable=True,
        help="bound on the episodes in memory, in 1e9 bytes; the oldest leave it and stay on disk (buffer size)",
    )
    recency: float = setting(0.0, 0, 1, help="share of the training segments drawn from the newest `recent_steps`")
    recent_steps: int = setting(50_000, 1, help="agent steps that count as recent")
    human_weight: float = setting(
        5.0, above=0, high=1e6, help="how much more often a person's (or an expert's) frames are drawn"
    )
    validation: float = setting(
        0.1, 0, 0.5, help="share of the episodes held out of training; videos and measurements use them"
    )
