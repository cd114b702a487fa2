"""The configuration of a run: one frozen dataclass, the same top-level keys for every recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agent.replay import ReplayConfig
from agent.trainer import TrainConfig
from envs import settings
from envs.errors import UserError
from envs.games import GameConfig
from envs.settings import Setting, setting

SIZES = ("toy", "xs", "s", "m")
# What keys of older runs are called now: read in config.json, checkpoints, packed models and on the command line.
OLD_NAMES = {
    "experience": "init_replay",
    "policy.passes": "policy.epochs",
    "policy.ratio": "policy.clip_ratio",
    "model.steps": "model.context_frames",
    "game.num": "game.num_envs",
    "train.steps_per_update": "train.steps_per_round",
    "as": "variant",  # of publish
}
# What runs did before there was a key to say it, where that is not the default: of a config.json without the key.
BEFORE = {
    "model.cont_from": "features",
    "model.entropy_scale": 0.0,
    "model.dreamed_reward": 0.0,
    "train.bursts": 0.0,
    "model.dynamics": "gpt",
}


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run does. A recipe returns one, the command line changes single keys of it."""

    recipe: str = field(metadata={"setting": Setting(help="which system, or MODULE:FUNCTION")})
    size: str = field(metadata={"setting": Setting(help="toy, xs, s or m; chosen by the device when not given")})
    model: Any  # the recipe's own dataclasses: of its world model
    policy: Any  # and of its policy
    train: TrainConfig
    env: str = setting("ALE/Pong-v5", help="any gymnasium id with pictures")
    protocol: str = setting(
        "default",
        help="default: the gymnasium id as registered; atari100k: steps=100000 game.sticky=0 "
        "game.noops=30 game.life_loss=true replay.validation=0",
    )
    seed: int = setting(0, 0, 2**63 - 1, help="seed of everything random")
    steps: int = setting(400_000, 1, resumable=True, help="agent steps of the real game (environment steps)")
    episodes: int = setting(100, 1, resumable=True, help="whole episodes of an evaluation")
    device: str = setting("auto", resumable=True, help="auto, cpu or cuda")
    threads: int = setting(
        0, 0, 1024, resumable=True, help="torch threads; 0 measures at the start how many are fastest"
    )
    init_replay: str | tuple[str, ...] = setting(
        "",
        help="another run or a folder of episodes, or several as in 'init_replay=[a,b]': replay before the first step",
    )
    workers: int = setting(
        0,
        0,
        1024,
        resumable=True,
        help="world_models alone: processes that play the real game for its population; 0: one a core. "
        "Parallel environments are game.num_envs",
    )
    cluster: str = setting(
        "", resumable=True, help="world_models alone: a Ray cluster that does so instead: 'local', 'auto' or an address"
    )
    game: GameConfig = field(default_factory=GameConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)

    def check(self) -> None:
        """Raises UserError naming the first value that is out of range, or that does not go with another."""
        settings.check(self)
        if self.steps < self.train.prefill:
            raise UserError(
                f"steps must be at least train.prefill, the {self.train.prefill:,} steps of random play that learning "
                f"begins with, not {self.steps:,}."
            )
        length = getattr(self.model, "length", None)  # where dreams start from the segments that the model trains on
        if length is not None and self.train.burn_in >= length:
            raise UserError(f"train.burn_in must be below model.length, {length}, not {self.train.burn_in}.")

    def unread(self, key: str) -> str | None:
        """Why nothing reads this key, where its own rule cannot say so; see `settings.unread`."""
        if key in ("workers", "cluster") and not hasattr(self.policy, "population"):
            return (f"{key} changes nothing here: it is for a population in the real game, as recipe=world_models has "
                    "it. Parallel environments are game.num_envs.")  # fmt: skip
        return None


def recordings(config: Config) -> tuple[str, ...]:
    """What `init_replay` names, one or several."""
    named = config.init_replay
    return tuple(name for name in ((named,) if isinstance(named, str) else named) if name)


def resumable(config: Config) -> tuple[str, ...]:
    """The keys that a resumed run may change: how long, how fast and on how much it learns, and where it works."""
    found = [key for key, _, rule in settings.walk(config) if rule.resumable]
    return tuple(sorted(found, key=lambda key: "." in key))  # those without a group first
