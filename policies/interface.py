"""What every policy is, what it is trained on, and how it improves.

Shapes: B batch, H horizon, F features, A action size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from world_model.interface import Losses, Metric, Objective
from world_model.trees import Tree


class Trajectory(NamedTuple):
    """What happened to a policy, in imagination or in the real game; gradient-free data."""

    view: Tensor  # (B, H + 1, F) what the policy saw; the last one has no action
    action: Tensor  # (B, H) int64 or (B, H, A) float in [-1, 1]
    reward: Tensor  # (B, H) what action[:, t] brought, in the game's units or, for a policy of `signs`, in [-1, 1]
    cont: Tensor  # (B, H) probability that the episode went on after action[:, t]
    memory: Tree = ()  # the policy's, before view[:, 0]

    def mask(self, name: str) -> Tensor:
        """ "alive" (B, H): the probability that the dream had not ended before each action."""
        return {"alive": torch.cat([torch.ones_like(self.cont[:, :1]), self.cont[:, :-1]], 1).cumprod(1)}[name]


class Policy(nn.Module, ABC):
    """Chooses actions. State goes in and comes out, as in the world model."""

    population_size: int = (
        1  # candidates side by side, each of which plays every start once; rows go candidate by candidate
    )
    signs: bool = False  # learns from the signs of rewards alone, as its paper does: a dream then tells those
    is_recurrent: bool = False  # whether there is a memory; a dream then begins where it has followed a real context

    def initial(self, batch_size: int) -> Tree:
        """The memory of a policy that has seen nothing; most have none."""
        return ()

    @abstractmethod
    def act(self, view: Tensor, memory: Tree = (), greedy: bool = False) -> tuple[Tensor, Tree]:
        """view (B, F) -> action (B,) int64 or (B, A) in [-1, 1], sampled or the most likely one; and the memory."""

    def probabilities(self, view: Tensor) -> Tensor | None:
        """Of the discrete actions, (B, F) -> (B, A), for showing; None when the policy has none."""
        return None


# What every actor-critic logs of its dreams and of its actor.
DREAM_METRICS = {
    "return": Metric("mean lambda return in the dream", shown="imagined return", panel="return in the dream"),
    "dream_reward": Metric("mean reward of a dreamed step, as the policy learns it"),
    "dream_cont": Metric("mean probability that a dreamed step does not end the game"),
}
ACTOR_METRICS = {
    "policy": Metric("the policy-gradient loss"),
    "entropy": Metric("minus the entropy, as the loss has it"),
    "entropy_nats": Metric(
        "entropy of the policy (the logarithm of the number of actions: undecided)",
        shown="entropy", panel="entropy of the policy, nats",
    ),
}  # fmt: skip

Rollout = Callable[[Policy], Trajectory]
# One optimiser step of the one trainer, on whatever the loss reads; what the loss said, from those that tell.
Update = Callable[[Objective, Any], Losses | None]


class Learner(nn.Module, ABC):
    """Improves a policy from rollouts, which may come from the dream or from the real game."""

    policy: Policy
    metrics: Mapping[str, Metric] = {}  # what `improve` logs, by name
    updates_are_graph_safe: bool = False  # as of a world model, of an improvement in the dream
    logs_each_update: bool = False  # an improvement takes seconds, so that each is told and saved

    @abstractmethod
    def objectives(self) -> tuple[Objective, ...]:
        """What the trainer optimises; empty for learners without gradients."""

    @abstractmethod
    def improve(self, rollout: Rollout, update: Update) -> dict[str, Tensor]:
        """One improvement; returns detached metrics."""

    def plan(self, *, last: bool, only: str = "") -> tuple[tuple[str, int], ...]:
        """What a round consists of: where ("dream" or "real") and how many improvements. `last`: of the run.

        `only` is the place a person asked for, whether or not it would be its turn.
        """
        return (("dream", 1),)

    def begin_phase(self, where: str) -> None:  # noqa: B027 - most learners go on as they were
        """Called before the first improvement of each part of the plan."""

    def value(self, view: Tensor) -> Tensor | None:
        """The expected return in the game's units, (B, F) -> (B,), for showing; None without a critic."""
        return None
