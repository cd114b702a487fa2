"""The linear controller of World Models (Ha & Schmidhuber 2018, section 2.3), and many of them acting side by side.

It is found by evolution, so nothing here has a gradient.
Shapes: B batch, F features, A action size, P candidates, R rows of each, n = A (F + 1) numbers of a controller.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from envs.spec import Spec
from policies.interface import Policy
from world_model import noise
from world_model.trees import Tree


class Linear(Policy):
    """W x + b: tanh of it in [-1, 1]^A, or the largest of A scores when actions are discrete.

    Deviation: the paper maps gas to [0, 1] and clips the brake; here that is the game's part (`envs/gym.py`). Acting
    without `greedy` explores: Gaussian noise of standard deviation `noise` on continuous actions, a uniformly random
    action with probability `noise` on discrete ones.
    """

    def __init__(self, features: int, spec: Spec, noise: float = 0.1) -> None:
        super().__init__()
        self.features, self.actions, self.discrete, self.noise = features, spec.action_size, spec.discrete, noise
        self.weight = nn.Parameter(torch.zeros(spec.action_size, features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(spec.action_size), requires_grad=False)

    @property
    def size(self) -> int:
        """n: how many numbers it consists of."""
        return self.actions * (self.features + 1)

    def act(self, view: Tensor, memory: Tree = (), greedy: bool = False) -> tuple[Tensor, Tree]:
        action = decide(self.scores(view), self.discrete)
        if greedy:
            return action, memory
        if self.discrete:
            wander = noise.uniform(action.shape, action.device) < self.noise
            other = (noise.uniform(action.shape, action.device) * self.actions).to(action.dtype)
            return torch.where(wander, other, action), memory
        return (action + self.noise * noise.normal(action)).clamp(-1, 1), memory

    def probabilities(self, view: Tensor) -> Tensor | None:
        """How far the scores of discrete actions are apart, as a softmax; it acts by the largest all the same."""
        return self.scores(view).softmax(-1) if self.discrete else None

    def scores(self, view: Tensor) -> Tensor:
        """W x + b in float32: (B, F) -> (B, A)."""
        with torch.autocast(view.device.type, enabled=False):  # so that a dream and a game decide alike
            return nn.functional.linear(view.float(), self.weight, self.bias)

    def flat(self) -> Tensor:
        """All its numbers, the weights row by row and then the bias: (n,)."""
        return torch.cat([self.weight.flatten(), self.bias])

    @torch.no_grad()
    def load_flat(self, vector: Tensor) -> None:
        """The inverse of `flat`; ValueError when the length is another."""
        weight, bias = split(vector, self)
        self.weight.copy_(weight)
        self.bias.copy_(bias)


class Population(Policy):
    """P linear controllers at once: rows (P * R, F) go candidate by candidate; R may differ from call to call.

    Always greedy: candidates are compared, and exploration would only blur what they are.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, like: Linear, vectors: Tensor) -> None:
        """Controllers of the kind of `like`, on its device, from vectors (P, n)."""
        super().__init__()
        self.size, self.discrete, self.population_size = like.size, like.discrete, len(vectors)
        weight, bias = split(vectors.to(like.weight), like)
        self.register_buffer("weight", weight.clone())  # (P, A, F)
        self.register_buffer("bias", bias.clone())  # (P, A)

    def act(self, view: Tensor, memory: Tree = (), greedy: bool = False) -> tuple[Tensor, Tree]:
        rows, features = view.shape
        if rows % self.population_size:
            raise ValueError(f"{self.population_size} candidates cannot share {rows} rows evenly")
        with torch.autocast(view.device.type, enabled=False):
            grouped = view.float().view(self.population_size, -1, features)  # (P, R, F)
            scores = torch.baddbmm(self.bias.unsqueeze(1), grouped, self.weight.mT)  # (P, R, A)
        return decide(scores.flatten(0, 1), self.discrete), memory

    @torch.no_grad()
    def replace(self, candidate: int, vector: Tensor) -> None:
        """Puts another controller (n,) in the place of one."""
        weight, bias = split(vector, self)
        self.weight[candidate] = weight
        self.bias[candidate] = bias


def decide(scores: Tensor, discrete: bool) -> Tensor:
    """(..., A) -> actions: (...) int64 or (..., A) in [-1, 1]."""
    return scores.argmax(-1) if discrete else scores.tanh()


def split(vectors: Tensor, like: Linear | Population) -> tuple[Tensor, Tensor]:
    """Flat controllers (..., n) -> weight (..., A, F) and bias (..., A); ValueError when n is another number."""
    actions = like.bias.shape[-1]
    if vectors.shape[-1] != like.size:
        raise ValueError(f"a controller of {like.size} numbers cannot be made of {vectors.shape[-1]}")
    weight, bias = vectors.split([like.size - actions, actions], -1)
    return weight.unflatten(-1, (actions, -1)), bias
