"""A trained model small enough to live in the repository: `python -m runs.folder.pretrained run=NAME [out=runs/box]`.

Writes pong.safetensors (weights in bfloat16, 8 starts) and pong.json (configuration, controls, the command, seed and
commit that made it, its score). `runs.dreams` reads them without running code from a file and without the game.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save

from envs.errors import UserError
from runs.cli.exit_codes import guarded
from runs.dreams import PRETRAINED, Loaded, load_parts
from runs.folder.files import write_atomic, write_json
from runs.folder.run import TRAINED, Run

STARTS = 8
SCORE = ("policy", "episodes", "mean", "std", "median", "env_steps", "hours", "command", "returns")
TRAINING = (*TRAINED, "machine", "versions")


def pack(run: Run, folder: Path) -> Path:
    """Writes the newest checkpoint of a run as a box into `folder`; returns the path of its tensors.

    Raises:
        UserError: the run has no checkpoint, or was never evaluated with it.
    """
    parts = load_parts(run.folder, "cpu")
    path, score = folder / PRETRAINED.name, _score(run, parts)
    told = {
        "what": "box", "env": parts.config.env, "seed": parts.config.seed, "step": parts.step,
        "training": {key: run.meta[key] for key in TRAINING if key in run.meta}, "score": score,
        "config": asdict(parts.config), "controls": parts.controls.to_dict(),
        "spec": asdict(parts.agent.world_model.spec),
    }  # fmt: skip
    tensors = save(_tensors(parts))
    write_atomic(path, lambda file: file.write(tensors))
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
        raise UserError(f"{path} is missing or unreadable: python main.py evaluate run={run.folder}") from problem
    if score["env_steps"] != parts.step:
        raise UserError(
            f"{path} is of step {score['env_steps']:,}, the newest checkpoint of step {parts.step:,}: "
            f"python main.py evaluate run={run.folder}"
        )
    return score


def main(words: Sequence[str]) -> None:
    """Packs the run named by `run=` into the folder named by `out=`."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if len(given) != len(words) or "run" not in given or not given.keys() <= {"run", "out"}:
        raise UserError("python -m runs.folder.pretrained needs run=NAME, may have out=FOLDER, and takes nothing else.")
    path = pack(Run.open(given["run"]), Path(given.get("out", PRETRAINED.parent)))
    size = path.stat().st_size / 1e6
    Console(highlight=False).print(f"{path} ({size:.1f} MB) and {path.with_suffix('.json').name}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
