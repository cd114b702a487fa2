"""The configuration of a run: one frozen dataclass, the same top-level keys for every recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agent.replay import ReplayConfig
from agent.trainer import TrainConfig
from envs.errors import UserError, nearest
from envs.games import GameConfig
from runs.config_types import values

SIZES = ("toy", "xs", "s", "m")
PRECISIONS = ("auto", "bf16", "fp32")
LEAST = {  # every other count of a model, policy or schedule is at least 0
    **{"steps": 1, "episodes": 1, "seed": 0, "threads": 0, "workers": 0},
    **{"train.steps_per_update": 1, "train.prefill": 1, "train.log_every": 1, "train.show_every": 1},
    **{"model.batch_size": 1, "model.length": 2, "policy.horizon": 1, "policy.minibatches": 1, "policy.passes": 1},
}
RESUMABLE = (  # what a resumed run may change: how long, how fast and on how much it learns, and where it works
    "steps", "episodes", "device", "threads", "workers", "cluster",
    "model.vision_updates", "model.memory_updates", "model.tokenizer_updates", "model.updates",
    "policy.updates", "policy.passes", "policy.where", "policy.generations", "policy.rollouts",
    "policy.real_generations", "policy.real_rollouts",
    "model.lr", "model.tokenizer_lr", "policy.lr", "policy.actor_lr", "policy.critic_lr",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run does. A recipe returns one, the command line changes single keys of it."""

    recipe: str
    size: str
    model: Any  # the recipe's own dataclasses: of its world model
    policy: Any  # and of its policy
    train: TrainConfig
    env: str = "ALE/Pong-v5"
    protocol: str = "default"
    seed: int = 0
    steps: int = 400_000  # agent steps of the real game
    episodes: int = 100  # of an evaluation
    device: str = "auto"
    threads: int = 0  # of torch; 0 measures at the start how many are fastest
    init_replay: str = ""  # another run, whose episodes come before the first step
    workers: int = 0  # processes that play the real game for a population; 0: one a core, none of their own on one core
    cluster: str = ""  # a Ray cluster that plays it instead: "local", "auto" or an address
    game: GameConfig = field(default_factory=GameConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)

    def check(self) -> None:
        """Raises UserError naming the first value that is out of range."""
        self.game.check()
        numbers = values(self)
        for key, value in numbers.items():
            counts = key.startswith(("model.", "policy.", "train.")) and type(value) is int
            least = LEAST.get(key, 0 if counts else None)
            if least is not None and value < least:
                raise UserError(f"{key} must be at least {least}, not {value}.")
        if not 0 <= self.train.at_start <= 1:
            raise UserError(f"train.at_start must be between 0 and 1, not {self.train.at_start}.")
        if self.train.precision not in PRECISIONS:
            hint = nearest(self.train.precision, PRECISIONS)
            raise UserError(f'train.precision is one of {", ".join(PRECISIONS)}, not "{self.train.precision}". {hint}')
