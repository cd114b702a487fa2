"""The actor-critic: what it makes of a dream, how it uses it, and that it learns from hand-made ones.

Shapes: B batch, H horizon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agent.trainer import Trainer
from envs.spec import Spec
from policies.actor_critic import ActorCritic, ActorCriticConfig, Targets
from policies.imagination import imagine
from policies.interface import Policy, Trajectory
from policies.returns import lambda_returns
from tests.toys import VARIANTS, Variant, lost, segments
from world_model.interface import Objective

DISCRETE, CONTINUOUS = Spec((1, 1, 1), 2, True), Spec((1, 1, 1), 1, False)
CONFIG = ActorCriticConfig(hidden=16, layers=1, minibatches=4, actor_lr=5e-3, critic_lr=5e-3, entropy=1e-3)


def learner(spec: Spec = DISCRETE, features: int = 6, **changes: Any) -> ActorCritic:
    torch.manual_seed(0)
    made = replace(CONFIG, **changes).build(features, spec)
    with torch.no_grad():
        for parameter in (*made.policy.parameters(), *made.critic.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def dreams(count: int = 10, horizon: int = 3) -> Trajectory:
    rng = torch.Generator().manual_seed(0)
    view = torch.randn(count, horizon + 1, 6, generator=rng)
    view[..., 0] = torch.arange(float(count)).unsqueeze(1)  # every dream carries its number
    action = torch.randint(2, (count, horizon), generator=rng)
    reward, cont = torch.randn(count, horizon, generator=rng), torch.rand(count, horizon, generator=rng)
    cont[0, 0] = 0.0
    return Trajectory(view, action, reward, cont)


class Recorder:
    """Stands where the trainer stands, and only writes down what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[str, Targets]] = []

    def __call__(self, objective: Objective, data: Any) -> None:
        self.given.append((objective.name, data))


def test_every_dream_is_used_once_by_each_objective() -> None:
    made, record, dream = learner(), Recorder(), dreams()
    metrics = made.improve(lambda policy: dream, record)
    names = [name for name, _ in record.given]
    assert names == ["actor", "critic"] * 4
    for objective in ("actor", "critic"):
        parts = [part for name, part in record.given if name == objective]
        used = torch.cat([part.view[:, 0, 0] for part in parts])
        assert sorted(used.tolist()) == list(range(10))
        for part in parts:  # and its parts stay together
            rows = part.view[:, 0, 0].long()
            assert_close(part.view, dream.view[rows, :-1])
            assert_close(part.action, dream.action[rows])
    assert used.tolist() != sorted(used.tolist()), "in random order"
    assert all(metric.shape == () and not metric.requires_grad for metric in metrics.values())


def test_targets_are_returns_and_advantages_of_what_was_alive() -> None:
    made, dream = learner(), dreams()
    targets = made._targets(dream)
    value = made.twohot.mean(made.critic(dream.view)).detach()
    returns = lambda_returns(dream.reward, dream.cont, value, gamma=CONFIG.gamma, lam=CONFIG.lam)
    assert_close(targets.returns, returns)
    low, high = torch.quantile(returns.flatten(), torch.tensor([0.05, 0.95]))
    assert_close(targets.advantage, (returns - value[:, :-1]) / (high - low))
    alive = [[1.0, float(c[0]), float(c[0] * c[1])] for c in dream.cont]
    assert_close(targets.alive, torch.tensor(alive))
    assert targets.alive[0].tolist() == [1, 0, 0]  # the step that ended it counts, what came after does not
    assert not any(part.requires_grad for part in targets)


def test_losses_reach_their_own_networks_and_forget_the_dead() -> None:
    made = learner()
    targets = made._targets(dreams())
    actor, critic = made.objectives()
    for objective, others in ((actor, critic.params), (critic, actor.params)):
        terms = lost(objective.loss(targets), targets).terms
        assert terms.keys() == objective.scales.keys()
        assert all(term.shape == (10, 3) and not term[0, 1:].any() and term[1:].any() for term in terms.values())
        total = sum(term.sum() for term in terms.values())
        assert isinstance(total, Tensor)
        mine = torch.autograd.grad(total, objective.params, retain_graph=True)
        assert all(gradient.any() for gradient in mine)
        theirs = torch.autograd.grad(total, others, allow_unused=True)
        assert all(gradient is None for gradient in theirs)
    owned = [*actor.params, *critic.params]
    assert {id(p) for p in owned} == {id(p) for p in made.parameters() if p.requires_grad}


def test_a_good_action_becomes_likelier_and_entropy_is_rewarded() -> None:
    made = learner()
    targets = made._targets(dreams())._replace(advantage=torch.ones(10, 3), alive=torch.ones(10, 3))
    log_prob, entropy = made.policy.evaluate(targets.view, targets.action)
    terms = lost(made.objectives()[0].loss(targets), targets).terms
    assert_close(terms["policy"], -log_prob)
    assert_close(terms["entropy"], -entropy)
    bad = targets._replace(advantage=-2 * targets.advantage)
    worse = lost(made.objectives()[0].loss(bad), bad).terms
    assert_close(worse["policy"], 2 * log_prob)


def test_in_several_passes_every_dream_is_used_as_often() -> None:
    record = Recorder()
    learner(epochs=3).improve(lambda policy: dreams(), record)
    used = [part.view[:, 0, 0].tolist() for name, part in record.given if name == "actor"]
    assert len(used) == 12
    for start in (0, 4, 8):
        assert sorted(sum(used[start : start + 4], [])) == list(range(10))
    assert used[:4] != used[4:8], "in another order"


def test_several_passes_begin_as_one_and_stop_when_the_policy_has_gone_far() -> None:
    several, one = learner(epochs=2, entropy=0.0), learner(entropy=0.0)
    targets = several._targets(dreams())
    gradients = [
        torch.autograd.grad(
            lost(made.objectives()[0].loss(targets), targets).terms["policy"].sum(), tuple(made.policy.parameters())
        )
        for made in (several, one)
    ]
    assert_close(*gradients)
    away = targets._replace(log_prob=targets.log_prob - 0.5)  # all actions have become 1.65 times as likely
    for sign, moves in ((1.0, False), (-1.0, True)):
        far = away._replace(advantage=sign * torch.ones(10, 3))
        gain = lost(several.objectives()[0].loss(far), far).terms["policy"].sum()
        assert any(g.any() for g in torch.autograd.grad(gain, tuple(several.policy.parameters()))) == moves


def test_the_slow_critic_follows_and_is_not_trained() -> None:
    made = learner(slow_rate=0.25)
    assert not any(p.requires_grad for p in made.slow_critic.parameters())
    before = [p.clone() for p in made.slow_critic.parameters()]

    def move(objective: Objective, data: Any) -> None:
        with torch.no_grad():
            for parameter in objective.params:
                parameter.add_(1.0)

    fast = [p.detach().clone() for p in made.critic.parameters()]
    made.improve(lambda policy: dreams(), move)
    for slow, old, start in zip(made.slow_critic.parameters(), before, fast, strict=True):
        expected = old
        for step in range(1, CONFIG.minibatches + 1):
            expected = expected + 0.25 * (start + step - expected)
        assert_close(slow, expected)


def train(
    made: ActorCritic, rollout: Callable[[Policy], Trajectory], improvements: int, precision: str = "fp32"
) -> None:
    trainer = Trainer(made.objectives(), device=torch.device("cpu"), precision=precision)
    with trainer.mixed():
        for _ in range(improvements):
            made.improve(rollout, trainer.update)
    trainer.check()


def places(context: Tensor, horizon: int) -> Tensor:
    """Views (B, H + 1, 6) that say the context (0 or 1) and the time."""
    time = torch.arange(horizon + 1).expand(len(context), -1)
    return torch.nn.functional.one_hot(context.unsqueeze(1) * 3 + time, 6).float()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bandit_with_two_arms_is_solved_in_both_contexts(precision: str) -> None:
    made = learner()

    def rollout(policy: Policy) -> Trajectory:
        context = torch.randint(2, (64,))
        view = places(context, 1)
        with torch.no_grad():
            action, _ = policy.act(view[:, 0])
        return Trajectory(view, action.unsqueeze(1), (action == context).float().unsqueeze(1), torch.zeros(64, 1))

    train(made, rollout, 120, precision)
    with torch.no_grad():
        view = places(torch.tensor([0, 1]), 1)[:, 0]
        log_prob, _ = made.policy.evaluate(view, torch.tensor([0, 1]))
        assert made.policy.act(view, greedy=True)[0].tolist() == [0, 1]
        assert (log_prob.exp() > 0.9).all()
        assert_close(made.twohot.mean(made.critic(view)), torch.ones(2), rtol=0, atol=0.2)


def test_patience_is_learned_where_it_pays() -> None:
    """Arm 0 pays 0.3 and ends the game; arm 1 pays nothing now, and the context decides whether 1 comes later."""
    made = learner(lam=0.95)

    def rollout(policy: Policy) -> Trajectory:
        context = torch.randint(2, (64,))
        view = places(context, 2)
        with torch.no_grad():
            action = torch.stack([policy.act(view[:, t])[0] for t in range(2)], 1)
        ended = action[:, 0] == 0
        reward = torch.stack([0.3 * ended, context.float()], 1)  # the second is dreamed even after the end
        return Trajectory(view, action, reward, torch.stack([1 - ended.float(), torch.zeros(64)], 1))

    train(made, rollout, 120)
    with torch.no_grad():
        assert made.policy.act(places(torch.tensor([0, 1]), 2)[:, 0], greedy=True)[0].tolist() == [0, 1]


def test_a_continuous_target_is_found() -> None:
    made = learner(CONTINUOUS, actor_lr=2e-3)

    def rollout(policy: Policy) -> Trajectory:
        context = torch.randint(2, (128,))
        view = places(context, 1)
        with torch.no_grad():
            action, _ = policy.act(view[:, 0])
        reward = -(action - (context.unsqueeze(1) - 0.5)).square()
        return Trajectory(view, action.unsqueeze(1), reward, torch.zeros(128, 1))

    train(made, rollout, 80)
    with torch.no_grad():
        action = made.policy.act(places(torch.tensor([0, 1]), 1)[:, 0], greedy=True)[0]
    assert_close(action, torch.tensor([[-0.5], [0.5]]), rtol=0, atol=0.15)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_recipe_improves_in_its_own_dream(variant: Variant) -> None:
    agent = variant.agent()
    model, made = agent.world_model, agent.learner
    batch = segments(model.spec, 8, 3)
    with torch.no_grad():
        state = model.start(batch.frame / 255, batch.action)
    trainer = Trainer(made.objectives(), device=torch.device("cpu"), precision="fp32")
    world, before = [p.clone() for p in model.parameters()], [p.clone() for p in made.policy.parameters()]
    for _ in range(2):
        metrics = made.improve(lambda policy: imagine(model, policy, state, horizon=4), trainer.update)
    assert all(metric.isfinite() for metric in metrics.values())
    trainer.check()
    assert any(not torch.equal(a, b) for a, b in zip(made.policy.parameters(), before, strict=True))
    assert_close(list(model.parameters()), world, rtol=0, atol=0)
