"""IRIS's policy: its size, its memory, its loss, and that it learns to remember.

Shapes: B batch, H horizon, F features, A actions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agent.trainer import Trainer
from envs.spec import Spec
from policies.cnn_lstm import CnnLstm, CnnLstmConfig
from policies.interface import Policy, Trajectory
from policies.returns import lambda_returns
from tests.toys import lost

SPEC = Spec((3, 16, 16), 2, discrete=True)
SIZE = 3 * 16 * 16
SMALL = CnnLstmConfig(channels=(4, 8), hidden=16, starts=6, horizon=3, lr=3e-3, updates=1)


def learner(config: CnnLstmConfig = SMALL, spec: Spec = SPEC) -> CnnLstm:
    torch.manual_seed(0)
    return config.build(spec.frame[0] * spec.frame[1] * spec.frame[2], spec)


def lived(batch: int = 5, horizon: int = 4) -> Trajectory:
    """A dream of noise from a memory that is not blank."""
    torch.manual_seed(1)
    memory = {key: torch.randn(batch, 16) for key in ("h", "c")}
    view, action = torch.rand(batch, horizon + 1, SIZE), torch.randint(2, (batch, horizon))
    return Trajectory(view, action, torch.randn(batch, horizon), torch.rand(batch, horizon), memory)


# ---- the network ----
def test_it_has_the_paper_s_size() -> None:
    spec = Spec((3, 64, 64), 6, discrete=True)
    with torch.device("meta"):
        made = CnnLstmConfig().build(3 * 64 * 64, spec)
    assert sum(p.numel() for p in made.parameters()) == 3_218_983
    (objective,) = made.objectives()
    assert {id(p) for p in objective.params} == {id(p) for p in made.parameters()}


@pytest.mark.parametrize("frame", [(3, 84, 64), (3, 112, 80), (1, 210, 160)], ids=str)
def test_frames_of_any_height_and_width(frame: tuple[int, int, int]) -> None:
    made = learner(SMALL, Spec(frame, 2, discrete=True))
    view, action = torch.rand(2, 4, frame[0] * frame[1] * frame[2]), torch.randint(2, (2, 3))
    dream = Trajectory(view, action, torch.randn(2, 3), torch.rand(2, 3), made.policy.initial(2))
    torch.stack([term.value.mean() for term in made.objectives()[0].loss(dream).terms.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in made.parameters())


@torch.no_grad()
def test_views_one_by_one_are_the_views_at_once() -> None:
    policy, dream = learner().policy, lived()
    memory, hidden = dream.memory, list[Tensor]()
    for view in dream.view.split(1, 1):
        out, memory = policy.follow(view, memory)
        hidden.append(out)
    whole, after = policy.follow(dream.view, dream.memory)
    assert_close((torch.cat(hidden, 1), memory), (whole, after))
    assert_close(memory["h"], whole[:, -1], rtol=0, atol=0)
    initial, _ = policy.follow(dream.view, policy.initial(5))
    assert not torch.allclose(initial[:, 0], whole[:, 0], atol=1e-3), "memory matters"


@torch.no_grad()
def test_the_first_layer_sees_frames_between_minus_1_and_1() -> None:
    policy, seen = learner().policy, list[Tensor]()
    policy.convs[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    frame = torch.stack([torch.zeros(SIZE), torch.ones(SIZE), torch.linspace(0, 1, SIZE)])
    policy.act(frame, policy.initial(3))
    assert_close(seen[0], (2 * frame - 1).view(3, 3, 16, 16))


@torch.no_grad()
def test_actions_are_drawn_as_often_as_they_are_likely() -> None:
    policy = learner().policy
    policy.actor.bias.copy_(torch.tensor([0.5, -0.5]))
    view = torch.rand(1, SIZE).expand(4000, -1)
    hidden, _ = policy.follow(view[:1, None], policy.initial(1))
    chance = policy.log_probs(hidden[0, 0]).exp()
    assert_close(policy.act(view, policy.initial(4000))[0].float().mean(), chance[1], rtol=0, atol=0.03)
    assert policy.act(view, policy.initial(4000), greedy=True)[0].eq(0).all()


@pytest.mark.parametrize(
    ("config", "features", "spec", "words"),
    [
        (SMALL, SIZE, replace(SPEC, discrete=False), "discrete actions"),
        (SMALL, 40, SPEC, "frames of 3x16x16, and this world model's features are 40 numbers"),
        (CnnLstmConfig(channels=(4,) * 5), SIZE, SPEC, "16x16 cannot be halved 5 times"),
        (replace(SMALL, channels=()), SIZE, SPEC, "at least 1"),
        (replace(SMALL, hidden=0), SIZE, SPEC, "at least 1"),
    ],
)
def test_impossible_policies(config: CnnLstmConfig, features: int, spec: Spec, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config.build(features, spec)


# ---- the loss ----
def test_the_loss_is_that_of_the_paper() -> None:
    made, dream = learner(), lived()
    trainer = Trainer(made.objectives(), device=torch.device("cpu"), precision="fp32")
    with torch.no_grad():
        hidden, _ = made.policy.follow(dream.view, dream.memory)
        value, log_probs = made.critic(hidden)[..., 0], made.policy.log_probs(hidden)
    told = made.improve(lambda policy: dream, trainer.update)
    returns = lambda_returns(dream.reward, dream.cont, value, gamma=0.995, lam=0.95)
    policy, entropy, error = (torch.zeros(5, 4) for _ in range(3))
    for b in range(5):
        alive = 1.0
        for t in range(4):
            row = log_probs[b, t]
            policy[b, t] = -alive * row[dream.action[b, t]] * (returns[b, t] - value[b, t])
            entropy[b, t] = alive * (row.exp() * row).sum()
            error[b, t] = alive * (value[b, t] - returns[b, t]) ** 2
            alive *= float(dream.cont[b, t])
    report = trainer.report()
    for name, expected in (("policy", policy), ("entropy", entropy), ("value", error)):
        assert report[f"actor/{name}"] == pytest.approx(expected.mean().item(), rel=1e-4), name
    assert_close(told["return"], returns.mean())
    assert made.objectives()[0].scales == {"policy": 1.0, "entropy": 1e-3, "value": 1.0}


def test_gradients_flow_through_the_memory_to_the_first_view_and_not_beyond_the_target() -> None:
    made, dream = learner(), lived()
    view, memory = dream.view.requires_grad_(), {key: x.requires_grad_() for key, x in dream.memory.items()}
    terms = lost(made.objectives()[0].loss(dream._replace(view=view, memory=memory)), dream).terms
    late, first = torch.autograd.grad(terms["policy"][:, -1].sum(), [view, memory["c"]], retain_graph=True)
    assert (late[:, :-1].abs().sum(-1) > 0).all() and (first.abs().sum(-1) > 0).all()
    assert not late[:, -1].any(), "the last view only says what the return is worth"
    early = torch.autograd.grad(terms["policy"][:, 0].sum() + terms["value"][:, 0].sum(), view)[0]
    assert early[:, 0].any() and not early[:, 1:].any(), "returns and baselines are data"


# ---- learning ----
def test_it_learns_to_act_on_what_it_saw_before_the_dream_and_at_its_beginning() -> None:
    """The colour of a frame in the context, or of a dream's first one, decides which action pays some gray ones on."""
    made = learner(replace(SMALL, channels=(4, 4), gamma=0.9))
    trainer = Trainer(made.objectives(), device=torch.device("cpu"), precision="fp32")
    fair: list[float] = []

    def rollout(policy: Policy) -> Trajectory:
        context, early = torch.randint(2, (2, 64))
        told = (2 * context - 1).view(-1, 1) * torch.ones(SIZE) * 0.5 + 0.5
        view = torch.full((64, 4, SIZE), 0.5)
        view[:, 0] = torch.where((early == 1).unsqueeze(1), told, 0.5)
        with torch.no_grad():
            before = torch.where((early == 0).unsqueeze(1), told, 0.5)
            _, memory = policy.act(before, policy.initial(64))
            actions, now = [], memory
            for t in range(3):
                action, now = policy.act(view[:, t], now)
                actions.append(action)
        reward = torch.zeros(64, 3)
        reward[:, 2] = (actions[2] == context).float()
        fair.append(reward.sum(1).mean().item())
        return Trajectory(view, torch.stack(actions, 1), reward, torch.tensor([1.0, 1.0, 0.0]).expand(64, 3), memory)

    for _ in range(150):
        made.improve(rollout, trainer.update)
    trainer.check()
    assert sum(fair[:10]) / 10 < 0.6 and sum(fair[-10:]) / 10 > 0.95
