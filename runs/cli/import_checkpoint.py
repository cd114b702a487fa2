"""The command `import`: a checkpoint that another program has trained becomes a run of this one.

The published IRIS (Micheli et al. 2023) played `*NoFrameskip-v4`: 4 frames a step, their last two pooled, no sticky
actions, up to 30 no-ops in training and exactly 1 in its evaluation, a lost life an ending for the world model. Here
each pooled frame is shrunk by the area of its pixels; theirs were shrunk bilinearly before pooling.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from agent.loop import Loop
from agent.player import Agent
from envs.errors import UserError
from envs.games import PROTOCOLS, Games
from envs.make import make_games
from envs.settings import setting
from runs import build
from runs.cli.commands import about
from runs.config import Config
from runs.folder.files import Lock, file_name
from runs.folder.progress import Progress
from runs.folder.run import OUT, Run, argument
from runs.recipes import choice, preset
from world_model import iris_checkpoint
from world_model.iris_checkpoint import Published
from world_model.token_world import TokenWorld

PREFIX = ".importing-"  # of the folder in which a run is made before it has its place
PLAYED = 512  # agent steps of the real game, from which dreams can begin
# The actor-critic's parts, as we name them and as a published state dict does.
ACTOR_CRITIC_NAMES = {
    **{f"policy.convs.{i}.{kind}": f"conv{i + 1}.{kind}" for i in range(4) for kind in ("weight", "bias")},
    **{f"policy.lstm.{name}_l0": f"lstm.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    **{f"policy.actor.{kind}": f"actor_linear.{kind}" for kind in ("weight", "bias")},
    **{f"critic.{kind}": f"critic_linear.{kind}" for kind in ("weight", "bias")},
}


@dataclass(frozen=True)
class ImportConfig:
    """What `python main.py import` takes."""

    format: str = setting("", required=True, help="format of the checkpoint: iris")
    path: str = setting("", required=True, help="the checkpoint's file")
    env: str = setting("", required=True, help="the game that it was trained on")
    run: str = setting("", help="the new run's name under runs/out/; made of format and env when not given")

    def check(self) -> None:
        """Raises UserError for an unknown format."""
        if self.format:
            choice("format", self.format, FORMATS)

    @property
    def folder(self) -> Path:
        """Where the run will lie."""
        return OUT / (self.run or f"{file_name(self.env)}-{self.format}-imported")


def import_run(asked: ImportConfig) -> None:
    """Imports what was asked for; a run appears whole or not at all.

    Raises:
        UserError: an unknown key, format or game, a file that is no such checkpoint, another game's, a run that exists.
    """
    if asked.folder.exists():
        raise UserError(f"{asked.folder} already exists: choose another name with run=NAME.")
    FORMATS[asked.format](asked)
    for command in ("play", "evaluate", "resume"):
        print(f"python main.py {command} {argument(asked.folder)}")


def _iris(asked: ImportConfig) -> None:
    published = iris_checkpoint.read(asked.path)
    config = _iris_config(asked.env, published)
    games = make_games(asked.env, config.game)
    try:
        known, actions = published.world_model.actions, games.spec.action_size
        if games.spec.discrete and known != actions:
            raise UserError(f"{asked.path} was trained on a game of {known} actions, and {asked.env} has {actions}.")
        seen, shown = published.tokenizer.frame[0], games.spec.frame[0]
        if seen != shown:
            raise UserError(f"{asked.path} sees frames of {seen} colours, and {asked.env} has {shown}.")

        def fill(agent: Agent) -> None:
            assert isinstance(agent.world_model, TokenWorld)
            agent.world_model.tokenizer.load_state_dict(published.tokenizer.state_dict())
            agent.world_model.transformer.load_state_dict(published.world_model.state_dict())
            ours = dict(agent.learner.named_parameters())
            named = {theirs: ours[name].detach() for name, theirs in ACTOR_CRITIC_NAMES.items()}
            try:
                iris_checkpoint.copy_named(_prefixed(named), _prefixed(published.actor_critic))
            except ValueError as problem:
                raise iris_checkpoint.refused(asked.path, problem) from problem

        _write(asked, config, games, fill)
    finally:
        games.close()


def _write(asked: ImportConfig, config: Config, games: Games, fill: Callable[[Agent], None]) -> None:
    """Makes the run beside its place, and moves it there when it is complete."""
    asked.folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(asked.folder.parent)
    with TemporaryDirectory(dir=asked.folder.parent, prefix=PREFIX) as place, Progress() as progress:
        run = Run.create(config, Path(place) / "run", imported={"format": asked.format, "path": asked.path})
        run.note(**about(games))
        loop: Loop = build.loop(config, games, run.episodes_folder)
        fill(loop.agent)
        progress.say(f"{asked.path}: playing {PLAYED} steps of {asked.env}, from which dreams can begin")
        progress.start(PLAYED, 0)
        while loop.replay.steps < PLAYED:
            loop.collect(games.num_envs, progress)
        assert isinstance(loop.agent.world_model, TokenWorld)
        for episode in loop.replay.memory().values():  # the checkpoint knows the signs of rewards alone
            loop.agent.world_model.reward.note(torch.from_numpy(episode.reward))
        loop.rounds = 1  # the round of those who trained it: the next one begins by playing
        loop.save(run)
        run.close()
        os.rename(run.folder, asked.folder)


def _remove_leftovers(folder: Path) -> None:
    """What imports that were killed have left; one that is still at work holds its run's lock."""
    for place in folder.glob(f"{PREFIX}*"):
        with suppress(BlockingIOError):
            if (place / "run").exists():
                Lock(place / "run" / "lock").release()
            shutil.rmtree(place, ignore_errors=True)


def _iris_config(env: str, published: Published) -> Config:
    """The recipe at the paper's size, with the sizes that the checkpoint has."""
    base, atari = preset("iris", "m"), PROTOCOLS["atari100k"]
    see, think, sizes = published.tokenizer.config, published.world_model.config, published.actor_critic
    colours, pixels, _ = published.tokenizer.frame
    model = replace(
        base.model, view="frame", quantizer="gradient", patch=1,
        codes=see.codes, code_width=see.width, channels=see.channels, halvings=see.halvings, blocks=see.blocks,
        attention=see.attention, context_frames=think.context_frames,
        keep=think.context_frames // 2, width=think.width, layers=think.layers,
        heads=think.heads,
    )  # fmt: skip
    layers = [sizes.get(f"conv{i + 1}.bias", torch.empty(base.policy.channels[i])).numel() for i in range(4)]
    hidden = sizes.get("lstm.bias_hh", torch.empty(4 * base.policy.hidden)).numel() // 4
    return replace(
        base,
        env=env,
        protocol="atari100k",
        model=model,
        policy=replace(base.policy, channels=tuple(layers), hidden=hidden),
        train=replace(base.train, prefill=PLAYED, pretrain=0),
        game=replace(base.game, size=pixels, gray=colours == 1, action_repeat=4, **atari),
        replay=replace(base.replay, validation=0.0),
    )


def _prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"actor_critic.{name}": tensor for name, tensor in tensors.items()}


FORMATS: dict[str, Callable[[ImportConfig], None]] = {"iris": _iris}
