"""`iris` at toy size, and segments for it.

Shapes: B batch, T time, N tokens a frame.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from envs.spec import Spec
from runs.recipes.iris import MODELS
from tests.toys import segments
from world_model.interface import Batch, Objective, to_unit
from world_model.token_world import TokenWorld

SPEC = Spec((3, 64, 64), 4, True)
TOY = MODELS["toy"]


def model(spec: Spec = SPEC, **changes: Any) -> TokenWorld:
    """A toy with weights large enough that everything matters."""
    torch.manual_seed(0)
    made = replace(TOY, **changes).build(spec)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def objectives(made: TokenWorld) -> tuple[Objective, Objective]:
    tokenizer, world_model = made.stages()
    return tokenizer.objectives[0], world_model.objectives[0]


def whole(batch_size: int, length: int) -> Batch:
    """Segments without padding."""
    batch = segments(SPEC, batch_size + 1, length)
    return batch.rows(torch.arange(batch_size))


def tokens_of(made: TokenWorld, batch: Batch) -> Tensor:
    return made.encode(to_unit(batch.frame))
