"""What a run of Stable-Baselines3's PPO is: its configuration, and its folder, which is that of any other run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent import loop
from envs.atari import is_atari
from envs.errors import UserError
from envs.games import PROTOCOLS, GameConfig
from envs.gym import find as find_game
from envs.settings import setting
from runs.config_types import fill, values
from runs.folder.run import OUT, Run, find, read_json
from world_model.interface import Metric

PPO = "ppo"
SMALLEST = 36  # pixels of a picture, of which the three convolutions leave one
# Of GameConfig: what makes it the same game as another run's.
SAME = ("sticky", "noops", "action_repeat", "max_steps", "kwargs")
METRICS = {key: loop.METRICS[key] for key in ("episode/return", "memory_gb")} | {
    "updates": Metric("rollouts learned from so far"),
    "policy/learning_rate": Metric(
        "learning rate; falls to 0 over the processor hours (or steps)", panel="learning rate"
    ),
    "policy/clip_range": Metric(
        "how far the probability ratio may go from 1; falls to 0 over the processor hours (or steps)"
    ),
    "policy/entropy_loss": Metric("negative entropy of the policy, nats", panel="negative entropy"),
    "policy/policy_gradient_loss": Metric("clipped surrogate loss"),
    "policy/value_loss": Metric("squared error of the value against the lambda return", panel="value loss"),
    "policy/approx_kl": Metric("KL between the policy before and after an update, nats"),
    "policy/clip_fraction": Metric("share of samples whose ratio was clipped"),
    "policy/explained_variance": Metric("explained variance of the returns by the value", panel="explained variance"),
}


@dataclass(frozen=True)
class PpoNumbers:
    """Those that rl-baselines3-zoo tuned for Atari (hyperparams/ppo.yml); the last three are PPO's defaults."""

    n_steps: int = setting(128, 1, 10**6, help="steps of each game between two updates")
    n_epochs: int = setting(4, 1, 1000, help="passes over these steps")
    batch_size: int = setting(256, 2, 10**6, help="samples of a minibatch")
    learning_rate: float = setting(
        2.5e-4, above=0, high=1, help="learning rate at the start; falls linearly to 0 with the time (or steps) used"
    )
    clip_range: float = setting(0.1, above=0, high=1, help="clip range at the start; falls likewise")
    vf_coef: float = setting(0.5, 0, 100, help="weight of the value loss")
    ent_coef: float = setting(0.01, 0, 100, help="weight of the entropy bonus")
    gamma: float = setting(0.99, 0, 1, help="discount")
    gae_lambda: float = setting(0.95, 0, 1, help="lambda of the advantages")
    max_grad_norm: float = setting(0.5, above=0, high=1000, help="largest norm of a gradient")


@dataclass(frozen=True)
class PpoConfig:
    """What `python main.py ppo` takes, and what config.json then holds."""

    recipe: str = setting(PPO, choices=(PPO,), help="its name in tables")
    size: str = setting("NatureCNN", choices=("NatureCNN",), help="the network, of Mnih et al. 2015")
    env: str = setting("", help="any gymnasium id with pictures")
    protocol: str = setting("default", choices=tuple(PROTOCOLS), help="how the literature plays it")
    run: str = setting("", help="a run to compare with, instead of env and protocol: its game, and its hours")
    hours: float | None = setting(
        None, above=0, high=10_000, help="processor hours, all threads; those of run= when not given"
    )
    steps: int | None = setting(None, 1, 10**10, help="agent steps of the game to learn from, instead of hours")
    seed: int = setting(0, 0, 2**31 - 1, help="random seed")
    threads: int = setting(1, 1, 1024, help="torch threads")
    episodes: int = setting(100, 1, 10**6, help="whole episodes of the evaluation at the end")
    name: str = setting("", help="the new run's folder or name; an existing one is resumed")
    policy: PpoNumbers = field(default_factory=PpoNumbers)
    game: GameConfig = field(default_factory=lambda: GameConfig(size=84, gray=True, clip_rewards=True))

    def check(self) -> None:
        """Raises UserError when it is not said what is played, or for how long, or both are said twice."""
        if not (self.env or self.run or self.name):
            raise UserError("ppo needs env=... and hours=..., or run=NAME to compare with, or name=NAME to go on with.")
        if self.hours is not None and self.steps is not None:
            raise UserError("hours=... and steps=... both say when PPO stops: leave one out.")
        own = any(getattr(self.game, key) not in (None, {}) for key in SAME)  # 0 says something too
        if self.run and (self.env or self.protocol != "default" or own):
            told = ", ".join(["env", "protocol", *(f"game.{key}" for key in SAME)])
            raise UserError(f"run=... says which game is played: leave out {told}.")

    def told(self) -> PpoConfig:
        """With the game and the hours that `run` and `protocol` stand for.

        Raises:
            UserError: no such run or game, one that recorded no processor hours, or nobody says how many.
        """
        env, protocol, hours = self.env, self.protocol, self.hours
        if self.run:
            other = Run.open(self.run)
            env, protocol = other.config.env, other.config.protocol
            game = {key: getattr(other.config.game, key) for key in SAME}
            hours = hours if hours or self.steps else _used(other)
        else:
            game = {key: getattr(self.game, key) for key in SAME}
            means = PROTOCOLS[protocol]
            game |= {key: means[key] for key in SAME if key in means and game[key] is None}
        if not env:
            raise UserError(f"There is no run {self.name} to go on with: a new one needs env=... and hours=...")
        if hours is None and self.steps is None:
            raise UserError(f"hours=... is missing: how much processor time PPO may use for {env}; or steps=...")
        if min(self.game.frame_size) < SMALLEST:
            raise UserError(f"game.size must be at least {SMALLEST} pixels for {self.size}, not {self.game.size}.")
        if self.game.num_envs * self.policy.n_steps < 2:
            raise UserError("PPO cannot learn from one step alone: game.num_envs=2 or policy.n_steps=2 is the least.")
        # SB3's terminal_on_life_loss: the end of an episode for the learner, while the game goes on.
        made = replace(self.game, **game)
        made = replace(made, life_loss=is_atari(find_game(env, made.kwargs), made))
        return replace(self, env=env, protocol=protocol, hours=hours, game=made)


class PpoRun(Run):
    """The folder of a run of PPO."""

    config: PpoConfig  # type: ignore[assignment]

    @staticmethod
    def read(given: Mapping[str, Any]) -> Any:
        """The configuration from what config.json holds; raises UserError for a run of something else."""
        if given.get("recipe") != PPO:
            raise UserError(f"it is a run of {given.get('recipe')}, not of PPO.")
        return fill(PpoConfig(), given)

    @staticmethod
    def folder_of(name: str) -> Path:
        """Where a run of this name lies or will lie: a path, or a name under runs/out/."""
        return Path(name) if len(Path(name).parts) > 1 else OUT / name

    def check_asked(self, asked: PpoConfig) -> None:
        """Raises UserError for a key that is given and is not what the run began with."""
        own, default = values(self.config), values(PpoConfig())
        for key, value in values(asked).items():
            if key != "name" and value not in (default[key], own[key]):
                raise UserError(f"{key} was fixed when {self.folder} began: it is {own[key]}, not {value}.")


def open_run(path: str | Path) -> Run:
    """A run of either kind, for what needs no world model. Raises UserError as `Run.open` does."""
    folder = find(path)
    kind = PpoRun if read_json(folder / "config.json").get("recipe") == PPO else Run
    return kind.open(folder)


def _used(run: Run) -> float:
    """Processor hours of a run so far, where its process did all the work."""
    lines = run.metrics()
    known = [line["core_hours"] for line in lines if line.get("core_hours")]
    elsewhere = "a GPU" if str(run.meta.get("device", "")).startswith("cuda") else ""
    elsewhere = "worker processes" if any(line.get("real/generations") for line in lines) else elsewhere
    if elsewhere:
        raise UserError(
            f"{run.folder} was trained by {elsewhere} too, whose time is not counted: say hours=... yourself."
        )
    if not known:
        raise UserError(f"{run.folder} has recorded no processor hours: say hours=... yourself.")
    return float(known[-1])
