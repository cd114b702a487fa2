"""The settings of the replay."""

from __future__ import annotations

from dataclasses import dataclass

from envs.errors import UserError


@dataclass(frozen=True)
class ReplayConfig:
    """What is kept in memory and what is sampled from it."""

    memory_gb: float = 2.5  # bound on the episodes in memory, 1e9 bytes; the oldest leave (and stay on disk)
    recency: float = 0.0  # share of the training segments that is drawn from the newest `recent_steps`
    recent_steps: int = 50_000  # agent steps
    human_weight: float = 5.0  # how much more often a person's (or an expert's) frames are drawn
    validation: float = 0.1  # share of the episodes that is never trained on, and shown instead

    def __post_init__(self) -> None:
        for name, good, wish in (
            ("memory_gb", self.memory_gb > 0, "positive"),
            ("recency", 0 <= self.recency <= 1, "between 0 and 1"),
            ("recent_steps", self.recent_steps > 0, "positive"),
            ("validation", 0 <= self.validation <= 0.5, "between 0 and 0.5"),
            ("human_weight", 0 < self.human_weight < float("inf"), "positive"),
        ):
            if not good:
                raise UserError(f"replay.{name} is {getattr(self, name)} and must be {wish}.")
