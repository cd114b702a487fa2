"""Imagination: a policy acts in a world model's dream."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.interface import Policy, Trajectory
from world_model.interface import State, WorldModel
from world_model.trees import Tree


@torch.no_grad()
def imagine(
    world_model: WorldModel, policy: Policy, state: State, *, horizon: int, temperature: float = 1.0,
    keep_views: bool = True, memory: Tree | None = None,
) -> Trajectory:  # fmt: skip
    """Dreams `horizon` steps from states (B, ...). Uses the default generator; fork it for reproducible dreams.

    `memory` is the policy's before it sees the first state; None: the initial one.
    Without `keep_views` only the last view and no action is kept: rewards and continuations alone are small.
    """
    # No state is kept here, and no picture looked at.
    state = world_model.unseen(State(state.latent, world_model.own(state.memory)))
    memory = before = policy.initial(state.latent.shape[0]) if memory is None else memory
    views, rewards, conts = [world_model.features(state)], [], []
    actions: list[Tensor] = []
    for _ in range(horizon):
        action, memory = policy.act(views[-1], memory)
        step = world_model.step(state, action, temperature=temperature)
        state = step.state
        views = [*(views if keep_views else ()), world_model.features(state)]
        actions = [*(actions if keep_views else ()), action]
        rewards.append(world_model.reward_sign(state) if policy.signs else step.reward)
        conts.append(step.cont)
    view, action, reward, cont = (torch.stack(each, 1) for each in (views, actions, rewards, conts))
    return Trajectory(view, action, reward, cont, before)
