"""Planning: no policy, but the best of many futures that are dreamed anew before each action.

By random shooting, or by the cross-entropy method as PETS (Chua et al. 2018) and PlaNet (Hafner et al. 2019) plan.
Shapes: B games, N candidates of each, H steps of a plan, A action size, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from envs.settings import setting
from world_model import noise, trees
from world_model.interface import State, WorldModel
from world_model.parts.heads import draw, one_hot

ELITE = 10  # one plan of so many is an elite
GAMMA = 0.985  # of a planner without a policy
Value = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class PlannerConfig:
    """How much is dreamed before an action."""

    method: Literal["shooting", "cem"] = setting(
        "shooting", help="random shooting, or the cross-entropy method: plans sampled like the best of those before"
    )
    candidates: int = setting(64, 2, 65_536, help="plans that are dreamed side by side")
    horizon: int = setting(12, 1, 1000, help="steps of a plan")
    iterations: int = setting(3, 1, 100, when={"method": "cem"}, help="rounds of sampling and fitting")
    repeat: float = setting(
        0.7, 0, 1, when={"method": "shooting"}, help="probability that a plan repeats its last action"
    )
    gamma: float | None = setting(
        None, 0, 1, help="discount of a step; policy.gamma, or 0.985 where there is none, when not given"
    )


def planning(config: PlannerConfig, policy: object) -> PlannerConfig:
    """The configuration with what it leaves to the policy's: a critic's value is worth its own discount."""
    return config if config.gamma is not None else replace(config, gamma=getattr(policy, "gamma", GAMMA))


class Planner:
    """Plays the first action of the plan with the highest dreamed return, its end valued by a critic where there is
    one (`Learner.value`)."""

    def __init__(self, model: WorldModel, value: Value, config: PlannerConfig, temperature: float = 1.0) -> None:
        self.model, self.value, self.config, self.temperature = model, value, config, temperature
        self.gamma = GAMMA if config.gamma is None else config.gamma

    @torch.no_grad()
    def act(self, state: State) -> Tensor:
        """States (B, ...) -> actions (B,) int64 or (B, A) in [-1, 1]. Uses the default generator."""
        count, rows = self.config.candidates, len(state.latent)
        state = self.model.unseen(state)
        many = trees.map(lambda leaf: leaf.repeat_interleave(count, 0), state)
        if self.config.method == "shooting":
            plans = self._drawn(rows)
            best = self._returns(many, plans).view(rows, count).argmax(1)
            first = plans[:, 0].view(rows, count, *plans.shape[2:])
            return first[torch.arange(rows, device=first.device), best]
        return self._refined(many, rows)

    def _drawn(self, rows: int) -> Tensor:
        """Random plans (B N, H[, A]), whose first actions are spread evenly where they can be counted."""
        spec, device = self.model.spec, next(self.model.parameters()).device
        size = (rows * self.config.candidates, self.config.horizon)
        if spec.discrete:
            plans = torch.randint(spec.action_size, size, device=device)
            # From an action that differs each time: of fewer plans than actions each has its turn.
            offset = torch.randint(spec.action_size, (rows, 1), device=device)
            plans[:, 0] = ((offset + torch.arange(self.config.candidates, device=device)) % spec.action_size).flatten()
        else:
            plans = torch.rand(*size, spec.action_size, device=device) * 2 - 1
        for t in range(1, self.config.horizon):
            again = torch.rand(size[0], device=device) < self.config.repeat
            plans[again, t] = plans[again, t - 1]
        return plans

    def _refined(self, many: State, rows: int) -> Tensor:
        """Samples plans from a distribution for each step, fits it to the best tenth (two at least), and again.

        Discrete actions have a categorical, continuous ones a Gaussian clipped to [-1, 1]. Plays its mode at the first
        step.
        """
        spec, config, device = self.model.spec, self.config, many.latent.device
        elites = min(config.candidates - 1, max(2, config.candidates // ELITE))
        mean = torch.zeros(rows, 1, config.horizon, spec.action_size, device=device)
        std = torch.ones_like(mean)
        if spec.discrete:
            mean += 1 / spec.action_size
        for _ in range(config.iterations):
            if spec.discrete:
                plans = draw(mean.log().expand(-1, config.candidates, -1, -1))  # (B, N, H)
            else:
                spread = std.expand(-1, config.candidates, -1, -1)
                plans = (mean + spread * noise.normal(spread)).clamp(-1, 1)
            returns = self._returns(many, plans.flatten(0, 1)).view(rows, -1)
            chosen = plans[torch.arange(rows, device=device).unsqueeze(1), returns.topk(elites).indices]
            if spec.discrete:
                mean = one_hot(chosen, spec.action_size).mean(1, keepdim=True)
            else:
                std, mean = torch.std_mean(chosen, 1, correction=0, keepdim=True)  # also of one elite
        first = mean[:, 0, 0]
        return first.argmax(-1) if spec.discrete else first

    def _returns(self, state: State, plans: Tensor) -> Tensor:
        """What each plan brings in the dream, (B N,)."""
        state = State(state.latent, self.model.own(state.memory))  # which steps may overwrite; `many` stays
        total, alive = torch.zeros(len(plans), device=plans.device), torch.ones(len(plans), device=plans.device)
        for t in range(self.config.horizon):
            step = self.model.step(state, plans[:, t], temperature=self.temperature)
            state = step.state
            total += alive * step.reward.float()
            alive = alive * step.cont.float() * self.gamma
        worth = self.value(self.model.features(state))
        return total if worth is None else total + alive * worth.float()
