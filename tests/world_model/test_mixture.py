"""Mixtures of Gaussians against torch.distributions, which is exact but too slow to dream with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.testing import assert_close

from world_model.parts.mixture import MAX_LOG_STD, Mixture, split

Z, K = 3, 5


def some(*lead: int, seed: int = 0) -> Mixture:
    torch.manual_seed(seed)
    return split(torch.randn(*lead, 3 * Z * K), K)


def oracle(mixture: Mixture, temperature: float = 1.0) -> MixtureSameFamily:
    weights = Categorical(logits=mixture.log_weights / temperature)
    return MixtureSameFamily(weights, Normal(mixture.mean, mixture.log_std.exp() * temperature**0.5))


def test_outputs_are_weights_means_and_deviations_in_turn() -> None:
    raw = torch.randn(2, 7, 3 * Z * K)
    mixture = split(raw, K)
    assert all(part.shape == (2, 7, Z, K) for part in mixture)
    assert_close(mixture.log_weights.exp().sum(-1), torch.ones(2, 7, Z))
    weight, mean, log_std = raw.chunk(3, -1)
    for k in range(K):
        assert_close(mixture.mean[..., k], mean[..., k * Z : (k + 1) * Z])
        assert_close(mixture.log_std[..., k], log_std[..., k * Z : (k + 1) * Z])
    first = weight.unflatten(-1, (K, Z))
    assert_close(mixture.log_weights, first.log_softmax(-2).transpose(-1, -2))


@pytest.mark.parametrize("lead", [(), (4,), (2, 7)])
def test_log_prob_is_the_library_s(lead: tuple[int, ...]) -> None:
    mixture, value = some(*lead), 2 * torch.randn(*lead, Z)
    assert_close(mixture.log_prob(value), oracle(mixture).log_prob(value))


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_kl_is_what_draws_estimate(lead: tuple[int, ...]) -> None:
    one, other = some(*lead), some(*lead, seed=1)
    value = oracle(one).sample((200_000,))
    estimate = (oracle(one).log_prob(value) - oracle(other).log_prob(value)).mean(0)
    kl = one.kl(other)
    assert kl.shape == (*lead, Z) and one.kl(one).abs().max() == 0
    assert_close(kl, estimate, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_draws_have_the_library_s_quantiles(temperature: float) -> None:
    mixture, count = some(seed=1), 40_000
    many = Mixture(*(part.expand(count, Z, K) for part in mixture))
    drawn = many.sample(temperature)
    assert drawn.shape == (count, Z)
    exact = oracle(mixture, temperature)
    for at in (-2.0, -0.5, 0.0, 0.5, 2.0):
        assert_close((drawn < at).float().mean(0), exact.cdf(torch.full((Z,), at)), rtol=0, atol=0.012)
    assert torch.corrcoef(drawn.T)[0, 1].abs() < 0.03, "every dimension draws its own component"


def test_at_temperature_zero_it_is_the_mean_of_the_likeliest() -> None:
    mixture = some(6)
    drawn = mixture.sample(0)
    for b in range(6):
        for z in range(Z):
            assert drawn[b, z] == mixture.mean[b, z, int(mixture.log_weights[b, z].argmax())]
    assert_close(mixture.sample(1e-6), drawn, rtol=0, atol=0.05)


def test_the_same_seed_draws_the_same() -> None:
    mixture = some(6)
    draws: list[Tensor] = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(mixture.sample())
    assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert not torch.allclose(draws[0], draws[2])


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_outputs_stay_finite(extreme: float) -> None:
    raw = torch.randn(4, 3 * Z * K)
    raw[:, 2 * Z * K :] = extreme
    raw.requires_grad_()
    mixture = split(raw, K)
    assert mixture.log_std.abs().max() == MAX_LOG_STD
    loss = mixture.log_prob(torch.randn(4, Z)).sum()
    (gradient,) = torch.autograd.grad(loss, raw)
    assert loss.isfinite() and gradient.isfinite().all() and mixture.sample().isfinite().all()


def test_half_precision_outputs_are_judged_in_full() -> None:
    mixture = split(torch.randn(4, 3 * Z * K, dtype=torch.bfloat16), K)
    assert mixture.log_prob(torch.randn(4, Z)).dtype == mixture.sample().dtype == torch.float32


def test_outputs_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="46 outputs.*5 components"):
        split(torch.randn(2, 46), 5)
