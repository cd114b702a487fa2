"""Random play as a policy: what stands in the place of one where a world model is trained alone.

Shapes: B batch, F features, A action size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from envs.spec import Spec
from policies.interface import Policy
from world_model.trees import Tree


def random_actions(spec: Spec, rows: int, device: torch.device | str = "cpu") -> Tensor:
    """Any actions: choices (B,) int64, or (B, A) in [-1, 1]."""
    if spec.discrete:
        return torch.randint(spec.action_size, (rows,), device=device)
    return torch.rand(rows, spec.action_size, device=device) * 2 - 1


class RandomPolicy(Policy):
    """Every action as likely as any other, whatever is seen, `greedy` or not."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec

    def act(self, view: Tensor, memory: Tree = (), greedy: bool = False) -> tuple[Tensor, Tree]:
        return random_actions(self.spec, len(view), view.device), memory
