"""IRIS's policy: a small convolutional network and an LSTM that see decoded frames (Micheli et al. 2023, appendix A.3).

REINFORCE with the critic as baseline, on lambda-returns of the dream; gradients flow through the LSTM over the horizon.
Shapes: B batch, H horizon, T views, F = C * H * W numbers of a frame, A actions, D width of the LSTM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.settings import setting
from envs.spec import Spec
from policies.interface import ACTOR_METRICS, DREAM_METRICS, Learner, Policy, Rollout, Trajectory, Update
from policies.returns import lambda_returns
from world_model.interface import Losses, Metric, Objective, Optim, Term
from world_model.parts.heads import draw
from world_model.trees import Tree

BOTH_METRICS = ACTOR_METRICS | {  # actor and critic are one objective
    "value": Metric("squared error of the critic"),
    "return": DREAM_METRICS["return"]._replace(shown="", panel=""),
    "advantage_rms": Metric("size of the advantages"),
}


@dataclass(frozen=True)
class CnnLstmConfig:
    """The paper's numbers; `starts` dreams are made at each update."""

    starts: int = setting(64, 1, 65_536, help="dreams at each update")
    horizon: int = setting(20, 1, 10_000, help="steps of a dream")
    temperature: float = setting(1.0, 0, 100, help="sampling temperature of the dream's latents")
    channels: tuple[int, ...] = setting(
        (32, 32, 64, 64), 1, 4096, help="channels of the convolutions, after each of which the picture is halved"
    )
    hidden: int = setting(512, 1, 16_384, help="width of the LSTM")
    gamma: float = setting(0.995, 0, 1, help="discount")
    lam: float = setting(0.95, 0, 1, help="lambda of the returns")
    entropy: float = setting(1e-3, 0, 10, help="entropy bonus")
    updates: int = setting(200, 0, resumable=True, help="updates a round")
    lr: float = setting(1e-4, above=0, high=1, resumable=True, help="learning rate")
    clip: float = setting(10.0, above=0, help="largest norm of a gradient")

    def build(self, features: int, spec: Spec) -> CnnLstm:
        """The learner for a world model whose features are its decoded frames, and a game with discrete actions."""
        return CnnLstm(self, features, spec)


class CnnLstmPolicy(Policy):
    """A frame in [0, 1], flattened, and what came before it -> a categorical over actions. Memory {"h", "c"}: (B, D).

    The network itself sees frames in [-1, 1], as the published one does.
    """

    is_recurrent = True
    signs = True  # the published agent never learns how large a reward is

    def __init__(self, config: CnnLstmConfig, frame: tuple[int, int, int], actions: int) -> None:
        super().__init__()
        self.frame = frame
        colours, height, width = frame
        sizes = (colours, *config.channels)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:], strict=False))
        places = (height >> len(self.convs)) * (width >> len(self.convs))
        self.lstm = nn.LSTM(sizes[-1] * places, config.hidden, batch_first=True)
        self.actor = nn.Linear(config.hidden, actions)

    def initial(self, batch_size: int) -> Tree:
        zeros = self.actor.weight.new_zeros(batch_size, self.lstm.hidden_size)
        return {"h": zeros, "c": zeros.clone()}

    def act(self, view: Tensor, memory: Tree = (), greedy: bool = False) -> tuple[Tensor, Tree]:
        hidden, memory = self.follow(view.unsqueeze(1), memory or self.initial(len(view)))
        log_probs = self.log_probs(hidden[:, 0])
        return (log_probs.argmax(-1) if greedy else draw(log_probs)), memory

    def follow(self, view: Tensor, memory: Tree) -> tuple[Tensor, Tree]:
        """Views (B, T, F) one after the other: the LSTM's outputs (B, T, D), and the memory after the last of them."""
        batch, times = view.shape[:2]
        x = 2 * view.reshape(-1, *self.frame) - 1
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        before = (memory["h"].unsqueeze(0), memory["c"].unsqueeze(0))
        hidden, (h, c) = self.lstm(x.reshape(batch, times, -1), before)
        return hidden.float(), {"h": h[0].float(), "c": c[0].float()}

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., A)."""
        return F.log_softmax(self.actor(hidden).float(), -1)


class CnnLstm(Learner):
    """Learns by one gradient step a dream; actor and critic share everything but their last layer.

    Raises ValueError for continuous actions, features that are not frames, and frames too small to be halved so often.

    Deviations: reward and continuation are the world model's expectations where the published code samples them, and
    what a dream does after it has probably ended counts as little as it is likely.
    """

    metrics = DREAM_METRICS

    def __init__(self, config: CnnLstmConfig, features: int, spec: Spec) -> None:
        super().__init__()
        colours, height, width = spec.frame
        if not spec.discrete:
            raise ValueError("the CNN-LSTM policy needs a game with discrete actions")
        if features != colours * height * width:
            text = f"the CNN-LSTM policy sees frames of {colours}x{height}x{width}, and this world model's features"
            raise ValueError(f"{text} are {features} numbers of another kind")
        if not config.channels or min(*config.channels, config.hidden) < 1:
            raise ValueError(f"sizes of the CNN-LSTM policy are at least 1, got {config}")
        if min(height, width) >> len(config.channels) == 0:
            raise ValueError(f"frames of {height}x{width} cannot be halved {len(config.channels)} times")
        self.config = config
        self.policy: CnnLstmPolicy = CnnLstmPolicy(config, spec.frame, spec.action_size)
        self.critic = nn.Linear(config.hidden, 1)

    def objectives(self) -> tuple[Objective, ...]:
        scales = {"policy": 1.0, "entropy": self.config.entropy, "value": 1.0}
        optim = Optim(lr=self.config.lr, clip=self.config.clip, warmup=0)
        return (Objective("actor", tuple(self.parameters()), self._loss, scales, optim, metrics=BOTH_METRICS),)

    def plan(self, *, last: bool, only: str = "") -> tuple[tuple[str, int], ...]:
        return (("dream", self.config.updates),)

    def improve(self, rollout: Rollout, update: Update) -> dict[str, Tensor]:
        """One dream and one gradient step on it."""
        dream = rollout(self.policy)
        losses = update(self.objectives()[0], dream)
        told = {"dream_reward": dream.reward.mean(), "dream_cont": dream.cont.mean()}
        return told if losses is None else told | {"return": losses.metrics["return"]}

    def _loss(self, dream: Trajectory) -> Losses:
        """Terms (B, H). The views are gone through once more, with gradients, from the memory before them.

        A dream in the real game begins without a memory.
        """
        hidden, _ = self.policy.follow(dream.view, dream.memory or self.policy.initial(len(dream.view)))
        log_probs = self.policy.log_probs(hidden[:, :-1])  # (B, H, A)
        value = self.critic(hidden).float().squeeze(-1)  # (B, H + 1)
        with torch.no_grad():
            returns = lambda_returns(dream.reward, dream.cont, value, gamma=self.config.gamma, lam=self.config.lam)
            advantage = returns - value[:, :-1]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        chosen = log_probs.gather(-1, dream.action.unsqueeze(-1)).squeeze(-1)
        terms = {
            "policy": Term(-chosen * advantage, "alive"),
            "entropy": Term(-entropy, "alive"),
            "value": Term((value[:, :-1] - returns).square(), "alive"),
        }
        rms = advantage.square().mean().sqrt()
        return Losses(terms, {"entropy_nats": entropy.detach().mean(), "return": returns.mean(), "advantage_rms": rms})
