"""Returns of a dream and their running scale. Shapes: B batch, H horizon."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def lambda_returns(reward: Tensor, cont: Tensor, value: Tensor, *, gamma: float, lam: float) -> Tensor:
    """TD(lambda) returns (B, H) of rewards and continuations (B, H) and the values (B, H + 1) of all views.

    R[t] = r[t] + gamma c[t] ((1 - lam) v[t + 1] + lam R[t + 1]),  R[H] = v[H]   (Dreamer, eq. 6)
    """
    ahead = value[:, -1]
    returns = []
    for t in reversed(range(reward.shape[1])):
        ahead = reward[:, t] + gamma * cont[:, t] * ((1 - lam) * value[:, t + 1] + lam * ahead)
        returns.append(ahead)
    return torch.stack(returns[::-1], 1)


def quantile(ordered: Tensor, share: float) -> Tensor:
    """The quantile () of sorted numbers (N,), linear between its two neighbours."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    return ordered[low].lerp(ordered[min(low + 1, len(ordered) - 1)], at - low)


class ReturnScale(nn.Module):
    """Moving average of the range between the 5th and 95th percentile of returns (DreamerV3), never below `floor`."""

    value: Tensor
    count: Tensor

    def __init__(self, floor: float, rate: float = 0.01) -> None:
        super().__init__()
        self.floor, self.rate = floor, rate
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, returns: Tensor) -> Tensor:
        """Takes in a batch of returns and gives the scale to divide advantages by."""
        ordered = returns.flatten().sort().values  # `torch.quantile` asks the device
        low, high = (quantile(ordered, share) for share in (0.05, 0.95))
        self.count += 1
        # An average over what has been seen while it is little, so that the first batches do not start from zero.
        rate = torch.clamp(1 / self.count, min=self.rate)
        self.value.lerp_(high - low, rate)
        return self.value.clamp(min=self.floor)
