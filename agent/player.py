"""An agent at the controls: a world model that follows N games and a policy that acts on what it makes of them.

Shapes: N rows, C H W picture, A action size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policies.interface import Learner
from policies.planner import Planner
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

    def __init__(self, agent: Agent, *, greedy: bool = False, planner: Planner | None = None) -> None:
        """With a planner that one chooses, whatever the policy would do."""
        self.agent, self.greedy, self.planner = agent, greedy, planner
        self.state: State | None = None
        self.action: Tensor | None = None
        self.policy_memory: Tree = ()

    @torch.inference_mode()
    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Frames (N, C, H, W) uint8; is_first (N,) bool: an episode begins -> actions (N,) int64 or (N, A) float32."""
        features = self.follow(frames, is_first)
        policy = self.agent.learner.policy
        if self.planner is None:
            self.action, self.policy_memory = policy.act(features, self.policy_memory, self.greedy)
        else:
            assert self.state is not None
            self.action = self.planner.act(self.state)
        return self.action.cpu().numpy()

    def took(self, actions: np.ndarray) -> None:
        """The actions (N[, A]) since the last `act` or `follow` were these: what follows is followed from them."""
        self.action = torch.from_numpy(actions).to(self.agent.device)

    @torch.inference_mode()
    def burn_in(self, contexts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Forgets everything and follows each row's context anew: what older weights remembered means nothing now.

        A context is an episode's newest frames (T, C, H, W) but the present one, and the actions (T[, A]) taken on
        them; rows may differ in T, which is 0 where an episode begins now. The next `act` gets the present frames.
        """
        self.state = self.action = None
        self.policy_memory = ()
        policy, spec, rows = self.agent.learner.policy, self.agent.world_model.spec, len(contexts)
        shape, kind = ((rows,), np.int64) if spec.discrete else ((rows, spec.action_size), np.float32)
        longest = max((len(frames) for frames, _ in contexts), default=0)
        for back in range(longest, 0, -1):  # rows whose context is shorter wait, and begin in time
            now, taken = np.zeros((rows, *spec.frame), np.uint8), np.zeros(shape, kind)
            for row, (frames, actions) in enumerate(contexts):
                if len(frames) >= back:
                    now[row], taken[row] = frames[-back], actions[-back]
            features = self.follow(now, np.array([len(frames) <= back for frames, _ in contexts]))
            if policy.is_recurrent:
                self.policy_memory = policy.act(features, self.policy_memory, greedy=True)[1]
            self.action = torch.from_numpy(taken).to(self.agent.device)

    @torch.inference_mode()
    def follow(self, frames: np.ndarray, is_first: np.ndarray) -> Tensor:
        """The games one frame on, after the last action -> what the policy sees (N, F).

        Whoever acts instead of the policy tells with `took` what was done.
        """
        model, policy = self.agent.world_model, self.agent.learner.policy
        if self.state is None or self.action is None:
            memory, self.policy_memory = model.initial(len(frames)), policy.initial(len(frames))
        else:
            memory = model.advance(self.state, self.action)
            if is_first.any():
                mask = torch.from_numpy(is_first).to(self.agent.device)
                memory = model.reset_rows(memory, mask)
                self.policy_memory = trees.where(mask, policy.initial(len(frames)), self.policy_memory)
        self.state = model.observe(memory, to_unit(torch.from_numpy(frames).to(self.agent.device)))
        return model.features(self.state)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as tensors."""
        memory = None if self.state is None else tuple(self.state)
        return {"state": memory, "action": self.action, "policy_memory": self.policy_memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a `state_dict`."""
        self.state = None if state["state"] is None else State(*state["state"])
        self.action, self.policy_memory = state["action"], state["policy_memory"]
