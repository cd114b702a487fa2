"""An agent at the controls: a world model that follows N games and a policy that acts on what it makes of them.

Shapes: N rows, C H W picture, A action size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policies.interface import Learner
from world_model import trees
from world_model.interface import State, WorldModel, to_unit
from world_model.trees import Tree


class Agent(nn.Module):
    """The world model and the learner with its policy: all that is trained and saved."""

    def __init__(self, world_model: WorldModel, learner: Learner) -> None:
        super().__init__()
        self.world_model, self.learner = world_model, learner

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Player:
    """Plays N games at once; sees in the real game exactly what the policy saw in the dream."""

    def __init__(self, agent: Agent, *, greedy: bool = False) -> None:
        self.agent, self.greedy = agent, greedy
        self.state: State | None = None
        self.action: Tensor | None = None
        self.policy_memory: Tree = ()

    @torch.inference_mode()
    def act(self, frames: np.ndarray, fresh: np.ndarray) -> np.ndarray:
        """Frames (N, C, H, W) uint8; fresh (N,) bool: an episode begins -> actions (N,) int64 or (N, A) float32."""
        model, policy = self.agent.world_model, self.agent.learner.policy
        latent = model.encode(to_unit(torch.from_numpy(frames).to(self.agent.device)))
        if self.state is None or self.action is None:
            state = State(latent, model.blank(len(frames)))
            self.policy_memory = policy.blank(len(frames))
        else:
            state = State(latent, model.advance(self.state, self.action))
            if fresh.any():
                mask = torch.from_numpy(fresh).to(self.agent.device)
                state = model.reset_rows(state, mask)
                self.policy_memory = trees.where(mask, policy.blank(len(frames)), self.policy_memory)
        self.state = state
        self.action, self.policy_memory = policy.act(model.features(state), self.policy_memory, self.greedy)
        return self.action.cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as tensors."""
        memory = None if self.state is None else tuple(self.state)
        return {"state": memory, "action": self.action, "policy_memory": self.policy_memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a `state_dict`."""
        self.state = None if state["state"] is None else State(*state["state"])
        self.action, self.policy_memory = state["action"], state["policy_memory"]
