"""The command `ppo`: the model-free baseline. What PPO learns in the real game in so much processor time.

Stable-Baselines3's PPO with the numbers that rl-baselines3-zoo tuned for Atari, in the very game that a run plays: the
same frame skip, sticky actions and no-ops, played by the same emulator, with the pictures, rewards and endings of
Stable-Baselines3's AtariWrapper (84x84 gray, the maximum of two frames, rewards within [-1, 1], an ending at every lost
life, four frames stacked). Four things differ from there. The stack keeps the frames from before a lost life, as where
PPO is judged. Nobody presses FIRE for PPO after a lost life, as nobody does so for a world model's agent. The no-ops
are the protocol's. And the learning rate and clip range fall to 0 with the processor time used and not with the steps,
whose number nobody knows before (with `steps=` they are known, and count).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from agent.interrupt import deferred
from envs.games import Games
from envs.make import make_games
from runs.cli import compose
from runs.folder.ppo import METRICS, PpoConfig, PpoRun
from runs.folder.progress import Progress
from runs.folder.system import keep_freed_memory
from runs.measure import evaluation
from runs.measure.dream_ppo import STACK, Student, need
from runs.report import curve

if TYPE_CHECKING:
    from stable_baselines3 import PPO

    from runs.measure.sb3 import GamesVecEnv

SAVE_EVERY = 180.0  # seconds
ENDLESS = 10**12  # steps: the watcher ends the learning


class Learner:
    """PPO and the games that it learns in; saved and loaded as tensors and numbers."""

    def __init__(self, run: PpoRun, games: Games) -> None:
        from stable_baselines3 import PPO
        from stable_baselines3.common.logger import Logger

        from runs.measure.sb3 import FrameStack, GamesVecEnv

        self.run, self.steps, config = run, run.step, run.config
        self.rows: GamesVecEnv = GamesVecEnv(games, config.seed)
        falling = {name: self._falling(getattr(config.policy, name)) for name in ("learning_rate", "clip_range")}
        # A continuation must not draw the same numbers again.
        seed = (config.seed + run.step) % 2**31
        numbers: dict[str, Any] = asdict(config.policy) | falling
        stacked = FrameStack(self.rows, STACK)
        self.ppo: PPO = PPO("CnnPolicy", stacked, **numbers, seed=seed, device="cpu")
        self.ppo.set_logger(Logger(None, []))  # else it makes a folder of its own

    @property
    def left(self) -> float:
        """The share of the processor time, or of the steps, that is left, from 1 to 0."""
        run, config = self.run, self.run.config
        if config.steps is not None:
            return max(0.0, 1 - self.steps / config.steps)
        assert config.hours is not None
        return max(0.0, 1 - (run.core_hours or 0.0) / config.hours)

    def _falling(self, start: float) -> Callable[[float], float]:
        return lambda _: start * self.left  # what it is called with are shares of steps

    def learn(self, progress: Progress, asked_to_stop: Callable[[], bool]) -> None:
        """Learns until time or steps are used or somebody asks to stop, and saves."""
        if not self.run.step:
            self.save()  # what is killed early can be gone on with too
        if self.left:
            watcher = Watcher(self, progress, asked_to_stop)
            self.ppo.learn(ENDLESS, watcher, log_interval=None, reset_num_timesteps=not self.run.step)  # type: ignore[arg-type]
            self.save()

    def save(self) -> None:
        """Writes a checkpoint."""
        policy = self.ppo.policy
        state: dict[str, Any] = {"policy": policy.state_dict(), "optimizer": policy.optimizer.state_dict()}
        state |= {"updates": self.ppo._n_updates, "begun": self.rows.begun}
        self.run.save_checkpoint(state, self.ppo.num_timesteps)

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint, with new games."""
        self.ppo.policy.load_state_dict(state["policy"])
        self.ppo.policy.optimizer.load_state_dict(state["optimizer"])
        self.ppo.num_timesteps, self.ppo._n_updates = self.run.step, state["updates"]
        self.rows.begun = state["begun"]


class Watcher:
    """Called by Stable-Baselines3 after each step of the games: tells, logs every update, saves; False ends it."""

    def __init__(self, learner: Learner, progress: Progress, asked_to_stop: Callable[[], bool]) -> None:
        self.learner, self.progress, self.asked_to_stop = learner, progress, asked_to_stop
        self.returns: list[float] = []  # of games since the last line
        self.logged, self.saved = learner.ppo._n_updates, time.monotonic()

    def __call__(self, local: dict[str, Any], _: dict[str, Any]) -> bool:
        """`local` is what is known where PPO plays."""
        run, ppo = self.learner.run, self.learner.ppo
        for game in (info["episode"] for info in local["infos"] if "episode" in info):
            self.returns.append(game["r"])
            self.progress.episode(game["r"], game["l"])
        self.learner.steps = ppo.num_timesteps
        of = f" of {run.config.hours:g}" if run.config.hours else ""
        used = {"processor hours": f"{run.core_hours or 0.0:.3f}{of}"}
        self.progress.update(ppo.num_timesteps, **used)  # type: ignore[arg-type]
        if ppo._n_updates > self.logged:
            self._log()
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.learner.save()
            self.saved = time.monotonic()
        return self.learner.left > 0 and not self.asked_to_stop()

    def _log(self) -> None:
        ppo, self.logged = self.learner.ppo, self.learner.ppo._n_updates
        found = ppo.logger.name_to_value
        line = {key: found["train/" + key.split("/")[1]] for key in METRICS if key.startswith("policy/")}
        line["updates"] = self.logged // ppo.n_epochs
        if self.returns:
            line["episode/return"] = float(np.mean(self.returns))
            self.returns = []
        self.learner.run.log(ppo.num_timesteps, line)


def command(asked: PpoConfig) -> None:
    """Begins a run of PPO, or goes on with the one that `name` names; then evaluates it."""
    need()
    folder = PpoRun.folder_of(asked.name) if asked.name else None
    resumed = folder is not None and (folder / "config.json").exists()
    if resumed and folder:
        run = PpoRun.open(folder)
        run.check_asked(asked)
    else:
        config: Any = replace(asked.told(), name="")
        make_games(config.env, config.game, 1).close()  # what is wrong with the game is said before there is a folder
        folder = folder or compose.new_folder(config)
        run = PpoRun.create(config, folder, threads=config.threads, device="cpu")
    torch.set_num_threads(run.config.threads)
    keep_freed_memory()
    work(run, resumed=resumed)


def work(run: PpoRun, *, resumed: bool) -> None:
    """Learns for the time that is left, then plays whole episodes of the game and draws the curve."""
    config = run.config
    games = make_games(config.env, config.game)
    with Progress() as progress:
        progress.say(f"{config.env}: {games.description}, {games.num_envs} side by side")
        long = f"{config.steps:,} steps" if config.steps else f"{config.hours:g} processor hours"
        told = f"{long} on {config.threads} torch thread{'s'[: config.threads > 1]}"
        progress.say(f"PPO of Stable-Baselines3 for {told}, over which learning rate and clip range fall to 0")
        try:
            state = run.load_checkpoint("cpu", say=progress.say) if resumed else None
            learner = Learner(run, games)
            if state:
                run.rewind(threads=config.threads, device="cpu")
                learner.load(state)
            progress.say(f"{f'resumed at step {run.step:,} in' if resumed else 'writing'} {run.folder}")
            progress.start(config.steps or 0, run.step)
            progress.phase("PPO")
            with deferred() as asked_to_stop:
                learner.learn(progress, asked_to_stop)
                if asked_to_stop():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            progress.say(f"stopped at step {run.step:,}; go on with python main.py ppo name={run.folder}")
            raise
        finally:
            games.close()
            run.close()
    _evaluate(run, learner)
    print(f"the learning curve: {curve.draw(run)}")


def _evaluate(run: PpoRun, learner: Learner) -> None:
    config = run.config
    numbers = asdict(config.policy) | {"games": config.game.num_envs, "stack": STACK}
    numbers |= {"core_hours": config.hours} if config.hours else {"steps": config.steps}
    games = make_games(config.env, config.game, min(evaluation.ROWS, config.episodes))
    try:
        evaluation.judge(run, games, lambda greedy: Student(learner.ppo, greedy=greedy), {"ppo": numbers})
    finally:
        games.close()
