"""A planner finds what only several steps ahead brings a reward, and trusts a critic beyond its horizon."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from envs.spec import Spec
from policies.actor_critic import ActorCriticConfig
from policies.cma_es import EvolutionConfig
from policies.planner import GAMMA, Planner, PlannerConfig, planning
from runs.recipes.reverie import reverie
from world_model import trees
from world_model.interface import Stage, State, WorldModel
from world_model.trees import Tree

FAR = 3.0


class Line(WorldModel):
    """A place on a line. At its right end each step brings 1; at its left end one brings 2, and the game is over."""

    latent_shape, feature_size = (1,), 1

    def __init__(self, *, discrete: bool) -> None:
        super().__init__()
        self.spec = Spec((1, 8, 8), 3 if discrete else 1, discrete)
        self.zero = torch.nn.Parameter(torch.zeros(1))

    def initial(self, batch_size: int) -> Tree:
        return {"place": self.zero.new_zeros(batch_size, 1)}

    def advance(self, state: State, action: Tensor) -> Tree:
        by = (action - 1).unsqueeze(1).float() if self.spec.discrete else action
        return {"place": (state.latent + by).clamp(-FAR, FAR)}

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        return State(memory["place"], memory)

    def observe(self, memory: Tree, frame: Tensor) -> State:
        return State(memory["place"], memory)

    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        place = state.latent[:, 0]
        left = (place <= -FAR).float()
        return (place >= FAR).float() + 2 * left, 1 - left

    def features(self, state: State) -> Tensor:
        return state.latent

    def decode(self, state: State) -> None:
        return None

    def stages(self) -> tuple[Stage, ...]:
        return ()


def chosen(model: Line, places: list[float], value: Tensor | None = None, **settings: object) -> list[float]:
    """What a planner does at each place, in steps to the right."""
    torch.manual_seed(0)
    config = PlannerConfig(**{"candidates": 96, "horizon": 8, "iterations": 8, **settings})  # type: ignore[arg-type]
    planner = Planner(model, lambda view: None if value is None else view[:, 0] * value, config, temperature=0)
    place = torch.tensor(places).unsqueeze(1)
    with torch.no_grad():
        action = planner.act(State(place, {"place": place}))
    return [float(each) for each in (action - 1 if model.spec.discrete else action[:, 0])]


@pytest.mark.parametrize("method", ["shooting", "cem"])
@pytest.mark.parametrize("discrete", [True, False])
def test_goes_where_the_dream_pays(method: str, discrete: bool) -> None:
    found = chosen(Line(discrete=discrete), [1.0, 2.0], method=method)
    # Five rewards of 1 before the plan ends are more than one of 2, which ends the game.
    assert all(step > 0 for step in found), found
    assert chosen(Line(discrete=discrete), [-2.0], method=method, horizon=2)[0] < 0, "but not within two steps"


def test_a_critic_values_the_end_of_a_plan() -> None:
    one = Line(discrete=True)
    assert chosen(one, [0.0], torch.tensor(1.0), horizon=1) == [1.0]
    assert chosen(one, [0.0], torch.tensor(-1.0), horizon=1) == [-1.0]


def test_two_candidates_have_one_elite() -> None:
    assert -1 <= chosen(Line(discrete=False), [1.0], method="cem", candidates=2)[0] <= 1, "and not NaN"


def test_a_critics_value_is_worth_its_own_discount() -> None:
    asked = PlannerConfig()
    assert planning(asked, ActorCriticConfig(gamma=0.9)).gamma == 0.9
    assert planning(asked, EvolutionConfig()).gamma == GAMMA
    assert planning(replace(asked, gamma=0.5), ActorCriticConfig(gamma=0.9)).gamma == 0.5


def test_fewer_plans_than_actions_begin_with_each_of_them_in_turn() -> None:
    torch.manual_seed(0)
    planner = Planner(Line(discrete=True), lambda view: None, PlannerConfig(candidates=2, horizon=2), temperature=0)
    first = torch.stack([planner._drawn(4)[:, 0].view(4, 2) for _ in range(50)])
    assert set(first.flatten().tolist()) == {0, 1, 2}
    assert (first[..., 0] != first[..., 1]).all(), "no action twice"


def test_games_are_planned_by_themselves() -> None:
    one = Line(discrete=True)
    assert chosen(one, [-2.0, 2.0], horizon=2) == [-1.0, 1.0]


def test_plans_are_judged_from_a_memory_that_stays() -> None:
    """Of a transformer whose window is full, a step overwrites the memory that it owns."""
    config = replace(reverie("toy").model, dynamics="transformer", window=5)
    torch.manual_seed(0)
    model = config.build(Spec((1, 16, 16), 3, True))
    frame = torch.rand(1, 8, 1, 16, 16)
    planner = Planner(model, lambda view: None, PlannerConfig(candidates=6, horizon=4), temperature=0)
    with torch.no_grad():
        state = model.start(frame, torch.zeros(1, 7, dtype=torch.long))
        many = trees.map(lambda leaf: leaf.repeat_interleave(6, 0), state)
        plans = torch.randint(3, (6, 4))
        assert torch.equal(planner._returns(many, plans), planner._returns(many, plans))


class Dial(Line):
    """Each step brings the more, the nearer its action is to 0.3."""

    def advance(self, state: State, action: Tensor) -> Tree:
        return {"place": action}

    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        place = state.latent[:, 0]
        return -(place - 0.3).square(), torch.ones_like(place)


def test_refined_plans_come_nearer_than_random_ones() -> None:
    dial, places = Dial(discrete=False), [0.0] * 20
    away = {
        method: float(np.abs(np.array(chosen(dial, places, method=method, horizon=4)) - 0.3).mean())
        for method in ("shooting", "cem")
    }
    assert away["cem"] < away["shooting"] / 10, away
