"""Planning: no policy, but the best of many futures that are dreamed anew before each action.

Shapes: B games, N candidates of each, H steps of a plan, A action size, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from envs.settings import setting
from world_model import trees
from world_model.interface import State, WorldModel

Value = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class PlannerConfig:
    """How much is dreamed before an action."""

    method: Literal["shooting", "cem"] = setting(
        "shooting", help="random plans, or plans that evolve (CMA-ES, the cross-entropy method's heir)"
    )
    candidates: int = setting(64, 2, 65_536, help="plans that are dreamed side by side")
    horizon: int = setting(12, 1, 1000, help="steps of a plan")
    iterations: int = setting(3, 1, 100, when={"method": "cem"}, help="generations of plans")
    repeat: float = setting(
        0.7, 0, 1, when={"method": "shooting"}, help="probability that a plan goes on with the same action"
    )
    gamma: float = setting(0.985, 0, 1, help="discount of a step")


class Planner:
    """Plays the first action of the plan with the highest dreamed return, its end valued by a critic where there is
    one (`Learner.value`)."""

    def __init__(self, model: WorldModel, value: Value, config: PlannerConfig, temperature: float = 1.0) -> None:
        self.model, self.value, self.config, self.temperature = model, value, config, temperature

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
        return self._evolved(many, rows)

    def _drawn(self, rows: int) -> Tensor:
        """Random plans (B N, H[, A]), whose first actions are spread evenly where they can be counted."""
        spec, device = self.model.spec, next(self.model.parameters()).device
        size = (rows * self.config.candidates, self.config.horizon)
        if spec.discrete:
            plans = torch.randint(spec.action_size, size, device=device)
            plans[:, 0] = torch.arange(self.config.candidates, device=device).repeat(rows) % spec.action_size
        else:
            plans = torch.rand(*size, spec.action_size, device=device) * 2 - 1
        for t in range(1, self.config.horizon):
            again = torch.rand(size[0], device=device) < self.config.repeat
            plans[again, t] = plans[again, t - 1]
        return plans

    def _evolved(self, many: State, rows: int) -> Tensor:
        """One search a game, over numbers for every step and action; the highest is the action that is taken."""
        from cma import CMAEvolutionStrategy  # type: ignore[import-untyped]  # late: a third of a second

        spec, config, device = self.model.spec, self.config, many.latent.device
        size = (config.horizon, spec.action_size)
        # The package would draw from numpy's global generator, which is not ours to seed.
        options: dict[str, Any] = {"popsize": config.candidates, "verbose": -9, "seed": np.nan}
        options |= {} if spec.discrete else {"bounds": [-1, 1]}
        start = config.horizon * spec.action_size * [0.0]
        searches = []
        for seed in torch.randint(2**31 - 1, (rows,)).tolist():
            generator = np.random.default_rng(seed)
            randn = lambda *size, generator=generator: generator.standard_normal(size)  # noqa: E731
            searches.append(CMAEvolutionStrategy(start, 0.5, {**options, "randn": randn}))
        for _ in range(config.iterations):
            asked = [search.ask() for search in searches]
            numbers = torch.tensor(np.array(asked), dtype=torch.float32, device=device).view(-1, *size)
            plans = numbers.argmax(-1) if spec.discrete else numbers
            returns = self._returns(many, plans).view(rows, -1)
            for search, plan, brought in zip(searches, asked, returns.tolist(), strict=True):
                search.tell(plan, [-each for each in brought])
        best = torch.tensor(np.array([search.result.xbest for search in searches]), dtype=torch.float32, device=device)
        first = best.view(rows, *size)[:, 0]
        return first.argmax(-1) if spec.discrete else first

    def _returns(self, state: State, plans: Tensor) -> Tensor:
        """What each plan brings in the dream, (B N,)."""
        state = State(state.latent, self.model.own(state.memory))  # which steps may overwrite; `many` stays
        total, alive = torch.zeros(len(plans), device=plans.device), torch.ones(len(plans), device=plans.device)
        for t in range(self.config.horizon):
            step = self.model.step(state, plans[:, t], temperature=self.temperature)
            state = step.state
            total += alive * step.reward.float()
            alive = alive * step.cont.float() * self.config.gamma
        worth = self.value(self.model.features(state))
        return total if worth is None else total + alive * worth.float()
