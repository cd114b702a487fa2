"""Mixtures of Gaussians: what a mixture density network says of the next latent (Ha & Schmidhuber 2018, section 3.2).

Every dimension of the latent has a mixture of its own, as in the authors' program. Shapes: Z dimensions, K components.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from world_model import noise
from world_model.parts.heads import draw, is_coldest, is_one

MAX_LOG_STD = 7.0  # beyond it, either way, a density over- or underflows before it says anything


class Mixture(NamedTuple):
    """Z independent mixtures of K Gaussians, (..., Z, K) each."""

    log_weights: Tensor  # normalised over K
    mean: Tensor
    log_std: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, dimension by dimension: (..., Z) -> (..., Z)."""
        normal = (value.unsqueeze(-1) - self.mean) * (-self.log_std).exp()
        log_normal = -0.5 * normal.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return torch.logsumexp(self.log_weights + log_normal, -1)

    def kl(self, other: Mixture, points: int = 32) -> Tensor:
        """KL (..., Z) in nats to another mixture. It has no closed form: an average over each component's quantiles."""
        quantile = torch.special.ndtri((torch.arange(points, device=self.mean.device) + 0.5) / points)
        values = self.mean + self.log_std.exp() * quantile.view(-1, *[1] * self.mean.dim())
        values = values.movedim(-1, 1)  # (points, K, ..., Z)
        apart = (self.log_prob(values) - other.log_prob(values)).mean(0)
        return (self.log_weights.exp() * apart.movedim(0, -1)).sum(-1)

    def sample(self, temperature: float | Tensor = 1.0) -> Tensor:
        """One draw (..., Z) from the default generator: log-weights / temperature, variances x temperature.

        At temperature 0 it is the mean of the most likely component.
        """
        if is_coldest(temperature):
            return self._of(self.mean, self.log_weights.argmax(-1))
        at = self.log_weights if is_one(temperature) else (self.log_weights / temperature).log_softmax(-1)
        component = draw(at)
        mean, std = self._of(self.mean, component), self._of(self.log_std, component).exp()
        if isinstance(temperature, Tensor):
            return torch.addcmul(mean, std, noise.normal(mean) * temperature.sqrt())
        return torch.addcmul(mean, std, noise.normal(mean), value=math.sqrt(temperature))

    def _of(self, numbers: Tensor, component: Tensor) -> Tensor:
        return numbers.gather(-1, component.unsqueeze(-1)).squeeze(-1)


def split(raw: Tensor, components: int) -> Mixture:
    """What a network says, (..., 3 * Z * K), as mixtures in float32: weights, means, log-deviations, in turn.

    Raises ValueError when the last dimension cannot be divided so.
    """
    if raw.shape[-1] % (3 * components):
        raise ValueError(f"{raw.shape[-1]} outputs cannot be three numbers for each of {components} components")
    numbers = raw.float().unflatten(-1, (3, components, -1))
    weights = numbers.select(-3, 0).log_softmax(-2)  # over rows: 14 times as fast as over five neighbours
    mean, log_std = numbers.select(-3, 1), numbers.select(-3, 2).clamp(-MAX_LOG_STD, MAX_LOG_STD)
    return Mixture(weights.mT, mean.mT, log_std.mT)
