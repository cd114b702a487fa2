"""Random play as a policy: what stands in the place of one where a world model is trained alone.

Shapes: B batch, F features, A action size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from envs.spec import Spec
from policies.interface import Policy
from world_model.trees import Tree


class RandomPolicy(Policy):
    """Every action as likely as any other, whatever is seen, `greedy` or not."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.action_size, self.discrete = spec.action_size, spec.discrete

    def act(self, view: Tensor, memory: Tree = (), greedy: bool = False) -> tuple[Tensor, Tree]:
        rows, device = len(view), view.device
        if self.discrete:
            return torch.randint(self.action_size, (rows,), device=device), memory
        return torch.rand(rows, self.action_size, device=device) * 2 - 1, memory
