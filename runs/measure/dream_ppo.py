"""The command `dream_ppo`: what somebody else's agent learns in the dream.

Stable-Baselines3's PPO sees nothing but the dream of the run, four pictures at a time or the features of its states,
and is then measured in the real game beside random play, over the same whole episodes. Writes results/dream-ppo.json,
or dream-ppo-features.json, in the run's folder; of a packed model under runs/out/.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from rich.console import Console
from torch import Tensor

from agent.evaluate import evaluate_policy
from agent.player import Player
from envs.controls import Controls
from envs.errors import UserError
from envs.make import make_games
from envs.settings import setting
from runs.dreams import Loaded, load_parts
from runs.folder.progress import Progress
from runs.folder.run import keep, result_name
from runs.folder.system import cores, keep_freed_memory
from world_model.dream.batch import OBSERVATIONS
from world_model.dream.envs import DreamVectorEnv
from world_model.interface import to_pixels

if TYPE_CHECKING:
    from stable_baselines3 import PPO

STACK = 4  # pictures: one alone does not show where a ball flies
PARTS = 10  # of the learning, after each of which the returns are noted
# Of PPO on Atari (Schulman et al. 2017, table 5), with longer rollouts of more rows, because dreams are batched.
NUMBERS: dict[str, Any] = {
    "n_steps": 128, "batch_size": 256, "n_epochs": 4, "learning_rate": 2.5e-4, "clip_range": 0.1, "ent_coef": 0.01,
}  # fmt: skip
OTHERWISE = ("starts", "horizon", "temperature", "steps", "seed")  # named in a result that has them otherwise
HIDDEN = (256, 256)  # of the networks on features


@dataclass(frozen=True)
class DreamPpoConfig:
    """What `python main.py dream_ppo` takes."""

    run: str = setting("", required=True, help="a run's folder or name, or a packed model")
    steps: int = setting(200_000, 1, 10**10, help="dreamed steps")
    dreams: int = setting(64, 1, 4096, help="dreams side by side")
    horizon: int = setting(32, 1, 10**6, help="steps after which a dream restarts, before it strays from the game")
    starts: int | None = setting(
        1024,
        1,
        10**6,
        help="moments that dreams begin from, of all play of the run; null: the few kept with its weights",
    )
    obs_type: str = setting("rgb", choices=OBSERVATIONS, help="what it sees: pictures, or the features of the states")
    temperature: float | None = setting(
        None, 0, 100, help="temperature of the dream; that of the policy's training when not given"
    )
    episodes: int = setting(30, 1, 10**6, help="evaluation episodes, of the real game")
    seed: int = setting(0, 0, 2**31 - 1, help="random seed")
    threads: int = setting(0, 0, 1024, help="torch threads; 0: all cores")


class FeatureStudent:
    """PPO at the controls of N real games that the model's own `player` follows: it sees the features of its states."""

    def __init__(self, ppo: PPO, controls: Controls, player: Player) -> None:
        self.ppo, self.controls, self.player = ppo, controls, player

    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Frames (N, C, H, W) uint8; is_first (N,) bool: an episode begins -> actions as Games.step takes them."""
        features = self.player.follow(frames, is_first).float().cpu().numpy()
        action = self.controls.normalised(self.ppo.predict(features, deterministic=False)[0])
        self.player.took(action)
        return action


class Student:
    """PPO at the controls of N real games: stacks pictures as it saw them when it learned.

    With the `controls` of a dream it learned in that: its pictures are RGB, its actions the game's own. Without, it
    learned in the games themselves. With the model's own `player` it sees the games as the model shows them, which is
    what it learned from: each frame encoded and drawn again.
    """

    def __init__(
        self, ppo: PPO, controls: Controls | None = None, *, greedy: bool = False, player: Player | None = None
    ) -> None:
        self.ppo, self.controls, self.greedy, self.player = ppo, controls, greedy, player
        self.seen: np.ndarray | None = None  # (N, STACK C, H, W), the newest last

    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Frames (N, C, H, W) uint8; is_first (N,) bool: an episode begins -> actions as Games.step takes them."""
        if self.controls:
            frames = to_pixels(self._shown(frames, is_first)).transpose(0, 3, 1, 2)
        count, channels, *size = frames.shape
        if self.seen is None:
            self.seen = np.zeros((count, channels * STACK, *size), np.uint8)
        self.seen = np.concatenate([self.seen[:, channels:], frames], 1)
        self.seen[is_first, :-channels] = 0
        action, _ = self.ppo.predict(self.seen, deterministic=self.greedy)
        action = self.controls.normalised(action) if self.controls else action
        if self.player is not None:
            self.player.took(action)
        return action

    def _shown(self, frames: np.ndarray, is_first: np.ndarray) -> Tensor:
        """The frames in [0, 1] that it sees."""
        if self.player is None:
            return torch.from_numpy(frames) / 255
        self.player.follow(frames, is_first)
        assert self.player.state is not None
        with torch.inference_mode():
            return self.player.agent.world_model.picture(self.player.state).float().cpu()


class Dice:
    """Random play."""

    def __init__(self, controls: Controls, seed: int) -> None:
        self.controls, self.rng = controls, np.random.default_rng(seed)

    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Uniform over the choices, or over [-1, 1]."""
        count = len(self.controls.names)
        if self.controls.discrete:
            return self.rng.integers(count, size=len(frames))
        return self.rng.uniform(-1, 1, (len(frames), count)).astype(np.float32)


def learn(dream: DreamVectorEnv, settings: DreamPpoConfig, console: Console) -> tuple[PPO, list[tuple[int, float]]]:
    """PPO after `steps` steps in the dream, and what a dream brought it on the way: steps, mean return."""
    from stable_baselines3 import PPO

    from runs.measure.sb3 import monitored

    batch = min(NUMBERS["batch_size"], settings.dreams * NUMBERS["n_steps"])
    numbers = NUMBERS | {"batch_size": batch, "seed": settings.seed, "device": "auto"}
    if settings.obs_type == "features":
        shape = {"net_arch": list(HIDDEN), "activation_fn": torch.nn.ReLU}
        ppo = PPO("MlpPolicy", monitored(dream, 1), policy_kwargs=shape, **numbers)
    else:
        ppo = PPO("CnnPolicy", monitored(dream, STACK), **numbers)
    returns, part = [], -(-settings.steps // PARTS)
    with Progress(console) as progress:
        progress.start(settings.steps)
        progress.phase("PPO in the dream")

        def tell(local: dict[str, Any], _: dict[str, Any]) -> bool:
            for dream in (info["episode"] for info in local["infos"] if "episode" in info):
                progress.episode(dream["r"], dream["l"])
            progress.update(ppo.num_timesteps)
            return True

        while (left := settings.steps - ppo.num_timesteps) > 0:  # it plays whole rollouts
            ppo.learn(min(part, left), tell, log_interval=None, reset_num_timesteps=not ppo.num_timesteps)  # type: ignore[arg-type]
            if ended := [episode["r"] for episode in ppo.ep_info_buffer or ()]:
                returns.append((ppo.num_timesteps, round(float(np.mean(ended)), 3)))
    return ppo, returns


def measure(settings: DreamPpoConfig) -> dict[str, Any]:
    """Learns in the dream, plays the real game, writes the result into the run's folder and returns it."""
    parts, console = load_parts(settings.run), Console(highlight=False)
    world = parts.with_starts(settings.starts, settings.seed).world(many=True)
    began = time.monotonic()
    dream = DreamVectorEnv(
        world, settings.dreams, horizon=settings.horizon, temperature=parts.temperature(settings.temperature),
        autoreset_mode=AutoresetMode.SAME_STEP, obs_type=settings.obs_type,
    )  # fmt: skip
    ppo, returns = learn(dream, settings, console)
    minutes = (time.monotonic() - began) / 60
    games = make_games(parts.config.env, parts.config.game, min(8, settings.episodes))
    try:
        found, chance, *shown = (
            evaluate_policy(player, games, settings.episodes, seed=settings.seed).summary()
            for player in _players(ppo, parts, settings)
        )
    finally:
        games.close()
    on_features = settings.obs_type == "features"
    policy = "PPO, learned in the dream" + (" on features" if on_features else "")
    result = found | {"policy": policy, "random": chance, "minutes_of_learning": round(minutes, 2)}
    shape: dict[str, Any] = {"hidden": list(HIDDEN)} if on_features else {"stack": STACK}
    result |= {"settings": asdict(settings), "ppo": NUMBERS | shape, "dreamed_steps": ppo.num_timesteps}
    result |= {"dreamed_returns": returns, "temperature": dream.temperature, "starts": len(world.starts.frame)}
    if shown:
        result["seen_through_the_model"] = shown[0]
    name = result_name("dream-ppo-features" if on_features else "dream-ppo", settings, *OTHERWISE)
    path = keep(parts.run, name, result, parts.config.env)
    console.print(f"{parts.config.env}, {settings.episodes} episodes of the real game:")
    told = (("PPO from the dream", found), *(("through the model", one) for one in shown), ("random", chance))
    for name, entry in told:
        console.print(f"  {name:<18} mean {entry['mean']:.2f}, std {entry['std']:.2f}, median {entry['median']:.1f}")
    console.print(f"written to {path}", soft_wrap=True)
    return result


def _players(ppo: PPO, parts: Loaded, settings: DreamPpoConfig) -> Iterator[Any]:
    """PPO, random play, and where it learned on pictures PPO that sees the games as the model shows them."""
    controls, player = parts.controls, Player(parts.agent)
    yield FeatureStudent(ppo, controls, player) if settings.obs_type == "features" else Student(ppo, controls)
    yield Dice(controls, settings.seed)
    if settings.obs_type == "rgb":
        yield Student(ppo, controls, player=player)


def need() -> None:
    """Raises UserError when Stable-Baselines3 is not installed."""
    if importlib.util.find_spec("stable_baselines3") is None:
        raise UserError('Stable-Baselines3 is not installed: pip install ".[sb3]" adds it.')


def command(settings: DreamPpoConfig) -> None:
    """Learns and measures."""
    need()
    torch.set_num_threads(settings.threads or cores())
    keep_freed_memory()
    measure(settings)
