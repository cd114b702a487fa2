"""Output distributions as objects with `loss`, `mean` and (where it is drawn from) `sample`, and a masked mean."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model import noise


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): compresses both tails, identity at 0 (DreamerV3, section 'Robust predictions')."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(x.abs())


def one_hot(index: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Indices (...) -> (..., classes). Unlike torch's own it does not ask the device whether they are in range."""
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).to(dtype)


Mean = Literal["symlog", "symexp"]


class TwoHot(nn.Module):
    """A scalar as a distribution over bins that are evenly spaced in symlog space (DreamerV3, STORM).

    The target puts its weight on the two nearest bins, so that its value is their mean. With `mean="symlog"` that is
    taken in symlog space (as STORM does): a random reward is pulled towards 0, one of 100 that comes half of the time
    to 9, but the far bins, worth thousands each, cannot drown an untrained critic. With "symexp" it is taken over what
    the bins are worth (as DreamerV3 does), of those within the largest target so far, lest the far ones drown it.
    Beyond `bound` in symlog space (20: +-4.8e8) targets are clamped.
    """

    bins: Tensor
    worth: Tensor  # symexp only, as the next: of the bins, in the game's units
    reach: Tensor  # the largest target so far, in symlog space

    def __init__(self, count: int = 255, bound: float = 20.0, mean: Mean = "symlog") -> None:
        super().__init__()
        if count < 3 or count % 2 == 0:
            raise ValueError(f"two-hot needs an odd number of bins of at least 3, got {count}")
        self.count, self.bound, self.symexp = count, bound, mean == "symexp"
        self.register_buffer("bins", torch.linspace(-bound, bound, count), persistent=False)
        if self.symexp:
            self.register_buffer("worth", symexp(self.bins), persistent=False)
            self.register_buffer("reach", torch.zeros(()))

    def encode(self, value: Tensor) -> Tensor:
        """Scalars (...) -> weights (..., bins) that sum to 1, on the two bins around symlog(value)."""
        place = (symlog(value.float()).clamp(-self.bound, self.bound) / self.bound + 1) * ((self.count - 1) / 2)
        low = place.floor().long().clamp(0, self.count - 2)  # in bounds even for NaN, whose weights become NaN
        share = place - low
        if self.symexp:
            share = ((value.float() - self.worth[low]) / (self.worth[low + 1] - self.worth[low])).clamp(0, 1)
        share, index = share.unsqueeze(-1), low.unsqueeze(-1)
        weights = torch.zeros(*value.shape, self.count, device=value.device)
        weights.scatter_(-1, index, 1 - share)
        return weights.scatter_(-1, index + 1, share)

    def loss(self, logits: Tensor, value: Tensor) -> Tensor:
        """Cross-entropy in nats: (..., bins), (...) -> (...)."""
        return self.cross_entropy(logits, self.encode(value))

    @torch.no_grad()
    def note(self, value: Tensor) -> None:
        """symexp: remembers the largest of the targets (...) of an update."""
        most = symlog(value.float().abs().nan_to_num(0, 0, 0).max()).clamp(max=self.bound)
        self.reach.copy_(torch.maximum(self.reach, most))

    def cross_entropy(self, logits: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy against weights over the bins, (..., bins) each."""
        return -(weights * F.log_softmax(logits.float(), -1)).sum(-1)

    def mean(self, logits: Tensor) -> Tensor:
        """The value in the game's units: (..., bins) -> (...)."""
        if not self.symexp:
            return symexp((logits.float().softmax(-1) * self.bins).sum(-1))
        limit, middle = self.reach + 2 * self.bound / (self.count - 1), self.count // 2
        share = logits.float().masked_fill(self.bins.abs() > limit, float("-inf")).softmax(-1)
        # What each bin has more than its negative: even shares are 0 exactly, however much the bins are worth.
        odd = share[..., middle + 1 :] - share[..., :middle].flip(-1)
        return (odd * self.worth[middle + 1 :]).sum(-1)


class SignedReward(nn.Module):
    """A reward as its sign (IRIS: three classes), and what each sign is worth: the mean of the rewards that had it.

    The means are two numbers that follow the data, and no head: so the transformer, its optimiser and the checkpoints
    of the published program stay what they are, and where every reward is -1 or 1 nothing changes. What is lost: of
    several sizes with one sign the mean is told, also where the state would tell which. Before any reward of a sign
    was seen it is worth 1.
    """

    worth: Tensor
    seen: Tensor
    RECENT = 10_000  # rewards of a sign that its mean is taken over, about: an agent that gets better meets others

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("worth", torch.tensor([-1.0, 0.0, 1.0]))
        self.register_buffer("seen", torch.zeros(3))

    def target(self, reward: Tensor) -> Tensor:
        """The class of a reward in the game's units: (...) -> (...) int64."""
        return reward.sign().long() + 1

    def mean(self, logits: Tensor) -> Tensor:
        """The expected reward in the game's units: (..., 3) -> (...)."""
        return (logits.float().softmax(-1) * self.worth).sum(-1)

    def sign(self, logits: Tensor) -> Tensor:
        """The expected sign: (..., 3) -> (...) in [-1, 1]."""
        share = logits.float().softmax(-1)
        return share[..., 2] - share[..., 0]

    @torch.no_grad()
    def note(self, reward: Tensor, real: Tensor | None = None) -> None:
        """Takes rewards (M,), in the game's units, into the means: those that are `real` (M,) bool."""
        kind = one_hot(self.target(reward), 3)  # (M, 3)
        kind = kind if real is None else kind * real.unsqueeze(-1)
        count, total = kind.sum(0), (kind * reward.unsqueeze(-1)).sum(0)
        self.seen.add_(count).clamp_(max=self.RECENT)
        self.worth.add_((total - count * self.worth) / torch.maximum(self.seen, count).clamp(min=1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Checkpoints from before the means were kept lack them: they stay as they are."""
        for name, buffer in self.named_buffers():
            state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args)


def mixed_log_probs(logits: Tensor, unimix: float) -> Tensor:
    """Log-probabilities (..., K) of which a share `unimix` is the uniform distribution's; always finite."""
    if not unimix:
        return logits.log_softmax(-1)
    return ((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]).log()


class Categoricals:
    """A latent of G independent categorical variables of K classes, as one-hot vectors (..., G, K).

    A share `unimix` of the uniform distribution keeps every class possible (DreamerV3).
    """

    def __init__(self, groups: int, classes: int, unimix: float = 0.01) -> None:
        self.groups, self.classes, self.unimix = groups, classes, unimix

    def log_probs(self, raw: Tensor) -> Tensor:
        """(..., G * K) network outputs -> (..., G, K) log-probabilities with the uniform share mixed in."""
        return mixed_log_probs(raw.float().unflatten(-1, (self.groups, self.classes)), self.unimix)

    def mode(self, log_probs: Tensor) -> Tensor:
        """The most likely class of each variable, one-hot."""
        return one_hot(log_probs.argmax(-1), self.classes, log_probs.dtype)

    def sample(self, log_probs: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """One draw, one-hot (..., G, K); gradients pass straight through to the probabilities."""
        if is_coldest(temperature):
            return self.mode(log_probs)
        at = log_probs.detach()
        at = at if is_one(temperature) else (at / temperature).log_softmax(-1)
        drawn = one_hot(draw(at), self.classes, log_probs.dtype)
        if not log_probs.requires_grad:
            return drawn
        probabilities = log_probs.exp()
        return drawn + (probabilities - probabilities.detach())

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) in nats, summed over the variables: (..., G, K) log-probabilities each -> (...)."""
        return (p.exp() * (p - q)).sum((-2, -1))

    def entropy(self, log_probs: Tensor) -> Tensor:
        """In nats, summed over the variables."""
        return -(log_probs.exp() * log_probs).sum((-2, -1))


LIST = 64  # classes of a part


def draw(log_probs: Tensor) -> Tensor:
    """A draw from normalised (..., K) log-probabilities, as an index (...). Uses the default generator.

    By inversion: one random number a variable, where the Gumbel trick needs K and costs a fifth of imagination on CPU.
    """
    probabilities = log_probs.exp()
    uniform = noise.uniform(log_probs.shape[:-1], log_probs.device).unsqueeze(-1)
    if log_probs.shape[-1] <= LIST or log_probs.shape[-1] % LIST:
        bounds = probabilities.cumsum(-1)
        return (bounds < uniform * bounds[..., -1:]).sum(-1)
    # A long list part by part: first which part, then what in it, so that running sums are of short lists alone.
    parts = probabilities.unflatten(-1, (-1, LIST))  # (..., K / LIST, LIST)
    bounds = parts.sum(-1).cumsum(-1)
    at = uniform * bounds[..., -1:]
    part = (bounds < at).sum(-1)
    rest = at - F.pad(bounds[..., :-1], (1, 0)).gather(-1, part.unsqueeze(-1))
    chosen = parts.gather(-2, part[..., None, None].expand(*part.shape, 1, LIST)).squeeze(-2)
    within = (chosen.cumsum(-1) < rest).sum(-1).clamp(max=LIST - 1)
    return part * LIST + within


def draw_tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """A draw from logits (..., K) at a temperature, as an index (...); 0 takes the most likely."""
    logits = logits.float()
    if is_coldest(temperature):
        return logits.argmax(-1)
    return draw((logits if is_one(temperature) else logits / temperature).log_softmax(-1))


def is_coldest(temperature: float | Tensor) -> bool:
    """Whether the most likely is to be taken. A graph that is exported has a tensor for it, above 0 at all times."""
    return not isinstance(temperature, Tensor) and temperature <= 0


def is_one(temperature: float | Tensor) -> bool:
    """Whether a distribution is drawn from as it is."""
    return not isinstance(temperature, Tensor) and temperature == 1


def mean_where(value: Tensor, mask: Tensor) -> Tensor:
    """The mean where a mask of the same shape is 1; 0 when it is nowhere."""
    return (value * mask).sum() / mask.sum().clamp(min=1)
