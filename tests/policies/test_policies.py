"""Returns and actors against slow hand computations and torch.distributions, and the timeline of a dream.

Shapes: B batch, H horizon, A action size, F features.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, TanhTransform, TransformedDistribution
from torch.testing import assert_close

from agent.player import Agent
from envs.spec import Spec
from policies.actor_critic import ActorCriticConfig, ContinuousActor, DiscreteActor
from policies.imagination import imagine
from policies.interface import Policy
from policies.returns import ReturnScale, lambda_returns
from tests.toys import VARIANTS, segments
from world_model.interface import Stage, State, WorldModel
from world_model.trees import Tree

CONFIG = ActorCriticConfig(hidden=16, layers=1)


def by_hand(reward: list[float], cont: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: a mixture of n-step returns, each summed forward, every reward weighted by reaching it."""
    horizon, returns = len(reward), []
    for t in range(horizon):
        n_step = []
        for n in range(1, horizon - t + 1):
            total, reach = 0.0, 1.0
            for i in range(t, t + n):
                total += reach * reward[i]
                reach *= gamma * cont[i]
            n_step.append(total + reach * value[t + n])
        mixture = sum((1 - lam) * lam**i * g for i, g in enumerate(n_step[:-1]))
        returns.append(mixture + lam ** (len(n_step) - 1) * n_step[-1])
    return returns


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_lambda_returns_are_mixtures_of_n_step_returns(lam: float, gamma: float) -> None:
    torch.manual_seed(0)
    reward, cont, value = torch.randn(6, 5), torch.rand(6, 5), torch.randn(6, 6)
    cont[1], cont[2, 2], cont[3] = 1.0, 0.0, 0.0
    expected = [by_hand(reward[b].tolist(), cont[b].tolist(), value[b].tolist(), gamma, lam) for b in range(6)]
    returns = lambda_returns(reward, cont, value, gamma=gamma, lam=lam)
    assert_close(returns, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_lambda_returns_at_their_limits() -> None:
    reward, value = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[100.0, 10.0, 20.0, 30.0]])
    cont = torch.ones(1, 3)
    assert_close(lambda_returns(reward, cont, value, gamma=0.5, lam=0.0), torch.tensor([[6.0, 12.0, 19.0]]))
    assert_close(lambda_returns(reward, cont, value, gamma=0.5, lam=1.0), torch.tensor([[6.75, 11.5, 19.0]]))
    ended = torch.tensor([[1.0, 0.0, 1.0]])  # action[1] ended the game: nothing later counts
    assert_close(lambda_returns(reward, ended, value, gamma=0.5, lam=1.0), torch.tensor([[2.0, 2.0, 19.0]]))


def test_return_scale_is_a_moving_range_of_percentiles() -> None:
    scale, rng = ReturnScale(floor=0.1, rate=0.25), np.random.default_rng(0)
    batches, expected = [rng.normal(size=(16, 8)) * size for size in (1, 3, 2, 5, 1, 4)], 0.0
    for count, returns in enumerate(batches, 1):
        low, high = np.percentile(returns, [5, 95])
        rate = max(0.25, 1 / count)
        expected += rate * (high - low - expected)
        assert_close(float(scale.update(torch.tensor(returns, dtype=torch.float32))), expected, rtol=1e-4, atol=0)
    again = ReturnScale(floor=0.1, rate=0.25)
    again.load_state_dict(scale.state_dict())
    more = torch.randn(16, 8)
    assert_close(again.update(more), scale.update(more), rtol=0, atol=0)


def test_return_scale_has_a_floor() -> None:
    scale = ReturnScale(floor=0.1)
    assert_close(scale.update(torch.full((4, 4), 7.0)), torch.tensor(0.1))
    assert_close(scale.value, torch.tensor(0.0))  # the average itself is not bent


def shaken(actor: Policy) -> Policy:
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return actor


@cache
def discrete() -> DiscreteActor:
    torch.manual_seed(0)
    return shaken(DiscreteActor(CONFIG, 3, 5))  # type: ignore[return-value]


@cache
def continuous() -> ContinuousActor:
    torch.manual_seed(0)
    return shaken(ContinuousActor(CONFIG, 3, 2))  # type: ignore[return-value]


def views(count: int = 6) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_discrete_log_probabilities_and_entropy_are_those_of_torch() -> None:
    actor, view = discrete(), views()
    plain = Categorical(logits=actor.net(view)).probs
    expected = Categorical(probs=0.99 * plain + 0.01 / 5)
    action = torch.tensor([0, 1, 2, 3, 4, 0])
    log_prob, entropy = actor.evaluate(view, action)
    assert_close(log_prob, expected.log_prob(action))
    assert_close(entropy, expected.entropy())
    by_time = actor.evaluate(view.view(2, 3, 3), action.view(2, 3))
    assert_close(by_time, (log_prob.view(2, 3), entropy.view(2, 3)))
    drawn, memory = actor.act(view[:1].expand(20_000, 3))
    assert drawn.dtype == torch.int64 and drawn.shape == (20_000,) and memory == ()
    assert_close(torch.bincount(drawn, minlength=5) / 20_000, expected.probs[0], rtol=0, atol=0.02)
    assert_close(actor.act(view, greedy=True)[0], expected.probs.argmax(-1))


@torch.no_grad()
def test_continuous_log_densities_are_those_of_torch() -> None:
    actor, view = continuous(), views()
    mean, std = actor._gaussian(view)
    assert (mean.abs() < 2).all() and (std > 0.1).all() and (std < 1).all()
    expected = Independent(TransformedDistribution(Normal(mean, std), [TanhTransform()]), 1)
    torch.manual_seed(0)
    action, memory = actor.act(view)
    assert action.shape == (6, 2) and action.abs().max() <= 1 and memory == ()
    log_prob, entropy = actor.evaluate(view, action)
    assert log_prob.shape == entropy.shape == (6,)
    assert_close(log_prob, expected.log_prob(action), rtol=1e-3, atol=1e-3)
    assert_close(actor.act(view, greedy=True)[0], torch.tanh(mean))
    edge, _ = actor.evaluate(view, torch.ones(6, 2))
    assert edge.isfinite().all()


@torch.no_grad()
def test_continuous_samples_and_entropy_agree_with_the_density() -> None:
    actor, view = continuous(), views(2).repeat_interleave(40_000, 0)
    torch.manual_seed(0)
    action, _ = actor.act(view)
    log_prob, entropy = actor.evaluate(view, action)
    mean, std = actor._gaussian(views(2))
    for row in range(2):
        mine = slice(row * 40_000, (row + 1) * 40_000)
        assert_close(entropy[mine].mean(), -log_prob[mine].mean(), rtol=0, atol=0.03)
        below = (action[mine] < 0.3).float().mean(0)
        assert_close(below, Normal(mean[row], std[row]).cdf(torch.tensor(math.atanh(0.3))), rtol=0, atol=0.015)


class Counting(WorldModel):
    """A world that counts its steps: every value says which step it belongs to and which action led there."""

    spec, latent_shape, feature_size = Spec((1, 1, 1), 10, True), (2,), 3

    def decode(self, state: State) -> Tensor:
        return state.latent[..., :1, None, None]

    def initial(self, batch_size: int) -> Tree:
        return {"count": torch.zeros(batch_size), "acted": torch.full((batch_size,), -1.0)}

    def advance(self, state: State, action: Tensor) -> Tree:
        return {"count": state.latent[:, 0] + 1, "acted": action.float()}

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        return State(torch.stack([memory["count"], torch.full_like(memory["count"], temperature)], -1), memory)

    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        return 100 * state.latent[:, 0] + state.memory["acted"], 1 / state.latent[:, 0]

    def features(self, state: State) -> Tensor:
        return torch.cat([state.latent, state.memory["acted"].unsqueeze(-1)], -1)

    def observe(self, memory: Tree, frame: Tensor) -> State:
        raise NotImplementedError

    def stages(self) -> tuple[Stage, ...]:
        return ()


class Reciting(Policy):
    """Does what the view and its own memory say."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def initial(self, batch_size: int) -> Tree:
        return torch.arange(float(batch_size))

    def act(self, view: Tensor, memory: Tree = (), greedy: bool = False) -> tuple[Tensor, Tree]:
        return ((view[:, 0] + 3 * memory + self.shift) % 10).long(), memory + 1


@pytest.mark.parametrize("horizon", [1, 6])
def test_a_dream_keeps_the_timeline(horizon: int) -> None:
    begin = torch.tensor([5.0, 40.0])
    state = State(torch.stack([begin, begin * 0], -1), {"count": begin, "acted": torch.tensor([7.0, 8.0])})
    dream = imagine(Counting(), Reciting(), state, horizon=horizon, temperature=0.25)
    assert dream.view.shape == (2, horizon + 1, 3)
    assert dream.action.shape == dream.reward.shape == dream.cont.shape == (2, horizon)
    assert not any(part.requires_grad for part in dream)
    for b in range(2):
        assert dream.view[b, 0].tolist() == [begin[b], 0, 7 + b]
        for t in range(horizon):
            count = float(begin[b]) + t
            action = (count + 3 * (b + t)) % 10  # of what is seen at t, with a memory that counts along
            assert dream.action[b, t] == action
            assert dream.view[b, t + 1].tolist() == [count + 1, 0.25, action]
            assert dream.reward[b, t] == 100 * (count + 1) + action  # what action[t] brought, told on arrival
            assert_close(dream.cont[b, t], torch.tensor(1 / (count + 1)))


def test_a_dream_runs_in_a_memory_of_its_own() -> None:
    """So that a model with a large one need not copy it at every step."""

    class Owned(Counting):
        def own(self, memory: Tree) -> Tree:
            return {"count": memory["count"], "acted": memory["acted"] + 100}

    begin = torch.tensor([5.0])
    state = State(torch.stack([begin, begin * 0], -1), {"count": begin, "acted": begin})
    assert imagine(Owned(), Reciting(), state, horizon=3).view[0, :, 2].tolist()[0] == 105


@pytest.fixture(params=VARIANTS, ids=str)
def agent(request: pytest.FixtureRequest) -> Agent:
    return request.param.agent()


@torch.no_grad()
def test_every_recipe_acts_within_its_game_and_dreams(agent: Agent) -> None:
    model, policy = agent.world_model, agent.learner.policy
    batch = segments(model.spec, 4, 3)
    state = model.start(batch.frame / 255, batch.action)
    dream = imagine(model, policy, state, horizon=5)
    assert_close(dream.view[:, 0], model.features(state))
    assert dream.action.shape == ((4, 5) if model.spec.discrete else (4, 5, model.spec.action_size))
    assert all(part.isfinite().all() for part in dream[:4])
    assert dream.cont.min() >= 0 and dream.cont.max() <= 1
    torch.manual_seed(0)
    first = imagine(model, policy, state, horizon=5)
    torch.manual_seed(0)
    assert_close(imagine(model, policy, state, horizon=5), first, rtol=0, atol=0)
    best = [policy.act(dream.view[:, 0], policy.initial(4), greedy=True)[0] for _ in range(2)]
    assert torch.equal(best[0], best[1])
    every = torch.cat([dream.action.flatten(0, 1), best[0]])
    if model.spec.discrete:
        assert every.dtype == torch.int64 and every.min() >= 0 and every.max() < model.spec.action_size
    else:
        assert every.dtype == torch.float32 and every.abs().max() <= 1
    assert not torch.equal(dream.action, first.action), "a policy explores"
