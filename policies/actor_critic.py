"""Actor-critic in imagination (DreamerV3, section 'Actor critic learning'): REINFORCE for discrete actions, a squashed
Gaussian for continuous ones, a two-hot critic with a slow copy, advantages scaled by the range of returns.

Shapes: B batch, H horizon, F features, A action size, K bins.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.settings import setting
from envs.spec import Spec
from policies.interface import ACTOR_METRICS, DREAM_METRICS, Learner, Policy, Rollout, Trajectory, Update
from policies.returns import ReturnScale, lambda_returns
from world_model import noise
from world_model.interface import Losses, Metric, Objective, Optim, Term
from world_model.parts.heads import Mean, TwoHot, draw, mixed_log_probs
from world_model.parts.nets import mlp
from world_model.trees import Tree

METRICS = DREAM_METRICS | {
    "return_scale": Metric("range between the 5th and 95th percentile of returns, by which advantages are divided"),
    "advantage_rms": Metric("size of the advantages, after that division"),
}
CRITIC_METRICS = {
    "value": Metric("cross-entropy of the critic against the returns"),
    "slow": Metric("cross-entropy of the critic against its slow copy"),
}


@dataclass(frozen=True)
class ActorCriticConfig:
    """The numbers of the actor-critic. `starts` posterior states are dreamed on from at each update (0: all)."""

    starts: int = setting(
        192,
        0,
        65_536,
        help="imagined trajectories an update; 0: one from every posterior state of the training batch (reverie alone)",
    )
    horizon: int = setting(12, 1, 10_000, help="steps of an imagined trajectory (imagination horizon)")
    temperature: float = setting(
        0.5,
        0,
        100,
        help="sampling temperature of the imagined latents: 1 draws from the model's distribution, as "
        "DreamerV3 does, below 1 sharpens it, 0 takes the mode",
    )
    hidden: int = setting(256, 1, 16_384, help="width of actor and critic")
    layers: int = setting(2, 1, 20, help="hidden layers of actor and critic")
    gamma: float = setting(0.985, 0, 1, help="discount factor")
    lam: float = setting(0.95, 0, 1, help="lambda of the lambda returns (gae_lambda)")
    entropy: float = setting(
        1e-3,
        0,
        10,
        help="entropy bonus, beside normalised advantages (ent_coef; DreamerV3: 3e-4); raise it where "
        "entropy_nats falls to 0 early",
    )
    minibatches: int = setting(
        4,
        1,
        65_536,
        help="minibatches that an imagined batch is split into; gradient steps an update: minibatches x epochs",
    )
    epochs: int = setting(
        1,
        1,
        1000,
        resumable=True,
        help="passes over an imagined batch (n_epochs): 1 is REINFORCE, several are PPO's clipped "
        "objective, for when dreams are expensive",
    )
    clip_ratio: float = setting(0.2, 0, 1, help="PPO's clip range, with several epochs")
    updates: int = setting(1, 0, resumable=True, help="updates a round")
    actor_lr: float = setting(1e-4, above=0, high=1, resumable=True, help="learning rate of the policy")
    critic_lr: float = setting(3e-4, above=0, high=1, resumable=True, help="learning rate of the critic")
    clip: float = setting(10.0, above=0, help="largest norm of a gradient (max_grad_norm)")
    slow_rate: float = setting(
        0.02, 0, 1, help="how far the target critic moves towards the critic at each gradient step (EMA)"
    )
    slow_scale: float = setting(1.0, 0, 1e3, help="weight of the loss that keeps the critic near its target")
    return_floor: float = setting(
        0.1,
        above=0,
        help="least value of the 5 to 95 % range of returns that advantages are divided by (DreamerV3: "
        "1); lower amplifies small rewards",
    )
    twohot: Mean = setting(
        "symlog",
        help="mean of the critic's two-hot bins: in symlog space, where large returns that are uncertain count little "
        "(STORM), or of what the bins are worth (symexp; DreamerV3)",
    )
    unimix: float = setting(0.01, 0, 1, help="share of the uniform distribution in the policy (DreamerV3: 0.01)")

    def build(self, features: int, spec: Spec) -> ActorCritic:
        """The learner for a world model's features and a game's actions."""
        return ActorCritic(self, features, spec)


class DiscreteActor(Policy):
    """features -> a categorical over actions, 1 % uniform."""

    def __init__(self, config: ActorCriticConfig, features: int, actions: int) -> None:
        super().__init__()
        self.unimix = config.unimix
        self.net = mlp(features, config.hidden, actions, layers=config.layers, zero=True)

    def log_probs(self, view: Tensor) -> Tensor:
        """(..., F) -> (..., A)."""
        return mixed_log_probs(self.net(view).float(), self.unimix)

    def act(self, view: Tensor, memory: Tree = (), greedy: bool = False) -> tuple[Tensor, Tree]:
        log_probs = self.log_probs(view)
        return (log_probs.argmax(-1) if greedy else draw(log_probs)), memory

    def probabilities(self, view: Tensor) -> Tensor:
        return self.log_probs(view).exp()

    def evaluate(self, view: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of the action and the entropy in nats, (...) each."""
        log_probs = self.log_probs(view)
        chosen = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return chosen, -(log_probs.exp() * log_probs).sum(-1)


class ContinuousActor(Policy):
    """features -> a Gaussian squashed by tanh into [-1, 1]^A."""

    def __init__(self, config: ActorCriticConfig, features: int, actions: int) -> None:
        super().__init__()
        self.net = mlp(features, config.hidden, 2 * actions, layers=config.layers, zero=True)

    def _gaussian(self, view: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.net(view).float().chunk(2, -1)
        return 2 * torch.tanh(mean / 2), 0.1 + 0.9 * torch.sigmoid(spread + 2)  # means within the squash's useful range

    def act(self, view: Tensor, memory: Tree = (), greedy: bool = False) -> tuple[Tensor, Tree]:
        mean, std = self._gaussian(view)
        raw = mean if greedy else mean + std * noise.normal(mean)
        return torch.tanh(raw), memory

    def evaluate(self, view: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of the squashed action, and the entropy of the Gaussian before squashing plus E[ln |tanh'|]."""
        mean, std = self._gaussian(view)
        raw = torch.atanh(action.clamp(-1 + 1e-5, 1 - 1e-5))
        log_prob = -0.5 * ((raw - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - _log_slope(raw)
        sample = mean + std * torch.randn_like(mean)  # one draw estimates how much squashing takes away
        entropy = 0.5 + 0.5 * math.log(2 * math.pi) + std.log() + _log_slope(sample)
        return log_prob.sum(-1), entropy.sum(-1)


def _log_slope(raw: Tensor) -> Tensor:
    """ln(d tanh(x) / dx), without overflow."""
    return 2 * (math.log(2) - raw - F.softplus(-2 * raw))


class Targets(NamedTuple):
    """A dream with its returns: what one gradient step needs."""

    view: Tensor  # (B, H, F)
    action: Tensor  # (B, H) or (B, H, A)
    returns: Tensor  # (B, H)
    advantage: Tensor  # (B, H), in units of the return scale
    log_prob: Tensor  # (B, H) of the action when it was dreamed; zeros for a single pass
    alive: Tensor  # (B, H) probability that the dream had not ended before

    def mask(self, name: str) -> Tensor:
        """ "alive"."""
        return {"alive": self.alive}[name]


class ActorCritic(Learner):
    """Learns from dreams by policy gradient; see the module's text."""

    metrics = METRICS
    updates_are_graph_safe = True

    def __init__(self, config: ActorCriticConfig, features: int, spec: Spec) -> None:
        super().__init__()
        self.config = config
        actor = DiscreteActor if spec.discrete else ContinuousActor
        self.policy: DiscreteActor | ContinuousActor = actor(config, features, spec.action_size)
        self.twohot = TwoHot(mean=config.twohot)
        self.critic = mlp(features, config.hidden, self.twohot.count, layers=config.layers, zero=True)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.scale = ReturnScale(config.return_floor)

    def objectives(self) -> tuple[Objective, ...]:
        clip = self.config.clip
        actor, critic = tuple(self.policy.parameters()), tuple(self.critic.parameters())
        return (
            Objective("actor", actor, self._actor_loss, {"policy": 1.0, "entropy": self.config.entropy},
                      Optim(lr=self.config.actor_lr, clip=clip), metrics=ACTOR_METRICS),
            Objective("critic", critic, self._critic_loss, {"value": 1.0, "slow": self.config.slow_scale},
                      Optim(lr=self.config.critic_lr, clip=clip), metrics=CRITIC_METRICS,
                      after=self.twohot.note if self.twohot.symexp else None),
        )  # fmt: skip

    def plan(self, *, last: bool, only: str = "") -> tuple[tuple[str, int], ...]:
        return (("dream", self.config.updates),)

    def improve(self, rollout: Rollout, update: Update) -> dict[str, Tensor]:
        """Dreams once, computes returns once, then takes `minibatches` gradient steps a pass over the dreams."""
        dream = rollout(self.policy)
        targets = self._targets(dream)
        for _ in range(self.config.epochs):
            for rows in torch.randperm(len(dream.reward), device=dream.reward.device).chunk(self.config.minibatches):
                part = Targets(*(field[rows] for field in targets))
                for objective in self.objectives():
                    update(objective, part)
                self._follow()
        return {
            "dream_reward": dream.reward.mean(),
            "dream_cont": dream.cont.mean(),
            "return": targets.returns.mean(),
            "return_scale": self.scale.value.clone(),
            "advantage_rms": targets.advantage.square().mean().sqrt(),
        }

    @torch.no_grad()
    def value(self, view: Tensor) -> Tensor:
        return self.twohot.mean(self.critic(view))

    @torch.no_grad()
    def _targets(self, dream: Trajectory) -> Targets:
        value = self.value(dream.view)  # (B, H + 1)
        returns = lambda_returns(dream.reward, dream.cont, value, gamma=self.config.gamma, lam=self.config.lam)
        advantage = (returns - value[:, :-1]) / self.scale.update(returns)
        log_prob = torch.zeros_like(returns)  # one pass compares with nothing
        if self.config.epochs > 1:
            log_prob, _ = self.policy.evaluate(dream.view[:, :-1], dream.action)
        return Targets(dream.view[:, :-1], dream.action, returns, advantage, log_prob, dream.mask("alive"))

    def _actor_loss(self, part: Targets) -> Losses:
        log_prob, entropy = self.policy.evaluate(part.view, part.action)
        terms = {"policy": Term(-self._gain(log_prob, part), "alive"), "entropy": Term(-entropy, "alive")}
        return Losses(terms, {"entropy_nats": entropy.detach().mean()})

    def _gain(self, log_prob: Tensor, part: Targets) -> Tensor:
        """REINFORCE's; in several passes, in which the policy leaves the one that dreamed, PPO's (2017, equation 7)."""
        if self.config.epochs == 1:
            return log_prob * part.advantage
        ratio, clip = (log_prob - part.log_prob).exp(), self.config.clip_ratio
        return torch.minimum(ratio * part.advantage, ratio.clamp(1 - clip, 1 + clip) * part.advantage)

    def _critic_loss(self, part: Targets) -> Losses:
        logits = self.critic(part.view)
        with torch.no_grad():
            slow = self.slow_critic(part.view).float().softmax(-1)
        terms = {
            "value": Term(self.twohot.loss(logits, part.returns), "alive"),
            "slow": Term(self.twohot.cross_entropy(logits, slow), "alive"),
        }
        return Losses(terms, {}, learned=part.returns.flatten())

    @torch.no_grad()
    def _follow(self) -> None:
        slow, fast = tuple(self.slow_critic.parameters()), tuple(self.critic.parameters())
        torch._foreach_lerp_(slow, fast, self.config.slow_rate)
