"""The command `pack`: a trained model small enough to live in the repository.

Writes GAME.safetensors (weights in bfloat16, 8 starts) and GAME.json (configuration, controls, the command, seed and
commit that made it, its score). `runs.dreams` reads them without running code from a file and without the game.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save

from envs.errors import UserError
from envs.settings import setting
from runs.dreams import PRETRAINED, Loaded, load_parts
from runs.folder.files import write_atomic, write_json
from runs.folder.run import TRAINED, Run

STARTS = 8
SCORE = ("policy", "episodes", "mean", "std", "median", "env_steps", "hours", "command", "returns")
TRAINING = (*TRAINED, "versions")


def pack(run: Run, folder: Path) -> Path:
    """Writes the newest checkpoint of a run into `folder`, named after the game; returns the path of its tensors.

    Raises:
        UserError: the run has no checkpoint, or was never evaluated with it.
    """
    parts = load_parts(run.folder, "cpu")
    game = re.sub(r"-v\d+$", "", run.config.env.split("/")[-1]).lower()
    path, score = folder / f"{game}{PRETRAINED.suffix}", _score(run, parts)
    told = {
        "what": "packed model", "env": parts.config.env, "seed": parts.config.seed, "step": parts.step,
        "training": {key: run.meta[key] for key in TRAINING if key in run.meta}, "score": score,
        "config": asdict(parts.config), "controls": parts.controls.to_dict(),
        "spec": asdict(parts.agent.world_model.spec), "whole_rewards": parts.whole_rewards,
        "aspect": parts.aspect,
    }  # fmt: skip
    tensors = save(_tensors(parts))
    told["sha256"] = hashlib.sha256(tensors).hexdigest()  # safetensors has no checksum of its own
    write_atomic(path, tensors)
    write_json(path.with_suffix(".json"), told)
    return path


def _tensors(parts: Loaded) -> dict[str, torch.Tensor]:
    """Parameters in bfloat16; buffers, which are few and may be counters or pictures, as they are."""
    learned = {name for name, _ in parts.agent.named_parameters()}
    state = parts.agent.state_dict().items()
    weights = [(name, value) for name, value in state if isinstance(value, torch.Tensor)]  # nothing of the training
    kept = {name: value.bfloat16() if name in learned else value for name, value in weights}
    kept |= {"starts.frame": parts.starts.frame[:STARTS], "starts.action": parts.starts.action[:STARTS]}
    return {name: value.contiguous() for name, value in kept.items()}  # not channels last, which the format lacks


def _score(run: Run, parts: Loaded) -> dict[str, Any]:
    path = run.folder / "results" / "evaluation-sampled.json"
    try:
        told = json.loads(path.read_text())
        score = {key: told[key] for key in SCORE}
    except (OSError, ValueError, LookupError) as problem:
        raise UserError(f"{path} is missing or unreadable: python main.py evaluate {run.argument}") from problem
    if score["env_steps"] != parts.step:
        raise UserError(
            f"{path} is of step {score['env_steps']:,}, the newest checkpoint of step {parts.step:,}: "
            f"python main.py evaluate {run.argument}"
        )
    return score


@dataclass(frozen=True)
class PackConfig:
    """What `python main.py pack` takes."""

    run: str = setting("", required=True, help="a run's folder or name, evaluated with its newest checkpoint")
    out: str = setting("", help="folder of the two files; packed/ within the run's when not given")


def command(asked: PackConfig) -> None:
    """Packs the run; the model that ships is replaced only when `out` names its folder."""
    run = Run.open(asked.run)
    path = pack(run, Path(asked.out) if asked.out else run.folder / "packed")
    size = path.stat().st_size / 1e6
    Console(highlight=False).print(f"{path} ({size:.1f} MB) and {path.with_suffix('.json').name}", soft_wrap=True)
