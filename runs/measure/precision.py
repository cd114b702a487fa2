"""The command `precision`: what bfloat16 and int8 change in the predictions of a run of `iris`.

The model reads a few real frames and then the next one, token by token, as it does when it dreams; compared are its
distributions over each token with those in float32. Writes results/precision.json in the run's folder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from agent.precision import Format, for_inference
from envs.errors import UserError
from envs.settings import setting
from runs.dreams import Loaded, load_parts
from runs.folder.progress import as_table
from world_model.interface import to_unit
from world_model.parts.gpt import GPT
from world_model.token_world import TokenWorld

FORMATS: dict[str, tuple[int, Format]] = {  # name: (rows at once, all with 0; number format)
    "float32, a single row": (1, "fp32"),
    "bfloat16, all rows at once": (0, "bf16"),
    "int8 weights, a single row": (1, "int8"),
}


@dataclass(frozen=True)
class PrecisionConfig:
    """What `python main.py precision` takes."""

    run: str = setting("", required=True, help="a run's folder or name, of iris or iris_ac")


@torch.no_grad()
def measure(loaded: Loaded) -> list[dict[str, Any]]:
    """A row for each number format. Raises UserError for a run of another recipe."""
    model = loaded.agent.world_model
    if not isinstance(model, TokenWorld) or not isinstance(model.transformer, GPT):
        kind = loaded.config.recipe
        raise UserError(f"This run's recipe is {kind}: precision measures iris and iris_ac, token by token.")
    frame, action = loaded.starts
    steps = min(action.shape[1], model.config.context_frames - 1)
    tokens = model.encode(to_unit(frame[:, : steps + 1]))  # (S, T + 1, N)
    past = torch.cat([tokens[:, :steps], action[:, :steps].unsqueeze(-1)], -1).flatten(1)
    exact = predicted(model.transformer, past, tokens[:, steps], len(frame))
    rows = []
    for name, (count, kind) in FORMATS.items():
        transformer = copy.deepcopy(model.transformer)
        for_inference(transformer, format=kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "fp32"):
            other = predicted(transformer, past, tokens[:, steps], count or len(frame))
        apart = (exact.exp() * (exact - other)).sum(-1)
        rows.append({
            "format": name,
            "total_variation": float(f"{0.5 * (exact.exp() - other.exp()).abs().sum(-1).mean():.3g}"),
            "kl_nats": float(f"{apart.mean():.3g}"),
            "kl_nats_max": float(f"{apart.max():.3g}"),
            "same_most_likely": round(float((exact.argmax(-1) == other.argmax(-1)).float().mean()), 4),
            "entropy_nats": round(float(-(exact.exp() * exact).sum(-1).mean()), 4),
        })  # fmt: skip
    return rows


def predicted(gpt: GPT, past: Tensor, now: Tensor, count: int) -> Tensor:
    """Log-probabilities (S, N, V) of a frame's tokens `now` (S, N), after `past` (S, M), so many rows at a time."""
    told = []
    for begun, next_ones in zip(past.split(count), now.split(count), strict=True):
        memory, _ = gpt.append(gpt.initial(len(begun)), begun)
        hidden = [memory["h"]]
        for token in next_ones[:, :-1].split(1, dim=1):
            memory, _ = gpt.append(memory, token)
            hidden.append(memory["h"])
        told.append(torch.stack([gpt.next_token_logits(h).double().log_softmax(-1) for h in hidden], 1))
    return torch.cat(told)


def command(asked: PrecisionConfig) -> None:
    """Measures a run, prints and writes."""
    loaded = load_parts(asked.run, "cpu")
    rows = measure(loaded)
    if loaded.run is None:
        raise UserError(f"{asked.run} is a packed model: name the folder of a run, where the result can be kept.")
    loaded.run.result("precision", {"command": f"python main.py precision run={loaded.run.folder}", "rows": rows})
    title = f"{loaded.config.recipe} on {loaded.config.env}, {loaded.run.folder}, step {loaded.step:,}"
    Console(highlight=False).print(as_table(title, rows))
