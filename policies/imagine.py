"""Imagination: a policy acts in a world model's dream."""

from __future__ import annotations

import torch

from policies.interface import Dream, Policy
from world_model.interface import State, WorldModel


@torch.no_grad()
def imagine(world_model: WorldModel, policy: Policy, state: State, *, horizon: int, temperature: float = 1.0) -> Dream:
    """Dreams `horizon` steps from states (B, ...). Uses the default generator; fork it for reproducible dreams."""
    memory = policy.blank(state.latent.shape[0])
    views, actions, rewards, conts = [world_model.features(state)], [], [], []
    for _ in range(horizon):
        action, memory = policy.act(views[-1], memory)
        step = world_model.step(state, action, temperature=temperature)
        state = step.state
        views.append(world_model.features(state))
        actions.append(action)
        rewards.append(step.reward)
        conts.append(step.cont)
    return Dream(torch.stack(views, 1), torch.stack(actions, 1), torch.stack(rewards, 1), torch.stack(conts, 1))
